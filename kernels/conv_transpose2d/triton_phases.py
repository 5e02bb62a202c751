"""The transposed convolution on the GPU: an implicit GEMM, phase by phase, with the epilogue.

It is the gradient of a convolution by its input, too: then x is the output's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from nnarch.kernels.conv2d.triton_gather import gather_dot, geometry, reduction_steps, takes_flat
from nnarch.kernels.gpu.epilogue import write_tile
from nnarch.kernels.gpu.launch import (
    cdiv,
    device_guard,
    dot_precision,
    flat_grid,
    launch,
    named_strides,
    needs_int64,
)
from nnarch.kernels.gpu.matmul import (
    MATMUL_TILES,
    channels_innermost,
    grouped_order,
    loads_channel_vectors,
    matmul_cost,
    matmul_fits,
    matmul_split,
    precision_of,
)
from nnarch.kernels.gpu.phases import first_tap, output_under, phase_start, pixels_in, tap_steps
from nnarch.kernels.gpu.split import NO_EPILOGUE, finish_split
from nnarch.kernels.gpu.tiles import Problem, Tile, TileTable, pick

# Beside a phase's geometry and the epilogue, accumulators of the other tiles would spill: 328 bytes
# of 128×256 on sm_90, 360 of 128×128 with 4 warps on sm_120.
_SPILLING = {(128, 256, 64), (128, 128, 32)}
PHASES_TILES = MATMUL_TILES | {
    "half": tuple(
        t
        for t in MATMUL_TILES["half"]
        if (t["BLOCK_M"], t["BLOCK_N"], t["BLOCK_K"]) not in _SPILLING
    )
}
PHASES = TileTable("phases", PHASES_TILES, matmul_cost, matmul_fits)


@triton.jit
def _conv_transpose2d_fwd_kernel(
    x_ptr,  # [N, C, H, W], any strides
    w_ptr,  # [C, K / groups, R, S], any strides
    y_ptr,  # [N, K, OH, OW], any strides
    partial_ptr,  # [splits, N·OH·OW, K] float32, or None where the reduction is not split
    bias_ptr,  # [K] each, or None
    scale_ptr,
    shift_ptr,
    residual_ptr,  # as y, or None
    alpha,
    M,  # pixels of the largest phase: N·⌈OH / STRIDE_H⌉·⌈OW / STRIDE_W⌉
    N,
    H,
    W,
    OH,
    OW,
    C_GROUP,
    K_GROUP,
    groups,
    splits,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wc,
    stride_wk,
    stride_wr,
    stride_ws,
    stride_yn,
    stride_yk,
    stride_yh,
    stride_yw,
    stride_rn,
    stride_rk,
    stride_rh,
    stride_rw,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TAP_STEP_H: tl.constexpr,  # STRIDE / gcd(STRIDE, DILATION)
    TAP_STEP_W: tl.constexpr,
    FLAT: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_M pixels of one phase (see phases.py) by BLOCK_N channels of one group.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(K_GROUP, BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = grouped_order(pid % (tiles_m * tiles_n), tiles_m, tiles_n, 8)
    group = pid // (tiles_m * tiles_n) % groups
    split = pid // (tiles_m * tiles_n) // groups % splits
    phase = pid // (tiles_m * tiles_n) // groups // splits
    phase_h, phase_w = phase // STRIDE_W, phase % STRIDE_W

    first_r = first_tap(phase_h, R, STRIDE_H, DILATION_H)
    first_s = first_tap(phase_w, S, STRIDE_W, DILATION_W)
    taps_h = (R - first_r + TAP_STEP_H - 1) // TAP_STEP_H
    taps_w = (S - first_s + TAP_STEP_W - 1) // TAP_STEP_W

    first_h = phase_start(phase_h, PAD_H, STRIDE_H)
    first_w = phase_start(phase_w, PAD_W, STRIDE_W)
    rows = tl.maximum(pixels_in(first_h, OH, STRIDE_H), 1)
    columns = tl.maximum(pixels_in(first_w, OW, STRIDE_W), 1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = m // columns // rows
    oh = m // columns % rows * STRIDE_H + first_h
    ow = m % columns * STRIDE_W + first_w
    m_inside = (n < N) & (oh < OH) & (ow < OW)
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_inside = k < K_GROUP
    if INT64:
        n, oh, k, group = n.to(tl.int64), oh.to(tl.int64), k.to(tl.int64), group.to(tl.int64)

    if FLAT:
        steps = tl.cdiv(taps_h * taps_w * C_GROUP, BLOCK_K)
    else:
        steps = taps_h * taps_w * tl.cdiv(C_GROUP, BLOCK_K)
    steps_per_split = tl.cdiv(steps, splits)
    acc = gather_dot(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        x_ptr + group * C_GROUP * stride_xc,
        w_ptr + group * C_GROUP * stride_wc + first_r * stride_wr + first_s * stride_ws,
        n * stride_xn,
        output_under(oh, first_r, PAD_H, STRIDE_H, DILATION_H, R),
        output_under(ow, first_s, PAD_W, STRIDE_W, DILATION_W, S),
        m_inside,
        k * stride_wk,
        k_inside,
        H,
        W,
        C_GROUP,
        taps_h,
        tl.maximum(taps_w, 1),
        -(TAP_STEP_H * DILATION_H // STRIDE_H),
        -(TAP_STEP_W * DILATION_W // STRIDE_W),
        split * steps_per_split,
        tl.minimum((split + 1) * steps_per_split, steps),
        stride_xc,
        stride_xh,
        stride_xw,
        stride_wc,
        stride_wr * TAP_STEP_H,
        stride_ws * TAP_STEP_W,
        FLAT,
        INT64,
        PRECISION,
        BLOCK_K,
    )
    if partial_ptr is not None:
        pixel = (n.to(tl.int64) * OH + oh) * OW + ow
        part = (split.to(tl.int64) * N * OH * OW + pixel)[:, None] * (groups * K_GROUP)
        inside = m_inside[:, None] & k_inside[None, :]
        tl.store(partial_ptr + part + (group * K_GROUP + k)[None, :], acc, mask=inside)
    else:
        write_tile(
            acc,
            y_ptr,
            n * stride_yn + oh * stride_yh + ow * stride_yw,
            stride_yk,
            residual_ptr,
            n * stride_rn + oh * stride_rh + ow * stride_rw,
            stride_rk,
            m_inside,
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


def by_phases(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    epilogue: dict[str, Any] = NO_EPILOGUE,
) -> None:
    """Write y = epilogue(x transposed with weight).

    Args:
        x: [N, C, H, W].
        weight: [C, K / groups, R, S].
        y: [N, K, OH, OW], of at least one element.
        stride, dilation: of rows and columns.
        padding: pixels taken off the top and the left of the output; further numbers are not read.
        groups: independent parts.
        epilogue: the arguments bias_ptr, scale_ptr, shift_ptr, residual_ptr, alpha, ACTIVATION.
    """
    n, _, oh, ow = y.shape
    c_group = x.shape[1] // groups
    _, k_group, r, s = weight.shape
    x = channels_innermost(x, c_group)
    weight = _reduced_channels_innermost(weight)
    precision = dot_precision("conv")
    m = n * cdiv(oh, stride[0]) * cdiv(ow, stride[1])
    taps = tap_steps(stride, dilation)
    phase_taps = cdiv(r, taps["TAP_STEP_H"]) * cdiv(s, taps["TAP_STEP_W"])
    problem = Problem(
        m=m,
        n=k_group,
        k=phase_taps * c_group,
        precision=precision_of(x.dtype, precision),
        vectors=loads_channel_vectors(x, c_group),
    )
    arguments = {
        **{"x_ptr": x, "w_ptr": weight, "y_ptr": y},
        **epilogue,
        **{"M": m, "N": n, "H": x.shape[2], "W": x.shape[3], "OH": oh, "OW": ow},
        **{"C_GROUP": c_group, "K_GROUP": k_group, "groups": groups},
        **named_strides("x", "nchw", x),
        **named_strides("w", "ckrs", weight),
        **named_strides("y", "nkhw", y),
        **named_strides("r", "nkhw", epilogue["residual_ptr"]),
        **geometry(r, s, stride, padding, dilation),
        **taps,
        "INT64": needs_int64(x, weight, y, epilogue["residual_ptr"]),
        "PRECISION": precision,
    }

    def run(tile: Tile) -> None:
        _launch(arguments, y, phase_taps, epilogue, tile)

    with device_guard(x):
        run(pick(PHASES, problem, run))


def _launch(arguments, y, phase_taps: int, epilogue, tile: Tile) -> None:
    """The kernel with `tile`, and the second stage where the reduction is split."""
    m, c_group, k_group = arguments["M"], arguments["C_GROUP"], arguments["K_GROUP"]
    phases = arguments["STRIDE_H"] * arguments["STRIDE_W"]
    groups = arguments["groups"]
    programs = groups * phases * cdiv(m, tile["BLOCK_M"]) * cdiv(k_group, tile["BLOCK_N"])
    steps = reduction_steps(phase_taps, c_group, tile["BLOCK_K"])
    splits = matmul_split(tile, programs, steps)
    partial = None
    if splits > 1:
        pixels = y.shape[0] * y.shape[2] * y.shape[3]
        partial = y.new_empty((splits, pixels, y.shape[1]), dtype=torch.float32)
    split = {
        **{"partial_ptr": partial, "splits": splits},
        "FLAT": takes_flat(c_group, tile["BLOCK_K"]),
    }
    launch(_conv_transpose2d_fwd_kernel, flat_grid(programs * splits), arguments | split, tile)
    if partial is not None:
        finish_split(partial, y, epilogue)


def _reduced_channels_innermost(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [C, K / groups, R, S] with C at stride 1, which is summed over."""
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
