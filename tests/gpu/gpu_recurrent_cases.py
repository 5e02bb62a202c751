"""Arguments of recurrent scans, and their comparison with the definition in float64."""

from __future__ import annotations

import torch
from tolerances import ULPS, assert_as_accurate
from torch import Tensor
from triton_cases import poisoned_memory

from nnarch.kernels.gpu.launch import INTERPRETED
from nnarch.kernels.recurrent import gpu_kernel, kinds, reference

GRADIENTS = (
    *("x", "h0", "c0", "weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    *("weight_hr", "peephole", "norm"),
)
OUTPUTS = ("y", "h", "c", "reserve")
# A normalization's gradient is a difference of numbers that are nearly equal: of so few units one
# sample's error is several times another's, in torch as here.
NORM_ULPS = 16.0
PRODUCT_ULPS = ULPS if INTERPRETED else 2 * ULPS  # products of TF32 parts, shared divisions


def arguments(
    kind: int,
    steps: int = 3,
    batch: int = 3,
    inputs: int = 5,
    hidden: int = 17,
    *,
    proj: int = 0,
    counts: list[int] | None = None,
    peephole: bool = False,
    norm: bool = False,
    states: bool = True,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor | None]:
    """The tensors of recurrent_scan up to batch_sizes; `counts` packs the sequences."""
    rows, size = kinds.GATES[kind] * hidden, proj or hidden

    def random(*shape: int, scale: float = 0.5) -> Tensor:
        return (torch.randn(shape) * scale).to(dtype)

    batch = batch if counts is None else max(counts, default=0)
    x = random(steps, batch, inputs) if counts is None else random(sum(counts), inputs)
    lstm = kind == kinds.LSTM
    return [
        x,
        random(batch, size) if states else None,
        random(batch, hidden) if states and lstm else None,
        random(rows, inputs),
        random(rows, size, scale=hidden**-0.5),
        random(rows) if bias else None,
        random(rows) if bias else None,
        random(proj, hidden, scale=hidden**-0.5) if proj else None,
        random(3, hidden) if peephole else None,
        1 + random(kinds.NORM_ROWS, hidden) if norm else None,
        None if counts is None else torch.tensor(counts, dtype=torch.int64, device="cpu"),
    ]


def _wide(tensors: list[Tensor | None] | tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [
        t.double() if t is not None and t.is_floating_point() else t for t in tensors
    ]  # batch_sizes stays


def check_forward(
    tensors: list[Tensor | None], kind: int, reverse: bool = False, save: bool = True
):
    """Assert that every output is as accurate as the definition in the same dtype; return them."""
    rest = (None, kind, reverse, 1e-5, save)
    with poisoned_memory():
        actual = gpu_kernel.recurrent_scan(*tensors, *rest)
    same = reference.recurrent_scan(*tensors, *rest)
    truth = reference.recurrent_scan(*_wide(tensors), *rest)
    for name, *three in zip(OUTPUTS, actual, same, truth, strict=True):
        assert_as_accurate(*three, what=name)
    return actual


def check(tensors: list[Tensor | None], kind: int, reverse: bool = False, wanted: int = 1023):
    """:func:`check_forward`, then all gradients likewise."""
    actual = check_forward(tensors, kind, reverse)
    grads = [torch.randn_like(t) for t in actual[:3]]
    if kind != kinds.LSTM:
        grads[2] = None
    check_backward(grads, tensors, actual, kind, reverse, wanted)


def check_backward(grads, tensors, outputs, kind, reverse=False, wanted=1023):
    """Assert that every gradient is as accurate as the definition's, and absent if not wanted."""
    inputs = [*grads, *tensors, outputs[0], outputs[3]]
    rest = (kind, reverse, 1e-5, wanted)
    with poisoned_memory():
        actual = gpu_kernel.recurrent_scan_backward(*inputs, *rest)
    same = reference.recurrent_scan_backward(*inputs, *rest)
    truth = reference.recurrent_scan_backward(*_wide(inputs), *rest)
    ulps = NORM_ULPS if tensors[GRADIENTS.index("norm")] is not None else PRODUCT_ULPS
    for name, *three in zip(GRADIENTS, actual, same, truth, strict=True):
        assert_as_accurate(*three, ulps=ulps, what=f"gradient of {name}")
