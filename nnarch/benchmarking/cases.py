"""What is measured. To benchmark a new operation, add an entry here; nothing else has to change.

An entry says what the layer is, through the namespace it is given (``torch.nn`` and ``nnarch.nn``
in turn), and the shape of its input:

    Case("layer_norm_4096x768", "normalization", lambda nn: nn.LayerNorm(768), (4096, 768))

Where nnarch has a fused form of several layers, or torch has no twin, `ours=` says how nnarch runs
it. See :class:`nnarch.benchmarking.case.Case` for the rest.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from nnarch.benchmarking.attention_cases import ATTENTION_TARGETS, attentions
from nnarch.benchmarking.capsule_cases import CAPSULE_TARGETS, capsules
from nnarch.benchmarking.case import Case, Target
from nnarch.benchmarking.convolution_cases import (
    BATCHES,
    convolutions,
    depthwise_convolutions,
    separable_convolutions,
    signals,
    training_convolutions,
    transposed_convolutions,
)
from nnarch.benchmarking.cross_entropy_cases import CROSS_ENTROPY_TARGETS, cross_entropies
from nnarch.benchmarking.embedding_cases import EMBEDDING_TARGETS, embeddings, gated_linears
from nnarch.benchmarking.layer_norm_cases import LAYER_NORM_TARGETS, layer_norms
from nnarch.benchmarking.peers import torchvision
from nnarch.benchmarking.recurrent_cases import recurrents
from nnarch.benchmarking.reservoir_cases import reservoirs
from nnarch.benchmarking.transformer_cases import TRANSFORMER_TARGETS, transformers

TARGETS: dict[str, Target] = {
    "conv1x1": Target(1.1, 1.3),
    "conv3x3": Target(2.3, 3.3),
    "conv3x3 stride 2": Target(1.1, 1.3),
    "stem": Target(1.1, 1.3),
    "conv large kernel": Target(1.1, 1.3),
    "transposed conv": Target(1.3, 1.6),
    "conv1d": Target(1.0, 1.3),
    "depthwise": Target(1.5, 3.0),
    "separable": Target(1.2, 1.5),
    "linear": Target(1.1, 1.2),
    "linear + GELU": Target(1.3, 1.6),
    "pooling": Target(1.5, 3.0),
    "lrn": Target(6.0, 12.0),
    "lrn fwd+bwd": Target(6.0, 12.0),
    "upsample": Target(1.5, 3.0),
    "upsample fwd+bwd": Target(1.5, 3.0),
    "unpool": Target(1.5, 3.0),
    "batch_norm": Target(1.0, 1.5),
    "conv3x3 fwd+bwd": Target(1.7, 2.5),
    "conv1x1 fwd+bwd": Target(1.1, 1.3),
    "transposed conv fwd+bwd": Target(1.0, 1.6),
    "depthwise fwd+bwd": Target(1.5, 2.5),
    "separable fwd+bwd": Target(1.1, 1.3),
    "models": Target(1.0, 1.3),
    "training": Target(1.5, 2.1),
    **CAPSULE_TARGETS,
    **ATTENTION_TARGETS,
    **LAYER_NORM_TARGETS,
    **EMBEDDING_TARGETS,
    **CROSS_ENTROPY_TARGETS,
    **TRANSFORMER_TARGETS,
}


def target(case: Case) -> Target:
    """The ratios that `case` is held to: its own, or its group's; level with the best peer where
    neither says."""
    return case.target or TARGETS.get(case.group) or Target(1.0, 1.0)


def select(
    only: str | Sequence[str] | None = None,
    *,
    quick: bool = False,
    models: bool = True,
    among: Sequence[Case] | None = None,
) -> list[Case]:
    """The cases to run, in the order listed.

    Args:
        only: part of a name or group, or a shell pattern such as "conv1x1*_n8"; or several.
        quick: only those that stand for their group.
        models: whether whole models are included.
        among: the cases to choose from; all that a CPU is measured on by default.

    Raises:
        ValueError: nothing matches.
    """
    texts = [only] if isinstance(only, str) else only or ["*"]
    patterns = [t.lower() if any(c in t for c in "*?[") else f"*{t.lower()}*" for t in texts]

    def wanted(case: Case) -> bool:
        if (quick and not case.quick) or (case.model and not models):
            return False
        names = (case.name.lower(), case.group.lower())
        return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)

    chosen = [case for case in (CASES if among is None else among) if wanted(case)]
    if not chosen:
        raise ValueError(f"only: expected part of a case's name or group; {only!r} matches none")
    return chosen


# --------------------------------------------------------------------------- entries by family


def linear(rows: int, inputs: int, outputs: int, **options: Any) -> Case:
    """A fully connected layer with bias."""
    return Case(
        f"linear_{rows}x{inputs}x{outputs}",
        "linear",
        lambda nn: nn.Linear(inputs, outputs),
        (rows, inputs),
        label=f"linear {rows}×{inputs}→{outputs}",
        **options,
    )


def _accelerated(module: nn.Module) -> nn.Module:
    import nnarch

    return nnarch.accelerate(module)


def linears() -> Iterable[Case]:
    """Transformer and classifier layers; one row is a matrix-vector product."""
    yield linear(128, 768, 3072, quick=True)
    yield linear(1, 768, 50257)
    yield linear(1, 2048, 1000)
    yield linear(1, 1280, 1000)
    for rows in (128, 1024, 4096):
        yield Case(
            f"linear_gelu_{rows}x768x3072",
            "linear + GELU",
            lambda nn: nn.Sequential(nn.Linear(768, 3072), nn.GELU()),
            (rows, 768),
            label=f"linear + GELU {rows}×768→3072",
            ours=_accelerated,
        )


def pool(
    name: str, label: str, shape: tuple[int, int, int], taps: int, layer: Any, **options: Any
) -> Case:
    """A pooling layer on (batch, channels, size); every output sees `taps` inputs, one operation
    each."""
    batch, channels, size = shape
    images = (batch, channels, size, size)
    return Case(
        f"{name}_{channels}_h{size}_n{batch}",
        "pooling",
        layer,
        images,
        label=f"{label} {channels} @{size} N{batch}",
        flops=taps * layer(nn)(torch.empty(images, device="meta")).numel(),
        **options,
    )


def pools() -> Iterable[Case]:
    """Overlapping, average and global pooling."""
    for n in (*BATCHES, 16):
        shape = (n, 64, 112)
        yield pool("maxpool3x3s2", "max 3×3 s2", shape, 9, _overlapping_pool, quick=n == 8)
    for n in BATCHES:
        yield pool("avgpool3x3", "avg 3×3", (n, 192, 28), 9, lambda nn: nn.AvgPool2d(3, 1, 1))
        yield pool("avgpool2x2s2", "avg 2×2 s2", (n, 256, 56), 4, lambda nn: nn.AvgPool2d(2))
        yield pool("adaptive6", "adaptive 6×6", (n, 256, 13), 9, lambda nn: nn.AdaptiveAvgPool2d(6))
        yield pool("globalpool", "global", (n, 2048, 7), 49, lambda nn: nn.AdaptiveAvgPool2d(1))


def _overlapping_pool(nn: Any) -> Any:
    return nn.MaxPool2d(3, 2, 1)


class _PoolAndUnpool(nn.Module):
    """Unpooling of what a pooling left, with its indices made once: only the unpooling is timed."""

    def __init__(self, namespace: Any, channels: int, size: int, batch: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        with torch.device("cpu"):
            window = torch.randint(4, (batch, channels, size, size), generator=generator)
            row, column = torch.arange(size)[:, None] * 2, torch.arange(size) * 2
            indices = (row + window // 2) * (2 * size) + column + window % 2
        indices = indices.to(torch.get_default_device())
        self.register_buffer("indices", indices, persistent=False)
        self.unpool = namespace.MaxUnpool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        indices: Any = self.indices
        return self.unpool(x, indices)


def unpools() -> Iterable[Case]:
    """SegNet's decoder: maxima put back where its encoder found them."""
    for n in BATCHES:
        for c, size in ((64, 56), (512, 14)):
            yield Case(
                f"unpool2x2_{c}_h{size}_n{n}",
                "unpool",
                lambda nn, c=c, size=size, n=n: _PoolAndUnpool(nn, c, size, n),
                (n, c, size, size),
                label=f"unpool 2×2 {c} @{size} N{n}",
                flops=4 * n * c * size * size,
                quick=(c, n) == (64, 8),
            )


