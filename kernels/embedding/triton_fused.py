"""The input layer of a Transformer on the GPU: a program sums, normalizes and drops whole rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nnarch.kernels.dropout.reference import survivor_scale, threshold
from nnarch.kernels.gpu.dropout import keep_tile
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    flat_grid,
    launch,
    needs_int64,
)
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.gpu.tiles import Tile, tile

MOST_COLUMNS = 8192
_ADD = tile(ROWS=128, BLOCK_C=8, num_warps=4)
_PARTS = 512  # programs of the backward, each with its part of the vectors' gradients


@triton.jit
def _row_of(table_ptr, at, rows, C, column, inside, INT64: tl.constexpr):
    """Row `at` of a table as float32; NaN where there is no such row."""
    if INT64:
        at = at.to(tl.int64)
    at += tl.zeros_like(column)  # a scalar condition is no mask to the interpreter
    known = (at >= 0) & (at < rows)
    return tl.load(table_ptr + at * C + column, mask=inside & known, other=float("nan")).to(
        tl.float32
    )


@triton.jit
def _sum_of(
    row, column, inside, ids_ptr, weight_ptr, position_weight_ptr, positions_ptr,
    segment_weight_ptr, segments_ptr, scale, offset, length, V, P, G, C, INT64: tl.constexpr,
):  # fmt: skip
    """scale·token + position + segment of a row."""
    x = _row_of(weight_ptr, tl.load(ids_ptr + row), V, C, column, inside, INT64) * scale
    if position_weight_ptr is not None:
        at = (offset + row % length).to(tl.int64)
        if positions_ptr is not None:
            at = tl.load(positions_ptr + row).to(tl.int64)
        x += _row_of(position_weight_ptr, at, P, C, column, inside, INT64)
    if segment_weight_ptr is not None:
        at = tl.load(segments_ptr + row)
        x += _row_of(segment_weight_ptr, at, G, C, column, inside, INT64)
    return x


@triton.jit
def _kept(seed_ptr, row, threshold, keep_scale, BLOCK_C: tl.constexpr):
    """0 or the scale for each column of a row."""
    rows = row + tl.zeros((1,), tl.int32)
    kept = keep_tile(tl.load(seed_ptr), tl.program_id(0) * 0, rows, 0, threshold, BLOCK_C)
    return tl.where(tl.reshape(kept, (BLOCK_C,)), keep_scale, 0.0)


@triton.jit
def _embedding_sum_fwd_kernel(
    ids_ptr,
    weight_ptr,  # [V, C]
    position_weight_ptr,  # [P, C] or None
    positions_ptr,  # or None: offset + row % length
    segment_weight_ptr,  # [G, C] or None
    segments_ptr,
    gamma_ptr,  # [C] each, or None
    beta_ptr,
    seed_ptr,  # or None: nothing is dropped
    y_ptr,  # [rows, C]
    mean_ptr,  # [rows] each, float32; None without normalization
    invstd_ptr,
    scale,
    offset,
    length,
    V,
    P,
    G,
    C,
    eps,
    threshold,
    keep_scale,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_C)
    inside = column < C
    # fmt: off
    x = _sum_of(
        row, column, inside, ids_ptr, weight_ptr, position_weight_ptr, positions_ptr,
        segment_weight_ptr, segments_ptr, scale, offset, length, V, P, G, C, INT64,
    )
    # fmt: on
    if mean_ptr is not None:
        mean = tl.sum(tl.where(inside, x, 0.0), axis=0) / C
        centred = tl.where(inside, x - mean, 0.0)
        invstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
        tl.store(mean_ptr + row, mean)
        tl.store(invstd_ptr + row, invstd)
        x = centred * invstd
        if gamma_ptr is not None:
            x *= tl.load(gamma_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if beta_ptr is not None:
            x += tl.load(beta_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        x *= _kept(seed_ptr, row, threshold, keep_scale, BLOCK_C)
    start = row
    if INT64:
        start = row.to(tl.int64)
    tl.store(y_ptr + start * C + column, x.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _embedding_sum_bwd_kernel(
    grad_ptr,  # [rows, C], dense
    ids_ptr,
    weight_ptr,
    position_weight_ptr,
    positions_ptr,
    segment_weight_ptr,
    segments_ptr,
    gamma_ptr,
    seed_ptr,
    mean_ptr,
    invstd_ptr,
    dx_ptr,  # [rows, C]
    parts_ptr,  # [2, programs, C] float32: gradients of gamma and beta
    scale,
    offset,
    length,
    V,
    P,
    G,
    C,
    threshold,
    keep_scale,
    rows,
    rows_each,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    column = tl.arange(0, BLOCK_C)
    inside = column < C
    d_gamma = tl.zeros((BLOCK_C,), tl.float32)
    d_beta = tl.zeros((BLOCK_C,), tl.float32)
    for row in range(pid * rows_each, tl.minimum((pid + 1) * rows_each, rows)):
        # fmt: off
        x = _sum_of(
            row, column, inside, ids_ptr, weight_ptr, position_weight_ptr, positions_ptr,
            segment_weight_ptr, segments_ptr, scale, offset, length, V, P, G, C, INT64,
        )
        # fmt: on
        invstd = tl.load(invstd_ptr + row)
        x = tl.where(inside, (x - tl.load(mean_ptr + row)) * invstd, 0.0)
        start = row
        if INT64:
            start = tl.zeros((), tl.int64) + row
        g = tl.load(grad_ptr + start * C + column, mask=inside, other=0.0).to(tl.float32)
        if seed_ptr is not None:
            g *= _kept(seed_ptr, row, threshold, keep_scale, BLOCK_C)
        d_gamma += g * x
        d_beta += g
        if gamma_ptr is not None:
            g *= tl.load(gamma_ptr + column, mask=inside, other=0.0).to(tl.float32)
        along_x = tl.sum(g * x, axis=0) / C
        dx = (g - tl.sum(g, axis=0) / C - x * along_x) * invstd
        tl.store(dx_ptr + start * C + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    part = pid * C + column
    tl.store(parts_ptr + part, d_gamma, mask=inside)
    tl.store(parts_ptr + tl.num_programs(0) * C + part, d_beta, mask=inside)


@triton.jit
def _add_parts_kernel(
    parts_ptr,  # [2, count, C] float32
    d_gamma_ptr,  # [C] each
    d_beta_ptr,
    count,
    C,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Adds the programs' parts, in an order that their number decides."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < C
    d_gamma = tl.zeros((ROWS, BLOCK_C), tl.float32)
    d_beta = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for first in range(0, count, ROWS):
        part = first + tl.arange(0, ROWS)
        there = (part < count)[:, None] & inside[None, :]
        at = (part * C)[:, None] + column[None, :]
        d_gamma += tl.load(parts_ptr + at, mask=there, other=0.0)
        d_beta += tl.load(parts_ptr + count * C + at, mask=there, other=0.0)
    d_gamma, d_beta = tl.sum(d_gamma, axis=0), tl.sum(d_beta, axis=0)
    tl.store(d_gamma_ptr + column, d_gamma.to(d_gamma_ptr.dtype.element_ty), mask=inside)
    tl.store(d_beta_ptr + column, d_beta.to(d_beta_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------- launchers


def _dense(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.contiguous()


def _row_tile(columns: int) -> Tile:
    block = max(16, triton.next_power_of_2(columns))
    return tile(BLOCK_C=block, num_warps=min(8, max(1, block // 256)))


def _tables(
    op: str, tokens, weight, position_weight, positions, segment_weight, segments,
    scale: float, offset: int, seed, dropout_p: float,
) -> dict[str, Any]:  # fmt: skip
    """The arguments that both kernels have."""
    check_dtype(op, weight, position_weight, segment_weight)
    columns = weight.shape[1]
    if columns > MOST_COLUMNS:
        raise NotImplementedError(
            f"backend 'triton' lacks nnarch::{op} for more than {MOST_COLUMNS} columns"
        )
    length = tokens.shape[-1] if tokens.dim() else 1
    drops = seed is not None and dropout_p > 0
    return {
        **{"ids_ptr": tokens.contiguous(), "weight_ptr": weight.contiguous()},
        **{"position_weight_ptr": _dense(position_weight), "positions_ptr": _dense(positions)},
        **{"segment_weight_ptr": _dense(segment_weight), "segments_ptr": _dense(segments)},
        "seed_ptr": seed if drops else None,
        **{"scale": float(scale), "offset": offset, "length": max(1, length)},
        **{"V": weight.shape[0], "C": columns},
        "P": 0 if position_weight is None else position_weight.shape[0],
        "G": 0 if segment_weight is None else segment_weight.shape[0],
        "threshold": threshold(dropout_p) if drops else 0,
        "keep_scale": survivor_scale(dropout_p) if drops else 1.0,
    }


def embedding_sum(
    tokens, weight, position_weight, positions, segment_weight, segments, norm_weight,
    norm_bias, seed, scale: float, offset: int, padding_idx: int, normalize: bool,
    eps: float, dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """``nnarch::embedding_sum``."""
    arguments = _tables(
        "embedding_sum", tokens, weight, position_weight, positions, segment_weight, segments,
        scale, offset, seed, dropout_p,
    )  # fmt: skip
    rows, columns = tokens.numel(), weight.shape[1]
    y = weight.new_empty((*tokens.shape, columns))
    kept = rows if normalize else 0
    mean, invstd = (weight.new_empty(kept, dtype=torch.float32) for _ in range(2))
    arguments |= {
        **{"gamma_ptr": _dense(norm_weight), "beta_ptr": _dense(norm_bias), "y_ptr": y},
        "mean_ptr": mean if normalize else None,
        "invstd_ptr": invstd if normalize else None,
        **{"eps": float(eps), "INT64": needs_int64(weight, y)},
    }
    if y.numel() > 0:
        with device_guard(weight):
            launch(_embedding_sum_fwd_kernel, flat_grid(rows), arguments, _row_tile(columns))
    return y, mean, invstd


def embedding_sum_backward(
    grad, tokens, weight, position_weight, positions, segment_weight, segments, norm_weight,
    mean, invstd, seed, scale: float, offset: int, dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """``nnarch::embedding_sum_backward``."""
    arguments = _tables(
        "embedding_sum_backward", tokens, weight, position_weight, positions, segment_weight,
        segments, scale, offset, seed, dropout_p,
    )  # fmt: skip
    rows, columns = tokens.numel(), weight.shape[1]
    grad = grad.contiguous()
    dx = torch.empty_like(grad)
    d_gamma, d_beta = weight.new_zeros(columns), weight.new_zeros(columns)
    if grad.numel() == 0:
        return dx, d_gamma, d_beta
    each = cdiv(rows, _PARTS)
    programs = cdiv(rows, each)
    parts = grad.new_empty((2, programs, columns), dtype=torch.float32)
    arguments |= {
        **{"grad_ptr": grad, "gamma_ptr": _dense(norm_weight)},
        **{"mean_ptr": mean, "invstd_ptr": invstd, "dx_ptr": dx, "parts_ptr": parts},
        **{"rows": rows, "rows_each": each, "INT64": needs_int64(weight, grad)},
    }
    with device_guard(weight):
        launch(_embedding_sum_bwd_kernel, flat_grid(programs), arguments, _row_tile(columns))
        sums = {"parts_ptr": parts, "d_gamma_ptr": d_gamma, "d_beta_ptr": d_beta}
        sums |= {"count": programs, "C": columns}
        grid = flat_grid(cdiv(columns, _ADD["BLOCK_C"]))
        launch(_add_parts_kernel, grid, sums, _ADD)
    return dx, d_gamma, d_beta


# ------------------------------------------------------------------------------ static checks


def _problem(dtype: torch.dtype) -> tuple[Any, ...]:
    tokens = torch.empty(64, 128, dtype=torch.int64, device="meta")
    tables = [meta(n, 768, dtype=dtype) for n in (8192, 512, 2)]
    return tokens, tables[0], tables[1], None, tables[2], tokens


def _forward(dtype: torch.dtype) -> Any:
    v, seed = meta(768, dtype=dtype), torch.empty(1, dtype=torch.int64, device="meta")
    return embedding_sum(*_problem(dtype), v, v, seed, 1.0, 0, -1, True, 1e-5, 0.1)


def _backward(dtype: torch.dtype) -> Any:
    v, seed = meta(768, dtype=dtype), torch.empty(1, dtype=torch.int64, device="meta")
    grad, statistic = meta(64, 128, 768, dtype=dtype), meta(8192, dtype=torch.float32)
    return embedding_sum_backward(
        grad, *_problem(dtype), v, statistic, statistic, seed, 1.0, 0, 0.1
    )


_ELEMENTS = 8192.0 * 768

FUSED_CASES = [
    StaticCase(
        "embedding + norm + dropout 8192×768", _forward, flops=_ELEMENTS, elements=2 * _ELEMENTS
    ),
    StaticCase(
        "embedding + norm + dropout backward 8192×768",
        _backward,
        flops=_ELEMENTS,
        elements=3 * _ELEMENTS,
    ),
]
