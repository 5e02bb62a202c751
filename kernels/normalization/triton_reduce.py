"""Sums over all dimensions but the channels, in two stages of fixed order and without atomics.

The first stage splits the work of a block of channels over programs, each of which writes one
partial result; the second adds the partial results of a channel. `channel_sum` and `channel_dot`
are here, and the statistics of batch normalization.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    flat_grid,
    launch,
    named_strides,
    needs_int64,
)
from nnarch.kernels.gpu.tiles import tile
from nnarch.kernels.normalization.triton_layout import (
    as_ncl,
    blocks,
    channel_columns,
    image_rows,
    load_tile,
    reduction_grid,
    statistic,
)

_MERGE = tile(BLOCK_S=128, BLOCK_C=8, num_warps=4)  # few columns: many programs


@triton.jit
def split_range(row_tiles, per_split):
    """First row tile of this program's split, and the one after its last."""
    first = tl.program_id(1) * per_split
    return first, tl.minimum(first + per_split, row_tiles)


@triton.jit
def store_partial(partial_ptr, value, which, c, c_inside, channels, COUNT: tl.constexpr):
    """Store a tile's sum over its rows as number `which` of COUNT in [splits, COUNT, channels]."""
    row = tl.program_id(1) * COUNT + which
    tl.store(partial_ptr + row * channels + c, tl.sum(value, 1, keep_dims=True), mask=c_inside)