def upsamples() -> Iterable[Case]:
    """Decoders' layers that double an image, as U-Net and DCGAN do, and a segmentation head's."""
    for backward in (False, True):
        for n in BATCHES:
            # "bilin": `--only linear` shall not match.
            for short, mode in (("nearest", "nearest"), ("bilin", "bilinear")):
                for c, size, factor in ((64, 56, 2), (256, 14, 2), (21, 28, 8)):
                    yield Case(
                        f"upsample_{short}_x{factor}_{c}_h{size}_n{n}" + "_fb" * backward,
                        "upsample" + " fwd+bwd" * backward,
                        lambda nn, factor=factor, mode=mode: nn.Upsample(
                            scale_factor=factor, mode=mode
                        ),
                        (n, c, size, size),
                        label=f"{mode} ×{factor} {c} @{size} N{n}" + " fwd+bwd" * backward,
                        backward=backward,
                        flops=(7 if mode == "bilinear" else 1) * n * c * (size * factor) ** 2,
                        quick=(c, n) == (64, 8),
                    )


def local_response_norms() -> Iterable[Case]:
    """Local response normalization of AlexNet's first layer, in training too."""
    for backward in (False, True):
        for n in (*BATCHES, 16):
            yield Case(
                f"lrn5_96_h55_n{n}" + "_fb" * backward,
                "lrn" + " fwd+bwd" * backward,
                lambda nn: nn.LocalResponseNorm(5, k=2.0),
                (n, 96, 55, 55),
                label=f"LRN 5 96 @55 N{n}" + " fwd+bwd" * backward,
                backward=backward,
                flops=20 * n * 96 * 55 * 55,
                quick=n == 8,
            )


