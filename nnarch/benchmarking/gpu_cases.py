"""What GPUs are measured on, besides the cases of CPUs: half precision, at sizes that fill one.

The order is that of importance: the first case of every family, then the second ones, and so on, so
that a run with a time limit has seen all families. Names end in the dtype.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nnarch.benchmarking import capsule_cases, cases, recurrent_cases, reservoir_cases
from nnarch.benchmarking.case import Case, Target
from nnarch.benchmarking.convolution_cases import conv, depthwise
from nnarch.benchmarking.gpu_layers import Attention, Lookup, LossOfLinear, LossOfLogits
from nnarch.benchmarking.transformer_cases import encoder_layer

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
_SHORT = {F32: "f32", F16: "f16", BF16: "bf16"}
_LEVEL = Target(1.0, 1.1)
_RECURRENT_ERROR = 2.0**-6  # of a chain of steps in half precision, and of its gradients


def in_dtype(case: Case, dtype: torch.dtype, tolerance: float | None = None) -> Case:
    """A case in another dtype, named after it; with its own tolerance in half precision."""
    return dataclasses.replace(
        case,
        name=f"{case.name}_{_SHORT[dtype]}",
        group=f"GPU {case.group}",
        label=f"{case.title}, {_SHORT[dtype]}",
        dtype=dtype,
        target=_LEVEL,
        tolerance=case.tolerance if dtype is F32 else tolerance,
    )


def attention(
    b: int, h: int, s: int, d: int, dtype: torch.dtype, *,
    groups: int = 0, causal: bool = False, masked: bool = False, queries: int = 0,
    backward: bool = False,
) -> Case:  # fmt: skip
    """Attention of `queries` positions (all by default) on `s` keys in `groups` heads."""
    groups, queries = groups or h, queries or s
    pairs = s * (s + 1) // 2 if causal else queries * s
    shared = f"g{groups}" if groups != h else ""
    rows = f"q{queries}_" if queries != s else ""
    name = f"attention_b{b}_h{h}{shared}_{rows}s{s}_d{d}"
    name += "_causal" * causal + "_bool" * masked + "_fb" * backward
    case = Case(
        name,
        "attention" + " decode" * (queries < s) + " fwd+bwd" * backward,
        lambda nn: Attention(nn, b, h, groups, s, d, causal, masked),
        (b * h, queries, d),
        label=name.replace("_", " "),
        backward=backward,
        flops=4 * b * h * pairs * d,
    )
    # P and dS are rounded to half precision before they are multiplied, as everywhere.
    return in_dtype(case, dtype, tolerance=2 * 2.0**-5 if dtype is BF16 and backward else None)


def attentions() -> Iterable[Case]:
    """Prefill, training and decoding of language models."""
    yield attention(4, 16, 2048, 64, F16, causal=True)
    yield attention(4, 16, 2048, 128, BF16)
    yield attention(4, 16, 512, 64, F16)
    yield attention(2, 32, 2048, 128, BF16, groups=8, causal=True)
    yield attention(1, 8, 8192, 128, F16)
    yield attention(4, 16, 2048, 64, F16, masked=True)
    yield attention(1, 8, 8192, 64, F16, causal=True)
    yield attention(4, 16, 512, 64, F32)


def decodes() -> Iterable[Case]:
    """One new position on a long cache."""
    yield attention(8, 32, 8192, 128, F16, groups=8, queries=1)
    yield attention(8, 16, 8192, 64, F16, queries=1)
    yield attention(1, 32, 8192, 128, BF16, groups=8, queries=1)


def trained_attentions() -> Iterable[Case]:
    """Forward and backward."""
    yield attention(4, 16, 2048, 64, F16, causal=True, backward=True)
    yield attention(4, 16, 2048, 128, BF16, backward=True)
    yield attention(4, 16, 512, 64, F16, backward=True)
    yield attention(1, 8, 8192, 64, BF16, causal=True, backward=True)


def linears() -> Iterable[Case]:
    """A large product; a Transformer's layer, with its activation fused."""
    large, wide = cases.linear(4096, 4096, 4096), cases.linear(8192, 768, 3072)
    gelu = Case(
        "linear_gelu_8192x768x3072",
        "linear + GELU",
        lambda nn: nn.Sequential(nn.Linear(768, 3072), nn.GELU()),
        (8192, 768),
        ours=cases._accelerated,
    )
    yield in_dtype(large, F16)
    yield in_dtype(gelu, BF16)
    yield in_dtype(large, F32)
    yield in_dtype(wide, F16)
    yield in_dtype(dataclasses.replace(wide, backward=True, name=wide.name + "_fb"), BF16)
    yield in_dtype(cases.linear(1, 4096, 4096), F16)


