"""The losses on the GPU.

Logits: one kernel for the statistics of every position, one for the gradient. Fused with the linear
layer: the samples go in chunks whose logits are about as many numbers as x has, by the tiled
product of kernels/linear; their gradient takes their place and goes into two more products (three
in all, as Liger's kernels do it). A target that is no class makes its loss NaN: asking the GPU
would wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from nnarch.kernels.cross_entropy.reference import (
    MEAN,
    NONE,
    WANT_BIAS,
    WANT_LOGITS,
    WANT_TARGET,
    WANT_WEIGHT,
    WANT_X,
    compute_dtype,
    empty_like_logits,
)
from nnarch.kernels.cross_entropy.triton_logits import (
    Numbers,
    as_ncl,
    gradients,
    scale_by,
    scale_in_place,
    statistics,
)
from nnarch.kernels.gpu.launch import check_dtype, device_guard
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.linear.triton_kernel import linear
from nnarch.kernels.linear.triton_product import product
from nnarch.kernels.normalization.triton_kernel import channel_sum

__all__ = [
    "STATIC_CASES",
    "cross_entropy",
    "cross_entropy_backward",
    "cross_entropy_scale",
    "linear_cross_entropy",
    "linear_cross_entropy_backward",
]

# ----------------------------------------------------- one number a position: loss, and slopes


@dataclass(frozen=True)
class _Loss:
    """How the terms of positions become the loss, and the loss's gradient theirs.

    Attributes:
        kept: whether a position counts.
        weight: of its target.
        weights, count: what means divide by.
    """

    kept: torch.Tensor
    weight: torch.Tensor
    weights: torch.Tensor
    count: torch.Tensor
    smoothing: float
    z_loss: float
    reduction: int

    @classmethod
    def of(
        cls,
        numbers: Numbers,
        positions: int,
        like: torch.Tensor,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
        reduction: int,
    ) -> _Loss:
        one = like.new_ones((), dtype=torch.float32)
        if numbers.target is None:
            kept = like.new_ones(positions, dtype=torch.bool)
            weight = kept.float()
        else:
            kept = numbers.target != ignore_index
            weight = kept.float()
            if numbers.class_weight is not None:
                last = numbers.class_weight.shape[0] - 1
                weight = weight * numbers.class_weight[numbers.target.clamp(0, last)]
        mean = reduction == MEAN
        weights, count = (weight.sum(), kept.sum()) if mean else (one, one)
        return cls(kept, weight, weights, count, smoothing, z_loss, reduction)

    def values(self, terms: dict[str, torch.Tensor], first: int = 0) -> torch.Tensor:
        """The losses of positions from `first` on, divided by what the reduction divides by."""
        part = slice(first, first + terms["lse"].shape[0])
        kept, weight = self.kept[part], self.weight[part]
        own = torch.where(weight == 0, 0.0, (1.0 - self.smoothing) * weight * terms["nll"])
        value = (terms["entropy"] + own) / self.weights
        if self.z_loss != 0.0:
            value = value + self.z_loss * terms["lse"].square() / self.count
        return torch.where(kept, value, 0.0)

    def reduced(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.reduction == NONE:
            return values.to(dtype)
        nothing = (self.count == 0) if self.reduction == MEAN else self.count < 0
        return torch.where(nothing, float("nan"), values.sum()).to(dtype)

    def slopes(
        self,
        numbers: Numbers,
        grad: torch.Tensor | float,
        lse: torch.Tensor,
        total: torch.Tensor,
        first: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """alpha, beta and scale of positions from `first` on; `total` is their Σ a."""
        part = slice(first, first + lse.shape[0])
        kept, weight = self.kept[part], self.weight[part]
        zero = torch.zeros_like(lse)
        scale = torch.where(kept, zero + grad / self.weights, 0.0)
        beta = zero
        alpha = scale * total
        if numbers.target is not None:
            beta = scale * (1.0 - self.smoothing) * weight
            alpha = alpha + beta
        if self.z_loss != 0.0:
            alpha = alpha + torch.where(kept, grad / self.count * 2.0 * self.z_loss * lse, 0.0)
        return alpha, beta, scale


def _totals(numbers: Numbers, x: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Σ a of every position, which a backward does not find among what was saved."""
    if numbers.q is not None:
        q = numbers.q.float() * numbers.of_target + numbers.rest
        weight = numbers.class_weight
        q = q if weight is None else q * weight[:, None]
        return q.sum(1).reshape(-1)
    if numbers.class_weight is None:
        return torch.full_like(lse, numbers.rest * x.shape[1])
    return torch.zeros_like(lse) + numbers.rest * numbers.class_weight.sum()


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
    logits = as_ncl(x)
    numbers = Numbers(target, class_weight, label_smoothing, x.shape[1])
    positions = x.numel() // x.shape[1]
    loss = _Loss.of(numbers, positions, x, ignore_index, label_smoothing, z_loss, reduction)
    with device_guard(x):
        terms = statistics(logits, numbers)
        dx = x.new_empty(0)
        if wanted:
            dx = empty_like_logits(x)
            slopes = loss.slopes(numbers, 1.0, terms["lse"], terms["total"])
            gradients(logits, numbers, terms["lse"], slopes, as_ncl(dx))
    return loss.reduced(loss.values(terms), x.dtype), terms["lse"], dx


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
    numbers = Numbers(target, class_weight, label_smoothing, x.shape[1])
    loss = _Loss.of(numbers, lse.shape[0], x, ignore_index, label_smoothing, z_loss, reduction)
    dx = empty_like_logits(x) if wanted & WANT_LOGITS else None
    dq = empty_like_logits(x) if wanted & WANT_TARGET else None
    with device_guard(x):
        slopes = loss.slopes(numbers, grad.float(), lse, _totals(numbers, x, lse))
        gradients(as_ncl(x), numbers, lse, slopes, as_ncl(dx), as_ncl(dq))
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


