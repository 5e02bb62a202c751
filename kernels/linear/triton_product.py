"""The tiled product of the linear layer, with the epilogue on its accumulators."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.epilogue import write_tile
from nnarch.kernels.gpu.launch import (
    cdiv,
    dot_precision,
    flat_grid,
    launch,
    named_strides,
    needs_int64,
)
from nnarch.kernels.gpu.matmul import (
    MATMUL,
    grouped_order,
    loads_vectors,
    matmul_cost,
    matmul_fits,
    matmul_split,
    matmul_tiles,
    precision_of,
)
from nnarch.kernels.gpu.split import finish_split
from nnarch.kernels.gpu.tiles import Problem, Tile, TileTable, pick

SMALL_M = 32
"""Up to this many rows the operands are swapped."""

FEW_ROWS = TileTable(
    "linear_few_rows",
    {
        "half": matmul_tiles(
            (16, 64, 128, 4, 4),
            (16, 128, 64, 4, 4),
            (16, 64, 64, 4, 6),
            (16, 64, 64, 4, 4),
            (32, 128, 64, 4, 3),
            (32, 64, 64, 4, 3),
            (32, 64, 32, 4, 2),
        ),
        "tf32": matmul_tiles(
            (16, 128, 32, 4, 4),
            (16, 64, 32, 4, 4),
            (32, 64, 32, 4, 3),
            (32, 64, 16, 4, 2),
        ),
        "tf32x3": matmul_tiles((16, 64, 32, 4, 4), (32, 64, 32, 4, 3), (32, 64, 32, 8, 2)),
        "ieee": matmul_tiles((16, 64, 32, 4, 2), (32, 64, 16, 4, 2)),
    },
    matmul_cost,
    matmul_fits,
)


@triton.jit
def _linear_fwd_kernel(
    x_ptr,  # [M, C], any strides
    w_ptr,  # [K, C], any strides
    y_ptr,  # [M, K]
    partial_ptr,  # [splits, M, K] float32, or None where the reduction is not split
    bias_ptr,  # [K] each, or None
    scale_ptr,
    shift_ptr,
    residual_ptr,  # [M, K] any strides, or None
    alpha,
    M,
    K,
    C,
    x_rows,  # M, C and K rounded up in memory, where `product` says so; else None
    x_columns,
    y_columns,
    steps,
    steps_per_split,
    stride_xm,
    stride_xc,
    stride_wk,
    stride_wc,
    stride_ym,
    stride_yk,
    stride_rm,
    stride_rk,
    ACTIVATION: tl.constexpr,
    SWAP: tl.constexpr,  # accumulate the transposed tile, features by rows
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = grouped_order(pid % (tiles_m * tiles_n), tiles_m, tiles_n, 8)
    split = pid // (tiles_m * tiles_n)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_inside, k_inside = m < M, k < K
    x_inside = m_inside if x_rows is None else m < x_rows
    lane = tl.arange(0, BLOCK_K)
    if INT64:
        m, k, lane = m.to(tl.int64), k.to(tl.int64), lane.to(tl.int64)

    x_row, w_row = m * stride_xm, k * stride_wk
    if SWAP:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    last = tl.minimum((split + 1) * steps_per_split, steps)
    for step in range(split * steps_per_split, last):
        c = step * BLOCK_K + lane
        c_inside = c < C
        x_c_inside = c_inside if x_columns is None else c < x_columns
        if SWAP:
            w_offset = w_row[:, None] + (c * stride_wc)[None, :]
            x_offset = (c * stride_xc)[:, None] + x_row[None, :]
            a = tl.load(w_ptr + w_offset, mask=k_inside[:, None] & c_inside[None, :], other=0.0)
            b = tl.load(x_ptr + x_offset, mask=x_c_inside[:, None] & x_inside[None, :], other=0.0)
        else:
            x_offset = x_row[:, None] + (c * stride_xc)[None, :]
            w_offset = (c * stride_wc)[:, None] + w_row[None, :]
            a = tl.load(x_ptr + x_offset, mask=x_inside[:, None] & x_c_inside[None, :], other=0.0)
            b = tl.load(w_ptr + w_offset, mask=c_inside[:, None] & k_inside[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    if SWAP:
        acc = tl.trans(acc)

    if partial_ptr is not None:
        part = (split.to(tl.int64) * M + m)[:, None] * K + k[None, :]
        tl.store(partial_ptr + part, acc, mask=m_inside[:, None] & k_inside[None, :])
    else:
        write_tile(
            acc,
            y_ptr,
            m * stride_ym,
            stride_yk,
            residual_ptr,
            m * stride_rm,
            stride_rk,
            m_inside,
            tile_n * BLOCK_N,
            K if y_columns is None else y_columns,
            bias_ptr,
            scale_ptr,
            shift_ptr,
            alpha,
            ACTIVATION,
            BLOCK_N,
            INT64,
        )


def product(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, epilogue: dict[str, Any]
) -> None:
    """y = act(scale·(x·weightᵀ + bias) + shift + residual) for two rows or more.

    A mask that ends at an odd extent makes every element a load or a store of its own. So x may
    have more rows than y and more columns than the weight (zeros), and y more columns than the
    weight has rows (no result): with these rounded up to 16, 16 bytes are moved at a time.

    Args:
        x, weight, y: [M, C], [K, C] and [M, K]; y is written.
        epilogue: the kernel's arguments bias_ptr, scale_ptr, shift_ptr, residual_ptr ([M, K], all
            as wide as y), alpha and ACTIVATION.
    """
    m, (k, c) = y.shape[0], weight.shape
    in_memory = (*x.shape, y.shape[1])
    rounded = in_memory if in_memory != (m, c, k) else (None, None, None)
    precision = dot_precision("matmul")
    swap = m <= SMALL_M
    problem = Problem(
        m,
        k,
        c,
        precision_of(x.dtype, precision),
        vectors=reads_vectors(x) and reads_vectors(weight),
    )
    arguments = {
        **{"x_ptr": x, "w_ptr": weight, "y_ptr": y, "M": m, "K": k, "C": c},
        **dict(zip(("x_rows", "x_columns", "y_columns"), rounded, strict=True)),
        **epilogue,
        **named_strides("x", "mc", x),
        **named_strides("w", "kc", weight),
        **named_strides("y", "mk", y),
        **named_strides("r", "mk", epilogue["residual_ptr"]),
        "SWAP": swap,
        "INT64": needs_int64(x, weight, y, epilogue["residual_ptr"]),
        "PRECISION": precision,
    }

    def run(tile: Tile) -> None:
        programs = cdiv(m, tile["BLOCK_M"]) * cdiv(k, tile["BLOCK_N"])
        steps = cdiv(c, tile["BLOCK_K"])
        splits = matmul_split(tile, programs, steps)
        partial = y.new_empty((splits, m, k), dtype=torch.float32) if splits > 1 else None
        split = {"partial_ptr": partial, "steps": steps, "steps_per_split": cdiv(steps, splits)}
        launch(_linear_fwd_kernel, flat_grid(programs * splits), arguments | split, tile)
        if partial is not None:
            _finish(partial, y, epilogue)

    run(pick(FEW_ROWS if swap else MATMUL, problem, run))


def _finish(partial, y, epilogue: dict[str, Any]) -> None:
    """The second stage, for which a row of the product is a pixel of a one-row image."""

    def as_image(matrix: torch.Tensor | None) -> torch.Tensor | None:
        return None if matrix is None else matrix.t()[None, :, None, :]

    residual = as_image(epilogue["residual_ptr"])
    finish_split(partial, as_image(y), epilogue | {"residual_ptr": residual})


def reads_vectors(matrix: torch.Tensor) -> bool:
    """Whether a matrix is read 16 bytes at a time along one of its dimensions."""
    rows, columns = matrix.shape
    along_columns = matrix.stride(1) == 1 and loads_vectors(columns, matrix.stride(0))
    along_rows = matrix.stride(0) == 1 and loads_vectors(rows, matrix.stride(1))
    return along_columns or along_rows