def norms() -> Iterable[Case]:
    """The norms of a language model's layers: bytes alone."""
    for backward in (False, True):
        for short, norm in (
            ("ln", lambda nn: nn.LayerNorm(4096)),
            ("rms", lambda nn: nn.RMSNorm(4096, 1e-5)),
        ):
            case = Case(
                f"{short}_8192x4096" + "_fb" * backward,
                "layer norm" + " fwd+bwd" * backward,
                norm,
                (8192, 4096),
                backward=backward,
                flops=8 * 8192 * 4096,
            )
            yield in_dtype(case, BF16 if short == "rms" else F16)


def embeddings() -> Iterable[Case]:
    """A language model's table."""
    for backward in (False, True):
        case = Case(
            "embedding_16384_50257x768" + "_fb" * backward,
            "embedding" + " fwd+bwd" * backward,
            lambda nn: Lookup(nn, 50257, 768, 16384),
            (1, 768),
            backward=backward,
            input_grad=False,
            flops=2 * 16384 * 768,
        )
        yield in_dtype(case, F16)


def losses() -> Iterable[Case]:
    """A language model's loss, from logits and from hidden states."""
    rows, depth, classes = 8192, 768, 50257
    for backward in (True, False):
        kind, suffix = " fwd+bwd" * backward, "_fb" * backward
        fused = Case(
            f"linear_cross_entropy_{rows}x{depth}x{classes}{suffix}",
            "linear + cross-entropy" + kind,
            lambda nn: LossOfLinear(nn, rows, depth, classes),
            (rows, depth),
            backward=backward,
        )
        logits = Case(
            f"cross_entropy_{rows}x{classes}{suffix}",
            "cross-entropy" + kind,
            lambda nn: LossOfLogits(nn, rows, classes),
            (rows, classes),
            backward=backward,
            flops=5 * rows * classes,
        )
        yield in_dtype(logits, BF16)
        yield in_dtype(fused, BF16)


def convolutions() -> Iterable[Case]:
    """ResNet's layers at a batch that fills a GPU."""
    yield in_dtype(conv("conv3x3", 128, 128, 3, 28, 32), F16)
    yield in_dtype(conv("conv1x1", 256, 64, 1, 56, 32), F16)
    yield in_dtype(conv("conv3x3", 64, 64, 3, 56, 32), F16)
    yield in_dtype(conv("conv3x3", 128, 128, 3, 28, 32), F32)
    yield in_dtype(conv("stem", 3, 64, 7, 224, 32, stride=2), F16)
    yield in_dtype(conv("conv3x3", 512, 512, 3, 7, 32), F16)
    yield in_dtype(conv("conv1x1", 1024, 256, 1, 14, 32), BF16)
    yield in_dtype(conv("conv3x3", 256, 256, 3, 14, 32), BF16)


def trained_convolutions() -> Iterable[Case]:
    """The same, forward and backward."""
    yield in_dtype(conv("conv3x3 fwd+bwd", 128, 128, 3, 28, 32, backward=True), F16)
    yield in_dtype(conv("conv1x1 fwd+bwd", 256, 64, 1, 56, 32, backward=True), F16)
    yield in_dtype(conv("conv3x3 fwd+bwd", 128, 128, 3, 28, 32, backward=True), F32)