# -------------------------------------------------------------------- fused with a linear layer


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
    wanted: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``nnarch::linear_cross_entropy``."""
    check_dtype("linear_cross_entropy", x, weight, bias, class_weight)
    numbers = Numbers(target, class_weight, label_smoothing, weight.shape[0])
    loss = _Loss.of(numbers, x.shape[0], x, ignore_index, label_smoothing, z_loss, reduction)
    made = _Gradients(x, weight, wanted, loss.weights)
    values, lses = [], []
    with device_guard(x):
        for first, rows in _chunks(x, weight):
            logits = linear(rows, weight, bias, None, None, None, None, 0, 0.0)
            part = _of_chunk(numbers, first, rows.shape[0])
            terms = statistics(as_ncl(logits), part)
            values.append(loss.values(terms, first))
            lses.append(terms["lse"])
            if wanted:
                # Divided at the end: float16 could not hold most of a mean's gradient.
                slopes = loss.slopes(part, loss.weights, terms["lse"], terms["total"], first)
                gradients(as_ncl(logits), part, terms["lse"], slopes, as_ncl(logits))
                made.add(logits, first, rows)
    dtype = compute_dtype(x.dtype)
    empty = x.new_empty(0, dtype=torch.float64)
    value = loss.reduced(torch.cat(values) if values else empty, dtype)
    return value, torch.cat(lses) if lses else empty, *made.results()


def linear_cross_entropy_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    lse: torch.Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: int,
    wanted: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``nnarch::linear_cross_entropy_backward``."""
    check_dtype("linear_cross_entropy_backward", grad, x, weight, bias, class_weight)
    numbers = Numbers(target, class_weight, label_smoothing, weight.shape[0])
    loss = _Loss.of(numbers, x.shape[0], x, ignore_index, label_smoothing, z_loss, reduction)
    made = _Gradients(x, weight, wanted, loss.weights)
    with device_guard(x):
        for first, rows in _chunks(x, weight):
            logits = linear(rows, weight, bias, None, None, None, None, 0, 0.0)
            part, n = _of_chunk(numbers, first, rows.shape[0]), rows.shape[0]
            sums, own = lse[first : first + n], grad if grad.dim() == 0 else grad[first : first + n]
            total = _totals(part, logits, sums)
            slopes = loss.slopes(part, own * loss.weights, sums, total, first)
            gradients(as_ncl(logits), part, sums, slopes, as_ncl(logits))
            made.add(logits, first, rows)
    return made.results()


class _Gradients:
    """Sums up the gradients of x, weight and bias from chunks of the logits' gradient."""

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, wanted: int, weights: torch.Tensor
    ) -> None:
        self.weight, self.wanted = weight, wanted
        classes, depth = weight.shape
        self.dx = x.new_empty(x.shape if wanted & WANT_X else 0)
        self.dw: torch.Tensor | None = None
        self.db: torch.Tensor | None = None
        self.classes, self.depth, self.like = classes, depth, x
        inverse = torch.where(weights == 0, 0.0, 1.0 / weights).to(x.dtype)
        self.inverse = inverse.expand(depth).contiguous()

    def add(self, g: torch.Tensor, first: int, rows: torch.Tensor) -> None:
        end = first + rows.shape[0]
        if self.wanted & WANT_X:
            product(g, self.weight.t(), self.dx[first:end], self._epilogue())
        if self.wanted & WANT_WEIGHT:
            # In float32 until the last chunk: half types would round every sum on the way.
            dtype = rows.dtype if end == self.like.shape[0] else torch.float32
            dw = rows.new_empty((self.classes, self.depth), dtype=dtype)
            product(g.t(), rows.t(), dw, self._epilogue(self.dw))
            self.dw = dw
        if self.wanted & WANT_BIAS:
            sums = channel_sum(g).float() * self.inverse[:1].float()
            self.db = sums if self.db is None else self.db + sums

    def _epilogue(self, residual: torch.Tensor | None = None) -> dict[str, object]:
        """inverse·product + residual"""
        absent = dict.fromkeys(("bias_ptr", "shift_ptr"))
        numbers = {"alpha": 0.0, "ACTIVATION": 0}
        return {**absent, **numbers, "scale_ptr": self.inverse, "residual_ptr": residual}

    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, dw, db = self.like, self.dw, self.db
        if dw is None:
            dw = x.new_zeros((self.classes, self.depth) if self.wanted & WANT_WEIGHT else 0)
        if db is None:
            db = x.new_zeros(self.classes if self.wanted & WANT_BIAS else 0)
        return self.dx, dw, db.to(x.dtype)


def _chunks(x: torch.Tensor, weight: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Rows whose logits are about as many as x or the weight has elements, 128 at least."""
    samples, depth = x.shape
    wanted = triton.next_power_of_2(max(depth, samples * depth // weight.shape[0]))
    size = max(128, wanted)
    return [(first, x[first : first + size]) for first in range(0, samples, size)]


def _of_chunk(numbers: Numbers, first: int, count: int) -> Numbers:
    assert numbers.target is not None
    part = object.__new__(Numbers)
    part.__dict__ = numbers.__dict__ | {"target": numbers.target[first : first + count]}
    return part


# ------------------------------------------------------------------------------ static checks


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
    return StaticCase(f"{operation} {name}", run, 5 * elements, (2 if backward else 1) * elements)


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
    _scale_case(),
]
"""What bench/static_gpu.py compiles."""
