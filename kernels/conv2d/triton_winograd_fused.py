"""Winograd F(2×2, 3×3) in one kernel: transforms and products on chip, nothing between in memory.

A program holds the products of all 16 points for BLOCK_M tiles by BLOCK_N channels in registers.
Each step it reads the 4 × 4 pixels of its tiles for BLOCK_K channels, transforms them, and
multiplies the 16 pairs of matrices at once, as one product with a batch dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch.kernels.conv2d.triton_winograd_points import (
    beyond,
    square,
    transform,
    winograd,
)
from nnarch.kernels.gpu.epilogue import write_tile
from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides, needs_int64
from nnarch.kernels.gpu.matmul import grouped_order
from nnarch.kernels.gpu.targets import Target
from nnarch.kernels.gpu.tiles import (
    ALL_REGISTERS,
    Problem,
    Tile,
    TileTable,
    always_fits,
    pick,
    tile,
)


@triton.jit
def _join_halves(values):
    """Joins pairs that lie half of the tuple apart: their bit of the index becomes a last axis."""
    half: tl.constexpr = len(values) // 2
    joined = ()
    for i in tl.static_range(half):
        joined = joined + (tl.join(values[i], values[i + half]),)
    return joined


@triton.jit
def _stack(values, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tuple of 16 [BLOCK_M, BLOCK_K] as one [16, BLOCK_M, BLOCK_K]."""
    joined = _join_halves(_join_halves(_join_halves(_join_halves(values))))
    return tl.reshape(tl.permute(joined[0], (2, 3, 4, 5, 0, 1)), (16, BLOCK_M, BLOCK_K))


@triton.jit
def _coefficients(MATRIX: tl.constexpr, row: tl.constexpr, index):
    """MATRIX[row][index], of four columns."""
    low = tl.where(index == 0, MATRIX[row][0], MATRIX[row][1])
    high = tl.where(index == 2, MATRIX[row][2], MATRIX[row][3])
    return tl.where(index < 2, low, high)


