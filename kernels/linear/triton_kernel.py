"""The fused linear layer on the GPU: act(scale·(x·weightᵀ + bias) + shift + residual).

Three kernels' worth of shapes: one row is a matrix-vector product at memory bandwidth; a few rows
multiply with the operands swapped, so that the features fill the 64 rows that matrix instructions
want; the rest is a tiled product. Operands are read by their strides, so the gradients, which are
products of transposed views, run here too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.epilogue import write_tile
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    dot_precision,
    flat_grid,
    launch,
    named_strides,
    needs_int64,
    vector,
)
from nnarch.kernels.gpu.matmul import (
    MATMUL,
    grouped_order,
    loads_vectors,
    matmul_cost,
    matmul_fits,
    matmul_tiles,
    precision_of,
)
from nnarch.kernels.gpu.split import finish_split, split_count
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.gpu.targets import Target
from nnarch.kernels.gpu.tiles import (
    Problem,
    Tile,
    TileTable,
    always_fits,
    pick,
    tile,
)

__all__ = ["STATIC_CASES", "linear", "linear_pack"]

SMALL_M = 32
"""Up to this many rows the operands are swapped."""

FEW_ROWS = TileTable(
    "linear_few_rows",
    {
        "half": matmul_tiles(
            (16, 128, 64, 4, 4),
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
        "ieee": matmul_tiles((16, 64, 32, 4, 2), (32, 64, 16, 4, 2)),
    },
    matmul_cost,
    matmul_fits,
)


def _row_cost(problem: Problem, tile: Tile, target: Target) -> float:
    """Tiles run along the dimension that is contiguous in memory (`vectors`: the reduction)."""
    along = tile["BLOCK_K"] >= tile["BLOCK_N"]
    programs = cdiv(problem.n, tile["BLOCK_N"])
    idle = max(1.0, target.processors / programs)
    return idle * (1.0 if along == problem.vectors else 8.0)


_ONE_ROW_TILES = (
    tile(BLOCK_N=16, BLOCK_K=512, num_warps=8),
    tile(BLOCK_N=8, BLOCK_K=512, num_warps=4),
    tile(BLOCK_N=4, BLOCK_K=512, num_warps=4),
    tile(BLOCK_N=128, BLOCK_K=32, num_warps=4),
    tile(BLOCK_N=64, BLOCK_K=32, num_warps=4),
)
ONE_ROW = TileTable(
    "linear_one_row",
    dict.fromkeys(("half", "tf32", "ieee"), _ONE_ROW_TILES),
    _row_cost,
    always_fits,
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
        if SWAP:
            w_offset = w_row[:, None] + (c * stride_wc)[None, :]
            x_offset = (c * stride_xc)[:, None] + x_row[None, :]
            a = tl.load(w_ptr + w_offset, mask=k_inside[:, None] & c_inside[None, :], other=0.0)
            b = tl.load(x_ptr + x_offset, mask=c_inside[:, None] & m_inside[None, :], other=0.0)
        else:
            x_offset = x_row[:, None] + (c * stride_xc)[None, :]
            w_offset = (c * stride_wc)[:, None] + w_row[None, :]
            a = tl.load(x_ptr + x_offset, mask=m_inside[:, None] & c_inside[None, :], other=0.0)
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
            K,
            bias_ptr,
            scale_ptr,
            shift_ptr,
            alpha,
            ACTIVATION,
            BLOCK_N,
            INT64,
        )


@triton.jit
def _linear_row_kernel(
    x_ptr,  # [C] at stride_xc
    w_ptr,  # [K, C], any strides
    y_ptr,  # [K] at stride_yk
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    alpha,
    K,
    C,
    stride_xc,
    stride_wk,
    stride_wc,
    stride_yk,
    stride_rk,
    ACTIVATION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row: every weight is read once, so there is nothing to tile for but bandwidth."""
    first = tl.program_id(0) * BLOCK_N
    k = first + tl.arange(0, BLOCK_N)
    k_inside = k < K
    lane = tl.arange(0, BLOCK_K)
    if INT64:
        k, lane = k.to(tl.int64), lane.to(tl.int64)
    products = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, C, BLOCK_K):
        c = start + lane
        c_inside = c < C
        x = tl.load(x_ptr + c * stride_xc, mask=c_inside, other=0.0).to(tl.float32)
        offset = (k * stride_wk)[:, None] + (c * stride_wc)[None, :]
        w = tl.load(w_ptr + offset, mask=k_inside[:, None] & c_inside[None, :], other=0.0)
        products += w.to(tl.float32) * x[None, :]
    acc = tl.sum(products, axis=1)[None, :]
    row = tl.zeros((1,), tl.int32)
    write_tile(
        acc,
        y_ptr,
        row,
        stride_yk,
        residual_ptr,
        row,
        stride_rk,
        row == 0,
        first,
        K,
        bias_ptr,
        scale_ptr,
        shift_ptr,
        alpha,
        ACTIVATION,
        BLOCK_N,
        INT64,
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    packed: torch.Tensor | None,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """nnarch::linear on a GPU; `packed` is a CPU matter and not read."""
    check_dtype("linear", x, weight, residual)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if y.numel() == 0:
        return y
    m = math.prod(x.shape[:-1])
    rows, out = x.reshape(m, x.shape[-1]), y.view(m, y.shape[-1])
    residual = residual.reshape(out.shape) if residual is not None else None
    epilogue = {
        "bias_ptr": vector(bias),
        "scale_ptr": vector(scale),
        "shift_ptr": vector(shift),
        "residual_ptr": residual,
        "alpha": float(alpha),
        "ACTIVATION": activation,
    }
    with device_guard(x):
        if m == 1:
            _one_row(rows, weight, out, epilogue)
        else:
            _product(rows, weight, out, epilogue)
    return y


def _one_row(x, weight, y, epilogue: dict[str, Any]) -> None:
    residual = epilogue["residual_ptr"]
    k, c = weight.shape
    problem = Problem(1, k, c, precision_of(x.dtype, "ieee"), vectors=weight.stride(1) == 1)
    arguments = {
        **{"x_ptr": x, "w_ptr": weight, "y_ptr": y, "K": k, "C": c},
        **epilogue,
        "stride_xc": x.stride(1),
        **named_strides("w", "kc", weight),
        "stride_yk": y.stride(1),
        "stride_rk": 0 if residual is None else residual.stride(1),
        "INT64": needs_int64(x, weight, residual),
    }

    def run(tile: Tile) -> None:
        launch(_linear_row_kernel, flat_grid(cdiv(k, tile["BLOCK_N"])), arguments, tile)

    run(pick(ONE_ROW, problem, run))


def _product(x, weight, y, epilogue: dict[str, Any]) -> None:
    m, c = x.shape
    k = weight.shape[0]
    precision = dot_precision("matmul")
    swap = m <= SMALL_M
    problem = Problem(
        m, k, c, precision_of(x.dtype, precision), vectors=_vectors(x) and _vectors(weight)
    )
    arguments = {
        **{"x_ptr": x, "w_ptr": weight, "y_ptr": y, "M": m, "K": k, "C": c},
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
        splits = split_count(programs, steps)
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


def _vectors(matrix: torch.Tensor) -> bool:
    """Whether a matrix is read 16 bytes at a time along one of its dimensions."""
    rows, columns = matrix.shape
    along_columns = matrix.stride(1) == 1 and loads_vectors(columns, matrix.stride(0))
    along_rows = matrix.stride(0) == 1 and loads_vectors(rows, matrix.stride(1))
    return along_columns or along_rows


def linear_pack(weight: torch.Tensor) -> torch.Tensor:
    """An empty tensor: the GPU kernels read the weight as it is."""
    return weight.new_empty(0)


def _case(name: str, m: int, c: int, k: int, transposed: bool = False) -> StaticCase:
    def run(dtype: torch.dtype) -> torch.Tensor:
        weight, b = meta(k, c, dtype=dtype), meta(k, dtype=dtype)
        if transposed:
            weight = meta(c, k, dtype=dtype).t()
        return linear(
            meta(m, c, dtype=dtype), weight, b, b, b, meta(m, k, dtype=dtype), None, 7, 0.0
        )

    return StaticCase(
        f"linear {name} {m}×{c}×{k}",
        run,
        flops=2.0 * m * c * k,
        elements=m * c + k * c + 2 * m * k,
        matrix=m > 1,
    )


STATIC_CASES = [
    _case("forward", 8192, 4096, 4096),
    _case("input gradient", 8192, 4096, 4096, transposed=True),
    _case("few rows", 16, 4096, 16384),
    _case("one row", 1, 4096, 16384),
]
"""What bench/static_gpu.py compiles."""