def batch_norms() -> Iterable[Case]:
    """BatchNorm in training mode and its activation, forward and backward."""
    for n in BATCHES:
        for c, size in ((64, 56), (256, 14)):
            yield Case(
                f"batch_norm_relu_{c}_h{size}_n{n}_fb",
                "batch_norm",
                lambda nn, c=c: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU()),
                (n, c, size, size),
                label=f"BatchNorm + ReLU {c} @{size} N{n} fwd+bwd",
                backward=True,
                flops=4 * n * c * size * size,
                quick=(c, n) == (64, 8),
            )


_CONSTRUCTORS = {"googlenet": {"init_weights": False, "aux_logits": False}}
_QUICK_MODELS = ("mobilenet_v2", "resnet50")


def model(name: str, batch: int, *, group: str = "models", **options: Any) -> Case:
    """A whole torchvision model at 224 x 224, made faster by :func:`nnarch.accelerate`."""
    training = group == "training"
    return Case(
        name=f"{name}_n{batch}" + ("_train" if training else ""),
        group=group,
        layer=lambda nn: getattr(torchvision().models, name)(
            weights=None, **_CONSTRUCTORS.get(name, {})
        ),
        shape=(batch, 3, 224, 224),
        label=f"{name} N{batch}" + (" training step" if training else ""),
        ours=None if training else _accelerated,
        backward=training,
        input_grad=not training,
        # Of a training step, torch's own float32 gradients are off by up to 1.2e-2.
        tolerance=5e-2 if training else 1e-4,
        model=name,
        **options,
    )


def models() -> Iterable[Case]:
    """Whole models, inference, and a training step."""
    goals = {
        "mobilenet_v2": Target(1.1, 1.3),
        "resnet50": Target(1.25, 1.45),
        "resnet18": Target(1.0, 1.3),
        "googlenet": Target(1.4, 1.8),
        "vgg16": Target(2.0, 2.5),
    }
    for name, goal in goals.items():
        for n in BATCHES:
            yield model(name, n, target=goal, quick=name in _QUICK_MODELS and n == 1)
    yield model("resnet18", 8, group="training")


CASES: tuple[Case, ...] = (
    *convolutions(),
    *transposed_convolutions(),
    *signals(),
    *depthwise_convolutions(),
    *separable_convolutions(),
    *linears(),
    *gated_linears(),
    *embeddings(),
    *pools(),
    *unpools(),
    *upsamples(),
    *local_response_norms(),
    *batch_norms(),
    *layer_norms(),
    *reservoirs(),
    *recurrents(),
    *transformers(),
    *training_convolutions(),
    *capsules(),
    *attentions(),
    *cross_entropies(),
    *models(),
)
