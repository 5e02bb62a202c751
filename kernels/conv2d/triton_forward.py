"""The forward convolution on the GPU: one implicit GEMM with the epilogue on its accumulators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.conv2d.geometry import output_size
from nnarch.kernels.conv2d.triton_gather import gather_dot, geometry, reduction_steps, takes_flat
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
    channels_innermost,
    grouped_order,
    loads_channel_vectors,
    matmul_split,
    precision_of,
)
from nnarch.kernels.gpu.split import finish_split
from nnarch.kernels.gpu.tiles import Problem, Tile, pick


@triton.jit
def _conv2d_fwd_kernel(
    x_ptr,  # [N, C, H, W], any strides
    w_ptr,  # [K, C / groups, R, S], any strides
    y_ptr,  # [N, K, OH, OW], any strides
    partial_ptr,  # [splits, N·OH·OW, K] float32, or None where the reduction is not split
    bias_ptr,  # [K] each, or None
    scale_ptr,
    shift_ptr,
    residual_ptr,  # as y, or None
    alpha,
    M,  # N·OH·OW
    H,
    W,
    OH,
    OW,
    C_GROUP,
    K_GROUP,
    groups,
    steps_per_split,
    steps,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wk,
    stride_wc,
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
    FLAT: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_M pixels by BLOCK_N channels of one group, one part of the reduction.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(K_GROUP, BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = grouped_order(pid % (tiles_m * tiles_n), tiles_m, tiles_n, 8)
    group = pid // (tiles_m * tiles_n) % groups
    split = pid // (tiles_m * tiles_n) // groups

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_inside = m < M
    n, oh, ow = m // (OH * OW), m // OW % OH, m % OW
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k_inside = k < K_GROUP
    k += group * K_GROUP
    if INT64:
        m, n, oh, k = m.to(tl.int64), n.to(tl.int64), oh.to(tl.int64), k.to(tl.int64)
        group = group.to(tl.int64)

    acc = gather_dot(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
        x_ptr + group * C_GROUP * stride_xc,
        w_ptr,
        n * stride_xn,
        oh * STRIDE_H - PAD_H,
        ow * STRIDE_W - PAD_W,
        m_inside,
        k * stride_wk,
        k_inside,
        H,
        W,
        C_GROUP,
        R,
        S,
        DILATION_H,
        DILATION_W,
        split * steps_per_split,
        tl.minimum((split + 1) * steps_per_split, steps),
        stride_xc,
        stride_xh,
        stride_xw,
        stride_wc,
        stride_wr,
        stride_ws,
        FLAT,
        INT64,
        PRECISION,
        BLOCK_K,
    )

    if partial_ptr is not None:
        part = (split.to(tl.int64) * M + m)[:, None] * (groups * K_GROUP) + k[None, :]
        tl.store(partial_ptr + part, acc, mask=m_inside[:, None] & k_inside[None, :])
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


def epilogue_arguments(bias, scale, shift, residual, activation, alpha) -> dict[str, Any]:
    """The arguments of a kernel that ends with write_tile."""
    return {
        "bias_ptr": vector(bias),
        "scale_ptr": vector(scale),
        "shift_ptr": vector(shift),
        "residual_ptr": residual,
        "alpha": float(alpha),
        "ACTIVATION": activation,
    }


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    packed: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """nnarch::conv2d on a GPU by the direct product; `packed` is a CPU matter and not read."""
    check_dtype("conv2d", x, weight, residual)
    n = x.shape[0]
    k, c_group, r, s = weight.shape
    _, _, oh, ow = size = output_size(x.shape, weight.shape, stride, padding, dilation)
    y = library.new_output(x, size, weight)
    if y.numel() == 0:
        return y
    x = channels_innermost(x, c_group)
    weight = weight.contiguous(memory_format=torch.channels_last)
    epilogue = epilogue_arguments(bias, scale, shift, residual, activation, alpha)
    taps = geometry(r, s, stride, padding, dilation)
    precision = dot_precision("conv")
    problem = Problem(
        m=n * oh * ow,
        n=k // groups,
        k=r * s * c_group,
        precision=precision_of(x.dtype, precision),
        vectors=loads_channel_vectors(x, c_group),
    )

    def run(tile: Tile) -> None:
        _launch_forward(x, weight, y, groups, epilogue, taps, precision, tile)

    with device_guard(x):
        run(pick(MATMUL, problem, run))
    return y


def _launch_forward(x, weight, y, groups, epilogue, taps, precision, tile: Tile) -> None:
    """The forward kernel with `tile`, and the second stage where the reduction is split."""
    n, k, oh, ow = y.shape
    _, c_group, r, s = weight.shape
    m = n * oh * ow
    programs = groups * cdiv(m, tile["BLOCK_M"]) * cdiv(k // groups, tile["BLOCK_N"])
    steps = reduction_steps(r * s, c_group, tile["BLOCK_K"])
    splits = matmul_split(tile, programs, steps)
    partial = y.new_empty((splits, m, k), dtype=torch.float32) if splits > 1 else None
    arguments = {
        **{"x_ptr": x, "w_ptr": weight, "y_ptr": y, "partial_ptr": partial},
        **epilogue,
        **taps,
        **{"M": m, "H": x.shape[2], "W": x.shape[3], "OH": oh, "OW": ow},
        **{"C_GROUP": c_group, "K_GROUP": k // groups, "groups": groups},
        **{"steps": steps, "steps_per_split": cdiv(steps, splits)},
        **named_strides("x", "nchw", x),
        **named_strides("w", "kcrs", weight),
        **named_strides("y", "nkhw", y),
        **named_strides("r", "nkhw", epilogue["residual_ptr"]),
        "FLAT": takes_flat(c_group, tile["BLOCK_K"]),
        "INT64": needs_int64(x, weight, y, epilogue["residual_ptr"]),
        "PRECISION": precision,
    }
    launch(_conv2d_fwd_kernel, flat_grid(programs * splits), arguments, tile)
    if partial is not None:
        finish_split(partial, y, epilogue)
