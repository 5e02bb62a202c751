"""The losses on the GPU.

Logits: one kernel for the losses of all positions, one for the gradient (triton_logits.py). Fused
with the linear layer: triton_linear.py. A target that is no class makes its loss NaN: asking the
GPU would wait for it.
"""

from __future__ import annotations

import torch

from nnarch.kernels.cross_entropy.reference import (
    MEAN,
    WANT_LOGITS,
    WANT_TARGET,
    empty_like_logits,
)
from nnarch.kernels.cross_entropy.triton_linear import (
    linear_cross_entropy,
    linear_cross_entropy_backward,
)
from nnarch.kernels.cross_entropy.triton_logits import gradients, losses
from nnarch.kernels.cross_entropy.triton_loss import Loss, as_ncl
from nnarch.kernels.cross_entropy.triton_scale import scale_by, scale_in_place
from nnarch.kernels.cross_entropy.triton_sums import PER_PROGRAM
from nnarch.kernels.gpu.launch import check_dtype, device_guard
from nnarch.kernels.gpu.static import StaticCase, meta

__all__ = [
    "STATIC_CASES",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_scale",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
]

# ------------------------------------------------------------------------------------ of logits


def cross_entropy(
    x: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
    wanted: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``nnarch::cross_entropy``."""
    check_dtype("cross_entropy", x, class_weight)
    numbers = (ignore_index, label_smoothing, z_loss, reduction)
    loss = Loss(target, class_weight, x.shape[1], *numbers)
    logits, positions = as_ncl(x), x.numel() // x.shape[1]
    values = x.new_empty(positions, dtype=torch.float32)
    lse = x.new_empty(positions, dtype=torch.float64)
    dx = empty_like_logits(x) if wanted else x.new_empty(0)
    with device_guard(x):
        soft = wanted and loss.q is not None
        totals = torch.empty_like(values) if soft else None
        losses(logits, loss, values, lse, totals)
        if wanted:
            gradients(logits, loss, lse, None, totals if soft else loss.totals(), as_ncl(dx))
    return loss.reduced(values, x.dtype), lse, dx


def cross_entropy_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
    wanted: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``nnarch::cross_entropy_backward``."""
    check_dtype("cross_entropy_backward", grad, x, class_weight)
    numbers = (ignore_index, label_smoothing, z_loss, reduction)
    loss = Loss(target, class_weight, x.shape[1], *numbers)
    dx = empty_like_logits(x) if wanted & WANT_LOGITS else None
    dq = empty_like_logits(x) if wanted & WANT_TARGET else None
    with device_guard(x):
        totals = loss.totals() if dx is not None else None
        gradients(as_ncl(x), loss, lse.contiguous(), grad, totals, as_ncl(dx), as_ncl(dq))
    empty = x.new_empty(0)
    return empty if dx is None else dx, empty if dq is None else dq


def cross_entropy_scale(
    grad: torch.Tensor, ready: torch.Tensor, like: torch.Tensor | None
) -> torch.Tensor:
    """``nnarch::cross_entropy_scale``."""
    check_dtype("cross_entropy_scale", grad, ready)
    with device_guard(ready):
        return scale_by(ready.contiguous(), grad)


def scale_on_gpu(grad: torch.Tensor, ready: torch.Tensor) -> None:
    """The same in place; `ready` is contiguous."""
    check_dtype("cross_entropy_scale", grad, ready)
    with device_guard(ready):
        scale_in_place(ready, grad)


# ------------------------------------------------------------------------------ static checks


_MAIN = 1  # behind what a mean divides by: one launch, two for many positions


def _logits_case(name: str, size: tuple[int, ...], backward: bool) -> StaticCase:
    elements = float(torch.Size(size).numel())
    positions = size[0] * (size[2] if len(size) == 3 else 1)

    def run(dtype: torch.dtype) -> object:
        x = meta(*size, dtype=dtype)
        target = torch.empty(positions, dtype=torch.int64, device="meta")
        if not backward:
            return cross_entropy(x, target, None, -100, 0.0, 0.0, MEAN, 0)
        lse = meta(positions, dtype=torch.float64)
        grad = meta(dtype=dtype)
        return cross_entropy_backward(grad, x, target, None, lse, -100, 0.0, 0.0, MEAN, 1)

    operation = "cross_entropy_backward" if backward else "cross_entropy"
    moved = (2 if backward else 1) * elements
    main = _MAIN + (positions > PER_PROGRAM)
    targets = 8.0 * positions
    return StaticCase(f"{operation} {name}", run, 5 * elements, moved, targets, main=main)


def _linear_case(samples: int, depth: int, classes: int) -> StaticCase:
    def run(dtype: torch.dtype) -> object:
        target = torch.empty(samples, dtype=torch.int64, device="meta")
        x, weight = meta(samples, depth, dtype=dtype), meta(classes, depth, dtype=dtype)
        return linear_cross_entropy(x, weight, None, target, None, -100, 0.0, 0.0, MEAN, 3)

    return StaticCase(
        f"linear_cross_entropy forward and gradients {samples}×{depth}×{classes}",
        run,
        flops=6.0 * samples * depth * classes,
        elements=3.0 * (samples * depth + classes * depth + samples * classes),
        matrix=True,
        main=_MAIN,
    )


def _scale_case() -> StaticCase:
    elements = 50257 * 768

    def run(dtype: torch.dtype) -> object:
        return cross_entropy_scale(meta(dtype=dtype), meta(50257, 768, dtype=dtype), None)

    return StaticCase("cross_entropy_scale 50257×768", run, float(elements), 2.0 * elements)


STATIC_CASES = [
    _logits_case("8192×50257", (8192, 50257), False),
    _logits_case("N8 C21 512×512", (8, 21, 512 * 512), False),
    _logits_case("8192×50257", (8192, 50257), True),
    _logits_case("N8 C21 512×512", (8, 21, 512 * 512), True),
    _linear_case(2048, 4096, 4096),
    _linear_case(1024, 4096, 50257),  # rows of logits rounded up
    _scale_case(),
]
"""What bench/static_gpu.py compiles."""
