"""The gradient of the convolution by its input on the GPU: an implicit GEMM, phase by phase."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.conv2d.triton_gather import gather_dot, geometry, reduction_steps, takes_flat
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    dot_precision,
    flat_grid,
    launch,
    named_strides,
    needs_int64,
)
from nnarch.kernels.gpu.matmul import (
    MATMUL,
    channels_innermost,
    grouped_order,
    loads_channel_vectors,
    matmul_split,
    precision_of,
)
from nnarch.kernels.gpu.phases import first_tap, output_under, phase_start, pixels_in, tap_steps
from nnarch.kernels.gpu.split import NO_EPILOGUE, finish_split
from nnarch.kernels.gpu.tiles import Problem, Tile, pick


@triton.jit
def _conv2d_bwd_dx_kernel(
    dy_ptr,  # [N, K, OH, OW], any strides
    w_ptr,  # [K, C / groups, R, S], any strides
    dx_ptr,  # [N, C, H, W], any strides
    partial_ptr,  # [splits, N·H·W, C] float32, or None where the reduction is not split
    M,  # pixels of the largest phase: N·⌈H / STRIDE_H⌉·⌈W / STRIDE_W⌉
    N,
    H,
    W,
    OH,
    OW,
    C_GROUP,
    K_GROUP,
    groups,
    splits,
    stride_dyn,
    stride_dyk,
    stride_dyh,
    stride_dyw,
    stride_wk,
    stride_wc,
    stride_wr,
    stride_ws,
    stride_dxn,
    stride_dxc,
    stride_dxh,
    stride_dxw,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
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
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(C_GROUP, BLOCK_N)
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
    rows = tl.maximum(pixels_in(first_h, H, STRIDE_H), 1)
    columns = tl.maximum(pixels_in(first_w, W, STRIDE_W), 1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = m // columns // rows
    h = m // columns % rows * STRIDE_H + first_h
    w = m % columns * STRIDE_W + first_w
    m_inside = (n < N) & (h < H) & (w < W)
    c = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_inside = c < C_GROUP
    if INT64:
        n, h, c, group = n.to(tl.int64), h.to(tl.int64), c.to(tl.int64), group.to(tl.int64)

    if FLAT:
        steps = tl.cdiv(taps_h * taps_w * K_GROUP, BLOCK_K)
    else:
        steps = taps_h * taps_w * tl.cdiv(K_GROUP, BLOCK_K)
    steps_per_split = tl.cdiv(steps, splits)
    acc = gather_dot(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        dy_ptr + group * K_GROUP * stride_dyk,
        w_ptr + group * K_GROUP * stride_wk + first_r * stride_wr + first_s * stride_ws,
        n * stride_dyn,
        output_under(h, first_r, PAD_H, STRIDE_H, DILATION_H, R),
        output_under(w, first_s, PAD_W, STRIDE_W, DILATION_W, S),
        m_inside,
        c * stride_wc,
        c_inside,
        OH,
        OW,
        K_GROUP,
        taps_h,
        tl.maximum(taps_w, 1),
        -(TAP_STEP_H * DILATION_H // STRIDE_H),
        -(TAP_STEP_W * DILATION_W // STRIDE_W),
        split * steps_per_split,
        tl.minimum((split + 1) * steps_per_split, steps),
        stride_dyk,
        stride_dyh,
        stride_dyw,
        stride_wk,
        stride_wr * TAP_STEP_H,
        stride_ws * TAP_STEP_W,
        FLAT,
        INT64,
        PRECISION,
        BLOCK_K,
    )
    inside = m_inside[:, None] & c_inside[None, :]
    column = group * C_GROUP + c
    if partial_ptr is not None:
        part = (split.to(tl.int64) * M + m)[:, None] * (groups * C_GROUP) + column[None, :]
        tl.store(partial_ptr + part, acc, mask=inside)
    else:
        row = n * stride_dxn + h * stride_dxh + w * stride_dxw
        dx = acc.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + row[:, None] + (column * stride_dxc)[None, :], dx, mask=inside)


def conv2d_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """nnarch::conv2d_input_grad on a GPU by the direct product."""
    check_dtype("conv2d_input_grad", grad, weight)
    n, _, h, w = input_size
    k, c_group, r, s = weight.shape
    dx = library.new_output(grad, input_size)
    if dx.numel() == 0:
        return dx
    if grad.numel() == 0:
        return dx.zero_()
    grad = channels_innermost(grad, k // groups)
    weight = _reduced_channels_innermost(weight)
    precision = dot_precision("conv")
    m = n * cdiv(h, stride[0]) * cdiv(w, stride[1])
    reduction = cdiv(r, stride[0]) * cdiv(s, stride[1]) * (k // groups)
    problem = Problem(
        m=m,
        n=c_group,
        k=reduction,
        precision=precision_of(grad.dtype, precision),
        vectors=loads_channel_vectors(grad, k // groups),
    )
    arguments = {
        **{"dy_ptr": grad, "w_ptr": weight, "dx_ptr": dx},
        **{"M": m, "N": n, "H": h, "W": w, "OH": grad.shape[2], "OW": grad.shape[3]},
        **{"C_GROUP": c_group, "K_GROUP": k // groups, "groups": groups},
        **named_strides("dy", "nkhw", grad),
        **named_strides("w", "kcrs", weight),
        **named_strides("dx", "nchw", dx),
        **geometry(r, s, stride, padding, dilation),
        **tap_steps(stride, dilation),
        "INT64": needs_int64(grad, weight, dx),
        "PRECISION": precision,
    }

    def run(tile: Tile) -> None:
        _launch_input_grad(arguments, dx, groups, tile)

    with device_guard(grad):
        run(pick(MATMUL, problem, run))
    return dx


def _launch_input_grad(arguments, dx, groups: int, tile: Tile) -> None:
    """The kernel with `tile`, split where that helps and rows are pixels in order (stride 1)."""
    m, c_group, k_group = arguments["M"], arguments["C_GROUP"], arguments["K_GROUP"]
    phases = arguments["STRIDE_H"] * arguments["STRIDE_W"]
    programs = groups * cdiv(m, tile["BLOCK_M"]) * cdiv(c_group, tile["BLOCK_N"])
    taps = arguments["R"] * arguments["S"]
    steps = reduction_steps(taps, k_group, tile["BLOCK_K"])
    splits = matmul_split(tile, programs, steps) if phases == 1 else 1
    partial = None
    if splits > 1:
        partial = dx.new_empty((splits, m, dx.shape[1]), dtype=torch.float32)
    split = {
        **{"partial_ptr": partial, "splits": splits},
        "FLAT": takes_flat(k_group, tile["BLOCK_K"]),
    }
    grid = flat_grid(programs * splits * phases)
    launch(_conv2d_bwd_dx_kernel, grid, arguments | split, tile)
    if partial is not None:
        finish_split(partial, dx, NO_EPILOGUE)


def _reduced_channels_innermost(weight: torch.Tensor) -> torch.Tensor:
    """`weight` with K at stride 1, which the input gradient sums over."""
    return weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