@triton.jit
def _channel_sum_kernel(
    a_ptr,
    b_ptr,  # None: the sum of a alone
    partial_ptr,  # [splits, 1, channels] float32
    channels,
    length,
    row_tiles,
    per_split,
    stride_an,
    stride_ac,
    stride_al,
    stride_bn,
    stride_bc,
    stride_bl,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One split's sum of a·b per channel."""
    c, c_inside = channel_columns(tl.program_id(0), channels, INT64, BLOCK_C)
    first, end = split_range(row_tiles, per_split)
    acc = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for t in range(first, end):
        n, position, inside = image_rows(t, length, INT64, BLOCK_L)
        inside = c_inside & inside
        value = load_tile(a_ptr, n, c, position, stride_an, stride_ac, stride_al, inside)
        if b_ptr is not None:
            value *= load_tile(b_ptr, n, c, position, stride_bn, stride_bc, stride_bl, inside)
        acc += value
    store_partial(partial_ptr, acc, 0, c, c_inside, channels, 1)


@triton.jit
def _merge_sums_kernel(
    partial_ptr,  # [splits, width] float32, rows apart
    out_ptr,  # [width]
    splits,
    width,
    stride_ps,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of the splits' partial sums."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    s = tl.arange(0, BLOCK_S)[:, None]
    acc = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, splits, BLOCK_S):
        inside = (start + s < splits) & (column < width)
        acc += tl.load(partial_ptr + (start + s) * stride_ps + column, mask=inside, other=0.0)
    total = tl.sum(acc, 0, keep_dims=True)
    tl.store(out_ptr + column, total.to(out_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def _statistics_kernel(
    x_ptr,
    partial_ptr,  # [splits, 3, channels] float32: count, mean, sum of squared deviations
    channels,
    length,
    row_tiles,
    per_split,
    stride_xn,
    stride_xc,
    stride_xl,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One split's count, mean and squared deviations per channel.

    Deviations are taken from the mean of the split's first tile, which is close enough to the
    split's mean that the correction at the end cancels nothing that matters.
    """
    c, c_inside = channel_columns(tl.program_id(0), channels, INT64, BLOCK_C)
    first, end = split_range(row_tiles, per_split)
    n, position, inside = image_rows(first, length, INT64, BLOCK_L)
    pilot = load_tile(x_ptr, n, c, position, stride_xn, stride_xc, stride_xl, c_inside & inside)
    center = tl.sum(pilot, 1, keep_dims=True) / tl.sum(inside.to(tl.float32), 1, keep_dims=True)

    count = tl.zeros((1, BLOCK_L), tl.float32)
    total = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for t in range(first, end):
        n, position, inside = image_rows(t, length, INT64, BLOCK_L)
        x = load_tile(x_ptr, n, c, position, stride_xn, stride_xc, stride_xl, c_inside & inside)
        deviation = tl.where(inside, x - center, 0.0)
        count += inside.to(tl.float32)
        total += deviation
        squares += deviation * deviation

    count = tl.sum(count, 1, keep_dims=True)
    total = tl.sum(total, 1, keep_dims=True)
    squares = tl.sum(squares, 1, keep_dims=True)
    shift = total / count
    row_ptr = partial_ptr + tl.program_id(1) * 3 * channels + c
    tl.store(row_ptr, count + tl.zeros((BLOCK_C, 1), tl.float32), mask=c_inside)
    tl.store(row_ptr + channels, center + shift, mask=c_inside)
    tl.store(row_ptr + 2 * channels, squares - total * shift, mask=c_inside)


@triton.jit
def _merge_statistics_kernel(
    partial_ptr,  # [splits, 3, channels]
    mean_ptr,  # [channels]
    invstd_ptr,  # [channels]
    eps,
    splits,
    channels,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean and 1/√(variance + eps) from the splits' statistics (Chan, Golub and LeVeque, 1983)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    c_inside = c < channels
    center = tl.load(partial_ptr + channels + c, mask=c_inside, other=0.0)
    s = tl.arange(0, BLOCK_S)[:, None]
    count = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, splits, BLOCK_S):
        inside = (start + s < splits) & c_inside
        row_ptr = partial_ptr + (start + s) * 3 * channels + c
        weight = tl.load(row_ptr, mask=inside, other=0.0)
        deviation = tl.load(row_ptr + channels, mask=inside, other=0.0) - center
        deviation = tl.where(inside, deviation, 0.0)
        count += weight
        total += weight * deviation
        squares += tl.load(row_ptr + 2 * channels, mask=inside, other=0.0)
        squares += weight * deviation * deviation
    count = tl.maximum(tl.sum(count, 0, keep_dims=True), 1.0)  # columns beyond have none
    total = tl.sum(total, 0, keep_dims=True)
    shift = total / count
    variance = (tl.sum(squares, 0, keep_dims=True) - total * shift) / count
    variance = tl.where(variance < 0, 0.0, variance)  # by rounding; NaN stays
    tl.store(mean_ptr + c, center + shift, mask=c_inside)
    tl.store(invstd_ptr + c, tl.div_rn(1.0, tl.sqrt_rn(variance + eps)), mask=c_inside)


# ----------------------------------------------------------------------------------- launchers


def channel_sum(x: torch.Tensor) -> torch.Tensor:
    """``nnarch::channel_sum``."""
    check_dtype("channel_sum", x)
    return _channel_sum(x, None)


def sum_channels(x: torch.Tensor) -> torch.Tensor:
    """:func:`channel_sum` in float32."""
    return _channel_sum(x, None, torch.float32)


def channel_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``nnarch::channel_dot``."""
    check_dtype("channel_dot", a, b)
    return _channel_sum(a, b)


def _channel_sum(
    a: torch.Tensor, b: torch.Tensor | None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    out = a.new_empty(a.shape[1], dtype=dtype)
    if a.numel() == 0:
        return out.zero_()
    a_view, b_view = as_ncl(a, b)
    arguments = {
        "a_ptr": a_view,
        "b_ptr": b_view,
        **named_strides("a", "ncl", a_view),
        **named_strides("b", "ncl", b_view),
    }
    with device_guard(a):
        partial = first_stage(_channel_sum_kernel, arguments, a_view, 1, b_view)
        merge_sums(partial, out)
    return out


def statistics(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and 1/√(variance + eps) per channel of `x`, which is not empty; float32."""
    mean, invstd = statistic(x), statistic(x)
    (view,) = as_ncl(x)
    arguments = {"x_ptr": view, **named_strides("x", "ncl", view)}
    partial = first_stage(_statistics_kernel, arguments, view, 3)
    channels = x.shape[1]
    arguments = {
        **{"partial_ptr": partial, "mean_ptr": mean, "invstd_ptr": invstd},
        **{"eps": float(eps), "splits": partial.shape[0], "channels": channels},
    }
    launch(
        _merge_statistics_kernel, flat_grid(cdiv(channels, _MERGE["BLOCK_C"])), arguments, _MERGE
    )
    return mean, invstd


def first_stage(
    kernel: Any,
    arguments: dict[str, Any],
    view: torch.Tensor,
    count: int,
    *others: torch.Tensor | None,
) -> torch.Tensor:
    """Launch the first stage of a reduction.

    Args:
        kernel: takes `arguments`, and partial_ptr, channels, length, row_tiles, per_split, INT64.
        arguments: its tensors and their strides.
        view: [N, C, L], what the reduction runs over.
        count: numbers that it yields for each channel.
        others: further tensors that it addresses.

    Returns:
        [splits, count, C] float32.
    """
    chosen = blocks(view)
    row_tiles, per_split, splits = reduction_grid(view, chosen)
    channels, length = view.shape[1:]
    partial = torch.empty((splits, count, channels), dtype=torch.float32, device=view.device)
    arguments = arguments | {
        "partial_ptr": partial,
        **{"channels": channels, "length": length},
        **{"row_tiles": row_tiles, "per_split": per_split},
        "INT64": needs_int64(view, *others),
    }
    launch(kernel, (cdiv(channels, chosen["BLOCK_C"]), splits), arguments, chosen)
    return partial


def merge_sums(partial: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of `partial` [splits, …] over the splits to `out` […].

    Args:
        partial: float32; dense behind its first dimension.
        out: dense.
    """
    splits, width = partial.shape[0], out.numel()
    arguments = {
        **{"partial_ptr": partial, "out_ptr": out},
        **{"splits": splits, "width": width, "stride_ps": partial.stride(0)},
    }
    launch(_merge_sums_kernel, flat_grid(cdiv(width, _MERGE["BLOCK_C"])), arguments, _MERGE)
