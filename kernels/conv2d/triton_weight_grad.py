"""The gradient of the convolution by its weight on the GPU: a GEMM that sums over the pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nnarch.kernels.conv2d.triton_gather import geometry, takes_flat
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
from nnarch.kernels.gpu.split import sum_parts
from nnarch.kernels.gpu.tiles import Problem, Tile, pick


@triton.jit
def _conv2d_bwd_dw_kernel(
    dy_ptr,  # [N, K, OH, OW], any strides
    x_ptr,  # [N, C, H, W], any strides
    out_ptr,  # [splits, K, R·S, C / groups] by strides: parts in float32, or the weight's gradient
    P,  # pixels N·OH·OW, the reduction
    H,
    W,
    OH,
    OW,
    C_GROUP,
    K_GROUP,
    groups,
    pixels_per_split,
    stride_dyn,
    stride_dyk,
    stride_dyh,
    stride_dyw,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_op,
    stride_ok,
    stride_ot,
    stride_oc,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    FLAT: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_M output channels of one group by BLOCK_N input channels of one tap (with
    # FLAT: BLOCK_N consecutive (tap, channel) pairs), summed over one part of the pixels.
    chunks = tl.cdiv(C_GROUP, BLOCK_N)
    tiles_m = tl.cdiv(K_GROUP, BLOCK_M)
    tiles_n = tl.cdiv(R * S * C_GROUP, BLOCK_N) if FLAT else R * S * chunks
    pid = tl.program_id(0)
    tile_m, tile_n = grouped_order(pid % (tiles_m * tiles_n), tiles_m, tiles_n, 8)
    group = pid // (tiles_m * tiles_n) % groups
    split = pid // (tiles_m * tiles_n) // groups

    k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k_inside = k < K_GROUP
    k += group * K_GROUP
    lane = tl.arange(0, BLOCK_N)
    if FLAT:
        tap = (tile_n * BLOCK_N + lane) // C_GROUP
        c = (tile_n * BLOCK_N + lane) % C_GROUP
        c_inside = tap < R * S
    else:
        tap = tile_n // chunks
        c = tile_n % chunks * BLOCK_N + lane
        c_inside = c < C_GROUP
    tap_h = tap // S * DILATION_H - PAD_H
    tap_w = tap % S * DILATION_W - PAD_W
    last = tl.minimum((split + 1) * pixels_per_split, P)
    pixel = tl.arange(0, BLOCK_K)
    if INT64:
        k, group, pixel = k.to(tl.int64), group.to(tl.int64), pixel.to(tl.int64)
    column = (group * C_GROUP + c) * stride_xc

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(split * pixels_per_split, last, BLOCK_K):
        p = start + pixel
        p_inside = p < last
        n, oh, ow = p // (OH * OW), p // OW % OH, p % OW
        dy_offset = (n * stride_dyn + oh * stride_dyh + ow * stride_dyw)[None, :]
        dy_offset = dy_offset + (k * stride_dyk)[:, None]
        dy = tl.load(dy_ptr + dy_offset, mask=k_inside[:, None] & p_inside[None, :], other=0.0)
        if FLAT:
            h = (oh * STRIDE_H)[:, None] + tap_h[None, :]
            w = (ow * STRIDE_W)[:, None] + tap_w[None, :]
            x_offset = (n * stride_xn)[:, None] + h * stride_xh + w * stride_xw
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & p_inside[:, None]
        else:
            h = oh * STRIDE_H + tap_h
            w = ow * STRIDE_W + tap_w
            x_offset = (n * stride_xn + h * stride_xh + w * stride_xw)[:, None]
            inside = ((h >= 0) & (h < H) & (w >= 0) & (w < W) & p_inside)[:, None]
        x_offset = x_offset + column[None, :]
        x = tl.load(x_ptr + x_offset, mask=inside & c_inside[None, :], other=0.0)
        acc = tl.dot(dy, x, acc, input_precision=PRECISION)

    row = split.to(tl.int64) * stride_op + k * stride_ok
    out = out_ptr + row[:, None] + (tap * stride_ot + c * stride_oc)[None, :]
    inside = k_inside[:, None] & c_inside[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside)


def conv2d_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = False,
) -> torch.Tensor:
    """nnarch::conv2d_weight_grad on a GPU by the direct product; the same bits in every run."""
    check_dtype("conv2d_weight_grad", grad, x)
    dw = grad.new_empty(list(weight_size))
    if dw.numel() == 0 or grad.numel() == 0 or x.numel() == 0:
        return in_format(dw.zero_(), channels_last)
    k, c_group, r, s = weight_size
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    precision = dot_precision("conv")
    grad, x = channels_innermost(grad, k // groups), channels_innermost(x, c_group)
    problem = Problem(
        m=k // groups,
        n=r * s * c_group,
        k=pixels,
        precision=precision_of(x.dtype, precision),
        vectors=loads_channel_vectors(grad, k // groups) and loads_channel_vectors(x, c_group),
    )
    arguments = {
        **{"dy_ptr": grad, "x_ptr": x, "P": pixels, "H": x.shape[2], "W": x.shape[3]},
        **{"OH": grad.shape[2], "OW": grad.shape[3]},
        **{"C_GROUP": c_group, "K_GROUP": k // groups, "groups": groups},
        **named_strides("dy", "nkhw", grad),
        **named_strides("x", "nchw", x),
        **geometry(r, s, stride, padding, dilation),
        "INT64": needs_int64(grad, x, dw),
        "PRECISION": precision,
    }

    def run(tile: Tile) -> None:
        _launch_weight_grad(arguments, dw, groups, tile)

    with device_guard(grad):
        run(pick(MATMUL, problem, run))
    return in_format(dw, channels_last)


def in_format(dw: torch.Tensor, channels_last: bool) -> torch.Tensor:
    """`dw` in the memory format of its weight."""
    return dw.contiguous(memory_format=torch.channels_last) if channels_last else dw


def _launch_weight_grad(arguments, dw, groups: int, tile: Tile) -> None:
    """All pixels straight to `dw`, or parts of them to a float32 buffer, and then their sum."""
    k, c_group, r, s = dw.shape
    flat = takes_flat(c_group, tile["BLOCK_N"])
    columns = cdiv(r * s * c_group, tile["BLOCK_N"])
    if not flat:
        columns = r * s * cdiv(c_group, tile["BLOCK_N"])
    tiles = groups * cdiv(k // groups, tile["BLOCK_M"]) * columns
    steps = cdiv(arguments["P"], tile["BLOCK_K"])
    splits = matmul_split(tile, tiles, steps)
    out = dw.view(1, k, c_group, r * s).transpose(2, 3)
    if splits > 1:
        out = dw.new_empty((splits, k, r * s, c_group), dtype=torch.float32)
    split = {
        "out_ptr": out,
        "pixels_per_split": cdiv(steps, splits) * tile["BLOCK_K"],
        **named_strides("o", "pktc", out),
        "FLAT": flat,
    }
    launch(_conv2d_bwd_dw_kernel, flat_grid(tiles * splits), arguments | split, tile)
    if splits > 1:
        sum_parts(out, dw)