@triton.jit
def _winograd_fused_kernel(
    x_ptr,  # [N, C, H, W], any strides
    u_ptr,  # [16, groups, C_STORED, K_STORED] float32, contiguous: the transformed weight
    y_ptr,  # [N, K, OH, OW], any strides
    bias_ptr,  # [K] each, or None
    scale_ptr,
    shift_ptr,
    residual_ptr,  # as y, or None
    alpha,
    TILES,  # N·TILES_H·TILES_W
    TILES_H,
    TILES_W,
    H,
    W,
    OH,
    OW,
    C_GROUP,
    K_GROUP,
    C_STORED,  # channels in u, rounded up to 16
    K_STORED,
    groups,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yk,
    stride_yh,
    stride_yw,
    stride_rn,
    stride_rk,
    stride_rh,
    stride_rw,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    INPUT: tl.constexpr,  # matrices
    OUTPUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_M tiles of 2×2 outputs by BLOCK_N channels of one group.
    tiles_m, tiles_n = tl.cdiv(TILES, BLOCK_M), tl.cdiv(K_GROUP, BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = grouped_order(pid % (tiles_m * tiles_n), tiles_m, tiles_n, 8)
    group = pid // (tiles_m * tiles_n)
    t = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    t_inside = t < TILES
    n, h, w = t // (TILES_H * TILES_W), t // TILES_W % TILES_H * 2, t % TILES_W * 2
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    u_mask = (k < K_STORED)[None, None, :]
    lane = tl.arange(0, BLOCK_K)
    point = tl.arange(0, 16)
    if INT64:
        n, h, k, lane = n.to(tl.int64), h.to(tl.int64), k.to(tl.int64), lane.to(tl.int64)
        group = group.to(tl.int64)
    x_ptr += group * C_GROUP * stride_xc
    if INT64:
        point = point.to(tl.int64)
    u_row = (point * groups + group)[:, None, None] * (C_STORED * K_STORED) + k[None, None, :]

    # From here on a step is described by two numbers a thread: where its pixels start, and which of
    # them exist. What the next step needs is on its way while this one multiplies.
    outside = tl.where(t_inside, beyond(h - PAD_H, w - PAD_W, H, W, 4), -1)[:, None]
    pixel = n * stride_xn + (h - PAD_H) * stride_xh + (w - PAD_W) * stride_xw
    missing = tl.where((lane < C_GROUP)[None, :], outside, -1)
    offset = pixel[:, None] + (lane * stride_xc)[None, :]
    pixels = square(x_ptr, offset, missing, stride_xh, stride_xw, 4)
    acc = tl.zeros((16, BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C_GROUP, BLOCK_K):
        c = start + lane
        u = tl.load(u_ptr + u_row + (c * K_STORED)[None, :, None], mask=u_mask, other=0.0)
        a = _stack(transform(pixels, INPUT), BLOCK_M, BLOCK_K)
        c += BLOCK_K
        missing = tl.where((c < C_GROUP)[None, :], outside, -1)
        offset = pixel[:, None] + (c * stride_xc)[None, :]
        pixels = square(x_ptr, offset, missing, stride_xh, stride_xw, 4)
        acc = tl.dot(a, u, acc, input_precision="ieee")

    for i in tl.static_range(2):
        for j in tl.static_range(2):
            of_row = _coefficients(OUTPUT, i, point // 4)
            of_column = _coefficients(OUTPUT, j, point % 4)
            out = tl.sum(acc * (of_row * of_column)[:, None, None], axis=0)
            write_tile(
                out,
                y_ptr,
                n * stride_yn + (h + i) * stride_yh + (w + j) * stride_yw,
                stride_yk,
                residual_ptr,
                n * stride_rn + (h + i) * stride_rh + (w + j) * stride_rw,
                stride_rk,
                t_inside & (h + i < OH) & (w + j < OW),
                group * K_GROUP + tile_n * BLOCK_N,
                (group + 1) * K_GROUP,
                bias_ptr,
                scale_ptr,
                shift_ptr,
                alpha,
                ACTIVATION,
                BLOCK_N,
                INT64,
            )


# Before 3.9, Triton multiplies no fewer than 16 float32 channels at a time.
_STEP = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 16

_FUSED_TILES = (
    tile(8, 2, registers=ALL_REGISTERS, BLOCK_M=32, BLOCK_N=32, BLOCK_K=_STEP),
    tile(4, 2, registers=ALL_REGISTERS, BLOCK_M=16, BLOCK_N=32, BLOCK_K=_STEP),
)
"""One pixel a thread and step. With two of them the compiler lays the transformed tile out so that
operands load 4 bytes at a time (259 loads for 1024 multiply-adds instead of 64 for 512)."""


def _cost(problem: Problem, tile: Tile, target: Target) -> float:
    """Whole waves of programs, and each tile's traffic of weights as in matmul_cost."""
    m, n = tile["BLOCK_M"], tile["BLOCK_N"]
    waves = cdiv(cdiv(problem.m, m) * cdiv(problem.n, n), target.processors)
    intensity = m * n / (m + n)
    return waves * m * n * (intensity + 24) / intensity


FUSED = TileTable("winograd_fused", {"ieee": _FUSED_TILES}, _cost, always_fits)


def fused(x: torch.Tensor, u: torch.Tensor, y: torch.Tensor, pads, groups: int, epilogue) -> None:
    """y = epilogue(F(2×2, 3×3) of x with the transformed weights u).

    Args:
        x: [N, C, H, W], any strides; fastest with channels innermost.
        u: [16, groups, stored channels of x, stored channels of y] float32.
        y: [N, K, OH, OW], written.
        pads: (top, left); may be negative.
        groups: of the convolution.
        epilogue: the arguments bias_ptr, scale_ptr, shift_ptr, residual_ptr, alpha, ACTIVATION.
    """
    n, c, h, w = x.shape
    _, k, oh, ow = y.shape
    tiles_h, tiles_w = cdiv(oh, 2), cdiv(ow, 2)
    arguments = {
        **{"x_ptr": x, "u_ptr": u, "y_ptr": y},
        **epilogue,
        **{"TILES": n * tiles_h * tiles_w, "TILES_H": tiles_h, "TILES_W": tiles_w},
        **{"H": h, "W": w, "OH": oh, "OW": ow},
        **{"C_GROUP": c // groups, "K_GROUP": k // groups, "groups": groups},
        **{"C_STORED": u.shape[2], "K_STORED": u.shape[3]},
        **named_strides("x", "nchw", x),
        **named_strides("y", "nkhw", y),
        **named_strides("r", "nkhw", epilogue["residual_ptr"]),
        **{"PAD_H": pads[0], "PAD_W": pads[1]},
        **{"INPUT": winograd(2).input, "OUTPUT": winograd(2).output},
        "INT64": needs_int64(x, u, y, epilogue["residual_ptr"]),
    }

    def run(tile: Tile) -> None:
        tiles = cdiv(arguments["TILES"], tile["BLOCK_M"]) * cdiv(k // groups, tile["BLOCK_N"])
        launch(_winograd_fused_kernel, flat_grid(tiles * groups), arguments, tile)

    problem = Problem(m=n * tiles_h * tiles_w, n=k // groups, k=c // groups, precision="ieee")
    run(pick(FUSED, problem, run))