def other_image_layers() -> Iterable[Case]:
    """Layers of images that move bytes."""
    yield in_dtype(depthwise(128, 56, 32), F16)
    norm = Case(
        "batch_norm_relu_64_h56_n32_fb",
        "batch_norm",
        lambda nn: nn.Sequential(nn.BatchNorm2d(64), nn.ReLU()),
        (32, 64, 56, 56),
        backward=True,
        flops=4 * 32 * 64 * 56 * 56,
    )
    yield in_dtype(norm, F16)
    yield in_dtype(
        cases.pool("maxpool3x3s2", "max", (32, 64, 112), 9, cases._overlapping_pool), F16
    )
    yield in_dtype(depthwise(512, 14, 32, group="depthwise fwd+bwd", backward=True), F16)
    yield in_dtype(norm, F32)


def recurrents() -> Iterable[Case]:
    """Sequences of 100 steps."""
    lstm, small = (recurrent_cases.sequence("LSTM", h, 64, 100) for h in (512, 128))
    yield in_dtype(lstm, F16, _RECURRENT_ERROR)
    yield in_dtype(small, F16, _RECURRENT_ERROR)
    yield in_dtype(recurrent_cases.sequence("GRU", 512, 64, 100), F16, _RECURRENT_ERROR)
    both = recurrent_cases.sequence("LSTM", 512, 64, 100, backward=True)
    yield in_dtype(both, F16, _RECURRENT_ERROR)
    yield in_dtype(lstm, F32)
    yield in_dtype(small, F32)


def novelties() -> Iterable[Case]:
    """What has no torch layer: capsules and reservoirs."""
    routing = {case.name: case for case in capsule_cases.capsules()}
    yield in_dtype(routing["capsules_1152x8_10x16_n128"], F32)
    yield in_dtype(reservoir_cases.reservoir(1000, 1, 2000, _LEVEL), F32)
    yield in_dtype(routing["capsules_1152x8_10x16_n128_fb"], F32)
    yield in_dtype(routing["capsules_1152x8_10x16_n128"], F16)
    yield in_dtype(reservoir_cases.reservoir(1000, 16, 500, _LEVEL), F32)


def networks() -> Iterable[Case]:
    """A Transformer's layer against one written by hand; whole convolutional networks."""
    yield in_dtype(encoder_layer(8, 512, 512, 8, by_hand=True), F16)
    yield in_dtype(_resnet("resnet50", backward=False), F16, tolerance=2.0**-4)
    yield in_dtype(encoder_layer(8, 128, 512, 8, by_hand=True), F16)
    yield in_dtype(_resnet("resnet18", backward=True), F32)
    layer = encoder_layer(8, 512, 512, 8, by_hand=True, backward=True)
    yield in_dtype(layer, BF16, tolerance=2.0**-3)
    yield in_dtype(encoder_layer(8, 128, 512, 8, by_hand=False), F16)
    # Rounding flips ReLUs: bfloat16 gradients of a whole network say nothing about a kernel.
    yield in_dtype(_resnet("resnet18", backward=True), BF16, tolerance=float("inf"))


def _resnet(name: str, *, backward: bool) -> Case:
    """Our definition of a ResNet, so that no other package is needed."""

    def layer(namespace: Any) -> nn.Module:
        import nnarch

        return nnarch.create_model(name, nn=namespace)

    return Case(
        f"{name}_n32" + "_train" * backward,
        "training" if backward else "models",
        layer,
        (32, 3, 224, 224),
        ours=None if backward else cases._accelerated,
        backward=backward,
        input_grad=not backward,
        tolerance=5e-2 if backward else 1e-4,
    )


def _in_turn(*families: Iterable[Case]) -> Iterable[Case]:
    """The first of every family, and `--quick` runs these; the second; and so on."""
    for place, rank in enumerate(itertools.zip_longest(*families)):
        for case in rank:
            if case is not None:
                yield dataclasses.replace(case, quick=place == 0)


GPU_CASES: tuple[Case, ...] = tuple(
    _in_turn(
        attentions(),
        trained_attentions(),
        linears(),
        convolutions(),
        norms(),
        losses(),
        networks(),
        decodes(),
        trained_convolutions(),
        recurrents(),
        other_image_layers(),
        novelties(),
        embeddings(),
    )
)
