"""The loss of a linear layer on the GPU: samples in chunks, whose logits share one buffer.

A chunk's logits are a product of kernels/linear; their gradient takes their place and goes into two
more (three in all, as Liger's kernels do it). The buffer's rows are rounded up: an odd number of
classes would make every element of the three products an access of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nnarch.kernels.cross_entropy.reference import (
    WANT_BIAS,
    WANT_WEIGHT,
    WANT_X,
    compute_dtype,
)
from nnarch.kernels.cross_entropy.triton_logits import gradients, losses
from nnarch.kernels.cross_entropy.triton_loss import Loss, as_ncl
from nnarch.kernels.gpu.launch import cdiv, check_dtype, device_guard
from nnarch.kernels.gpu.split import NO_EPILOGUE
from nnarch.kernels.linear.triton_product import product
from nnarch.kernels.normalization.triton_reduce import sum_channels

CHUNK_BYTES = 2**28
"""What a chunk's logits take, or as much as the weight if that is more. Every chunk but the first
reads and writes a float32 gradient of the weight: the fewer, the better."""

_ROWS, _COLUMNS = 128, 64  # what chunks and rows of logits are rounded up to


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
    numbers = (ignore_index, label_smoothing, z_loss, reduction)
    loss = Loss(target, class_weight, weight.shape[0], *numbers)
    values = x.new_empty(x.shape[0], dtype=torch.float32)
    lse = x.new_empty(x.shape[0], dtype=torch.float64)
    made = _Gradients(x, weight, wanted, loss.weights)
    with device_guard(x):
        totals = loss.totals() if wanted else None
        for chunk, logits, first, end in _chunks(x, weight, bias):
            part = loss.part(first, end)
            losses(as_ncl(logits), part, values[first:end], lse[first:end])
            if wanted:
                _in_place(logits, part, lse[first:end], None, totals)
                made.add(chunk, logits, first, end)
    return loss.reduced(values, compute_dtype(x.dtype)), lse, *made.results()


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
    numbers = (ignore_index, label_smoothing, z_loss, reduction)
    loss = Loss(target, class_weight, weight.shape[0], *numbers)
    made = _Gradients(x, weight, wanted, loss.weights)
    lse = lse.contiguous()
    with device_guard(x):
        totals = loss.totals()
        for chunk, logits, first, end in _chunks(x, weight, bias):
            own = grad if grad.dim() == 0 else grad[first:end]
            _in_place(logits, loss.part(first, end), lse[first:end], own, totals)
            made.add(chunk, logits, first, end)
    return made.results()


def _chunks(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[int, torch.Tensor, int, int]]:
    """Number, logits [samples, classes rounded up], first sample and end of every chunk.

    The logits are in the same memory every time; the columns beyond the classes hold no number.
    """
    samples, (classes, _) = x.shape[0], weight.shape
    width, size = chunk_sizes(x, weight)
    logits = x.new_empty((min(size, samples), width))
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (0, width - classes))
    for chunk, first in enumerate(range(0, samples, size)):
        rows = x[first : first + size]
        z = logits[: rows.shape[0]]
        product(rows, weight, z, NO_EPILOGUE | {"bias_ptr": bias})
        yield chunk, z, first, first + rows.shape[0]


def chunk_sizes(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, int]:
    """Columns and rows of the buffer for logits; the chunks are about equally large."""
    samples, width = x.shape[0], cdiv(weight.shape[0], _COLUMNS) * _COLUMNS
    most = max(CHUNK_BYTES // x.element_size(), weight.numel()) // width
    chunks = cdiv(max(samples, 1), max(most // _ROWS * _ROWS, _ROWS))
    return width, cdiv(cdiv(max(samples, 1), chunks), _ROWS) * _ROWS


def _in_place(
    logits: torch.Tensor,
    loss: Loss,
    lse: torch.Tensor,
    grad: torch.Tensor | None,
    totals: torch.Tensor | None,
) -> None:
    """The gradient of logits in their place, times what a mean divides by: float16 could not hold
    most of a mean's. The products divide."""
    z = as_ncl(logits)
    gradients(z, loss, lse, grad, totals, z, times_weights=True)


class _Gradients:
    """Sums up the gradients of x, weight and bias from chunks of the logits' gradient.

    Args:
        x, weight: of the layer.
        wanted: which gradients.
        divisor: one number that all of them are divided by; None for 1.
    """

    def __init__(
        self, x: torch.Tensor, weight: torch.Tensor, wanted: int, divisor: torch.Tensor | None
    ) -> None:
        self.x, self.weight, self.wanted = x, weight, wanted
        self.dx = x.new_empty(x.shape if wanted & WANT_X else 0)
        self.dw: torch.Tensor | None = None
        self.sums: list[torch.Tensor] = []
        self.inverse: torch.Tensor | None = None
        if wanted and divisor is not None:
            inverse = torch.where(divisor == 0, 0.0, 1.0 / divisor)
            self.inverse = inverse.expand(x.shape[1]).contiguous()

    def add(self, chunk: int, g: torch.Tensor, first: int, end: int) -> None:
        """Add what a chunk gives, whose gradient g [samples, width] is 0 beyond the classes."""
        rows = self.x[first:end]
        if self.wanted & WANT_X:
            product(g, self.weight.t(), self.dx[first:end], self._epilogue(None))
        if self.wanted & WANT_WEIGHT:
            self._add_weight(chunk, g, rows, last=end == self.x.shape[0])
        if self.wanted & WANT_BIAS:
            self.sums.append(sum_channels(g))

    def _add_weight(self, chunk: int, g: torch.Tensor, rows: torch.Tensor, last: bool) -> None:
        """In float32 until the last chunk: half types would round every sum on the way."""
        before = self.dw
        if chunk == 0 or last:
            dtype = rows.dtype if last else torch.float32
            self.dw = rows.new_empty(self.weight.shape, dtype=dtype)
        # In between it takes the place of what it adds to; every element is read first. A search
        # for a tile, which repeats a product, has been made at the first chunk.
        product(g.t(), rows.t(), self.dw, self._epilogue(before))

    def _epilogue(self, residual: torch.Tensor | None) -> dict[str, Any]:
        """inverse·product + residual"""
        return NO_EPILOGUE | {"scale_ptr": self.inverse, "residual_ptr": residual}

    def results(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, classes = self.x, self.weight.shape[0]
        dw, db = self.dw, x.new_zeros(classes if self.wanted & WANT_BIAS else 0)
        if dw is None:
            dw = x.new_zeros(self.weight.shape if self.wanted & WANT_WEIGHT else 0)
        if self.sums:
            sums = torch.stack(self.sums).sum(0)[:classes]
            db = (sums if self.inverse is None else sums * self.inverse[:1]).to(x.dtype)
        return self.dx, dw, db
