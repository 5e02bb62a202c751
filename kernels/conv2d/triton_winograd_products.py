"""Winograd by way of memory: one product of matrices for each point of the transform."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides, needs_int64
from nnarch.kernels.gpu.matmul import grouped_order, matmul_fits, matmul_split, matmul_tiles
from nnarch.kernels.gpu.split import best_split
from nnarch.kernels.gpu.targets import Target
from nnarch.kernels.gpu.tiles import Problem, Tile, TileTable, pick

POINTS = 36
"""Of F(4×4, 3×3), the only one that goes this way."""

PART = 128
"""Terms that are added up before their sum joins the others. In one sum, F(4×4) rounds three times
as much at 1024 channels (README.md, measured on the CPU)."""


@triton.jit
def _winograd_products_kernel(
    a_ptr,  # [points, groups, ROWS, DEPTH] by strides, all in float32
    b_ptr,  # [points, groups, DEPTH, COLUMNS]
    out_ptr,  # [splits, points, groups, ROWS, COLUMNS]
    ROWS,
    COLUMNS,
    DEPTH,
    groups,
    depth_per_split,
    stride_ap,
    stride_ag,
    stride_ar,
    stride_ad,
    stride_bp,
    stride_bg,
    stride_bd,
    stride_bc,
    stride_os,
    stride_op,
    stride_og,
    stride_or,
    stride_oc,
    POINTS: tl.constexpr,
    PART: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_M rows by BLOCK_N columns of one point's product, for one group and one
    # part of the depth.
    tiles_m, tiles_n = tl.cdiv(ROWS, BLOCK_M), tl.cdiv(COLUMNS, BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = grouped_order(pid % (tiles_m * tiles_n), tiles_m, tiles_n, 8)
    pid = pid // (tiles_m * tiles_n)
    point, group, split = pid % POINTS, pid // POINTS % groups, pid // POINTS // groups
    point, group, split = point.to(tl.int64), group.to(tl.int64), split.to(tl.int64)

    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    row_inside, column_inside = (row < ROWS)[:, None], (column < COLUMNS)[None, :]
    if INT64:
        row, column, lane = row.to(tl.int64), column.to(tl.int64), lane.to(tl.int64)
    first = split * depth_per_split
    last = tl.minimum(first + depth_per_split, DEPTH)
    a_ptr += point * stride_ap + group * stride_ag + first * stride_ad
    b_ptr += point * stride_bp + group * stride_bg + first * stride_bd
    a_ptr += (row * stride_ar)[:, None] + (lane * stride_ad)[None, :]
    b_ptr += (lane * stride_bd)[:, None] + (column * stride_bc)[None, :]
    depth = (last - first).to(tl.int32)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, PART):
        part = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(start, tl.minimum(start + PART, depth), BLOCK_K):
            lane_inside = k + tl.arange(0, BLOCK_K) < depth
            a = tl.load(a_ptr, mask=row_inside & lane_inside[None, :], other=0.0)
            b = tl.load(b_ptr, mask=lane_inside[:, None] & column_inside, other=0.0)
            part = tl.dot(a, b, part, input_precision="ieee")
            a_ptr += BLOCK_K * stride_ad
            b_ptr += BLOCK_K * stride_bd
        acc += part

    out_ptr += split * stride_os + point * stride_op + group * stride_og
    out = out_ptr + (row * stride_or)[:, None] + (column * stride_oc)[None, :]
    tl.store(out, acc, mask=row_inside & column_inside)


def _cost(problem: Problem, tile: Tile, target: Target) -> float:
    """:func:`matmul_cost` for 36 products at once; a tile's rate is that of its compiled loop."""
    m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    programs = POINTS * cdiv(problem.m, m) * cdiv(problem.n, n)
    _, steps = best_split(programs, cdiv(problem.k, k), target.processors, (m, n, k))
    intensity = m * n / (m + n)
    return steps * m * n * k * (intensity + 24) / intensity


PRODUCTS = TileTable(
    "winograd_products",
    {"ieee": matmul_tiles((128, 64, 16, 8, 2), (64, 64, 16, 4, 2), (32, 64, 16, 4, 2))},
    _cost,
    matmul_fits,
)


def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a · b for each point and group: [points, groups, rows, columns].

    Args:
        a: [points, groups, rows, depth] float32, any strides.
        b: [points, groups, depth, columns] float32, any strides.
    """
    out = a.new_empty((*a.shape[:3], b.shape[3]))

    def run(tile: Tile) -> None:
        _launch(a, b, out.unsqueeze(0), 1, tile)

    run(pick(PRODUCTS, _problem(a, b), run))
    return out


def multiply_in_parts(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Parts of a · b that remain to be added: [parts, points, groups, rows, columns].

    For few rows and columns and a great depth, which is cut among programs.

    Args:
        a, b: as for :func:`multiply`.
    """
    points, groups, rows, depth = a.shape
    columns = b.shape[3]
    results = []

    def run(tile: Tile) -> None:
        programs = points * groups * cdiv(rows, tile["BLOCK_M"]) * cdiv(columns, tile["BLOCK_N"])
        splits = matmul_split(tile, programs, cdiv(depth, tile["BLOCK_K"]))
        out = a.new_empty((splits, points, groups, rows, columns))
        results[:] = [out]
        _launch(a, b, out, splits, tile)

    run(pick(PRODUCTS, _problem(a, b), run))
    return results[0]


def _problem(a: torch.Tensor, b: torch.Tensor) -> Problem:
    return Problem(m=a.shape[2], n=b.shape[3], k=a.shape[3], precision="ieee")


def _launch(a, b, out, splits: int, tile: Tile) -> None:
    points, groups, rows, depth = a.shape
    columns = b.shape[3]
    steps = cdiv(cdiv(depth, tile["BLOCK_K"]), splits)
    arguments = {
        **{"a_ptr": a, "b_ptr": b, "out_ptr": out, "groups": groups},
        **{"ROWS": rows, "COLUMNS": columns, "DEPTH": depth},
        "depth_per_split": steps * tile["BLOCK_K"],
        **named_strides("a", "pgrd", a),
        **named_strides("b", "pgdc", b),
        **named_strides("o", "spgrc", out),
        **{"POINTS": points, "PART": PART, "INT64": needs_int64(a[0, 0], b[0, 0], out[0, 0, 0])},
    }
    programs = cdiv(rows, tile["BLOCK_M"]) * cdiv(columns, tile["BLOCK_N"])
    launch(
        _winograd_products_kernel, flat_grid(programs * points * groups * splits), arguments, tile
    )
