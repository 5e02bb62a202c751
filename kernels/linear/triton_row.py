"""The linear layer of one row: a matrix-vector product at memory bandwidth."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.epilogue import write_tile
from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides, needs_int64
from nnarch.kernels.gpu.matmul import precision_of
from nnarch.kernels.gpu.targets import Target
from nnarch.kernels.gpu.tiles import Problem, Tile, TileTable, always_fits, pick, tile


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
    dict.fromkeys(("half", "ieee"), _ONE_ROW_TILES),
    _row_cost,
    always_fits,
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


def one_row(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, epilogue: dict[str, Any]
) -> None:
    """As :func:`triton_product.product` for M = 1."""
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
