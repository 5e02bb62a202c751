"""The gradients of the depthwise convolution on the GPU, by input and by weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.depthwise.triton_forward import PIXELS_BY_CHANNELS, geometry, problem_of
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    flat_grid,
    launch,
    named_strides,
    needs_int64,
)
from nnarch.kernels.gpu.phases import first_tap, output_under, phase_start, pixels_in, tap_steps
from nnarch.kernels.gpu.split import split_count, sum_parts
from nnarch.kernels.gpu.tiles import Tile, pick


@triton.jit
def _depthwise_conv2d_bwd_dx_kernel(
    dy_ptr,  # [N, C·MULTIPLIER, OH, OW], any strides
    w_ptr,  # [C·MULTIPLIER, 1, R, S], any strides
    dx_ptr,  # [N, C, H, W], any strides
    M,  # pixels of the largest phase: N·⌈H / STRIDE_H⌉·⌈W / STRIDE_W⌉
    N,
    C,
    H,
    W,
    OH,
    OW,
    stride_dyn,
    stride_dyk,
    stride_dyh,
    stride_dyw,
    stride_wk,
    stride_wr,
    stride_ws,
    stride_dxn,
    stride_dxc,
    stride_dxh,
    stride_dxw,
    MULTIPLIER: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAP_STEP_H: tl.constexpr,
    TAP_STEP_W: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program: BLOCK_M pixels of one phase (see phases.py) by BLOCK_N channels.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_N)
    pid = tl.program_id(0)
    phase = pid // (tiles_m * tiles_n)
    phase_h, phase_w = phase // STRIDE_W, phase % STRIDE_W
    first_r = first_tap(phase_h, R, STRIDE_H, DILATION_H)
    first_s = first_tap(phase_w, S, STRIDE_W, DILATION_W)
    first_h = phase_start(phase_h, PAD_H, STRIDE_H)
    first_w = phase_start(phase_w, PAD_W, STRIDE_W)
    rows = tl.maximum(pixels_in(first_h, H, STRIDE_H), 1)
    columns = tl.maximum(pixels_in(first_w, W, STRIDE_W), 1)

    m = pid % (tiles_m * tiles_n) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = m // columns // rows
    h = m // columns % rows * STRIDE_H + first_h
    w = m % columns * STRIDE_W + first_w
    m_inside = (n < N) & (h < H) & (w < W)
    c = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_inside = c < C
    if INT64:
        n, h, w, c = n.to(tl.int64), h.to(tl.int64), w.to(tl.int64), c.to(tl.int64)
    top = output_under(h, first_r, PAD_H, STRIDE_H, DILATION_H, R)
    left = output_under(w, first_s, PAD_W, STRIDE_W, DILATION_W, S)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range((R - first_r + TAP_STEP_H - 1) // TAP_STEP_H):
        oh = top - i * (TAP_STEP_H * DILATION_H // STRIDE_H)
        h_inside = m_inside & (oh >= 0) & (oh < OH)
        for j in tl.static_range((S + TAP_STEP_W - 1) // TAP_STEP_W):
            s = first_s + j * TAP_STEP_W
            ow = left - j * (TAP_STEP_W * DILATION_W // STRIDE_W)
            # The last unrolled tap may not exist: it sees no pixel, and its weight is another's.
            pixel_inside = h_inside & (ow >= 0) & (ow < tl.where(s < S, OW, 0))
            pixel = n * stride_dyn + oh * stride_dyh + ow * stride_dyw
            w_tap = (first_r + i * TAP_STEP_H) * stride_wr + tl.minimum(s, S - 1) * stride_ws
            for q in range(MULTIPLIER):
                k = c * MULTIPLIER + q
                inside = pixel_inside[:, None] & c_inside[None, :]
                dy_offset = pixel[:, None] + (k * stride_dyk)[None, :]
                dy = tl.load(dy_ptr + dy_offset, mask=inside, other=0.0).to(tl.float32)
                tap = tl.load(w_ptr + k * stride_wk + w_tap, mask=c_inside, other=0.0)
                acc += dy * tap.to(tl.float32)[None, :]

    row = n * stride_dxn + h * stride_dxh + w * stride_dxw
    dx = acc.to(dx_ptr.dtype.element_ty)
    dx_offset = row[:, None] + (c * stride_dxc)[None, :]
    tl.store(dx_ptr + dx_offset, dx, mask=m_inside[:, None] & c_inside[None, :])


def depthwise_conv2d_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """nnarch::depthwise_conv2d_input_grad on a GPU."""
    check_dtype("depthwise_conv2d_input_grad", grad, weight)
    n, c, h, w = input_size
    dx = library.new_output(grad, input_size)
    if dx.numel() == 0:
        return dx
    if grad.numel() == 0:
        return dx.zero_()
    pixels = n * cdiv(h, stride[0]) * cdiv(w, stride[1])
    arguments = {
        **{"dy_ptr": grad, "w_ptr": weight, "dx_ptr": dx, "M": pixels, "N": n, "C": c},
        **{"H": h, "W": w, "OH": grad.shape[2], "OW": grad.shape[3]},
        **named_strides("dy", "nkhw", grad),
        **named_strides("w", "krs", weight[:, 0]),
        **named_strides("dx", "nchw", dx),
        **geometry(c, weight.shape, stride, padding, dilation),
        **tap_steps(stride, dilation),
        "INT64": needs_int64(grad, dx),
    }

    def run(tile: Tile) -> None:
        programs = cdiv(pixels, tile["BLOCK_M"]) * cdiv(c, tile["BLOCK_N"])
        grid = flat_grid(programs * stride[0] * stride[1])
        launch(_depthwise_conv2d_bwd_dx_kernel, grid, arguments, tile)

    with device_guard(grad):
        run(pick(PIXELS_BY_CHANNELS, problem_of(grad, pixels, c), run))
    return dx


@triton.jit
def _depthwise_conv2d_bwd_dw_kernel(
    dy_ptr,  # [N, K, OH, OW], any strides; K = C·MULTIPLIER
    x_ptr,  # [N, C, H, W], any strides
    out_ptr,  # [splits, K, R·S]: parts in float32, or the weight's gradient
    P,  # pixels N·OH·OW, the reduction
    K,
    H,
    W,
    OH,
    OW,
    pixels_per_split,
    stride_dyn,
    stride_dyk,
    stride_dyh,
    stride_dyw,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    MULTIPLIER: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # One program: one tap of BLOCK_N channels over one part of the pixels. The taps come first in
    # the order of programs, so that those that read the same pixels run together.
    pid = tl.program_id(0)
    tap = pid % (R * S)
    k = pid // (R * S) % tl.cdiv(K, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_inside = k < K
    split = pid // (R * S) // tl.cdiv(K, BLOCK_N)
    tap_h = tap // S * DILATION_H - PAD_H
    tap_w = tap % S * DILATION_W - PAD_W
    lane = tl.arange(0, BLOCK_M)
    if INT64:
        k, lane = k.to(tl.int64), lane.to(tl.int64)
    dy_channel, x_channel = (k * stride_dyk)[None, :], (k // MULTIPLIER * stride_xc)[None, :]

    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    last = tl.minimum((split + 1) * pixels_per_split, P)
    for start in range(split * pixels_per_split, last, BLOCK_M):
        p = start + lane
        n, oh, ow = p // (OH * OW), p // OW % OH, p % OW
        h, w = oh * STRIDE_H + tap_h, ow * STRIDE_W + tap_w
        p_inside = (p < last) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        inside = p_inside[:, None] & k_inside[None, :]
        dy_offset = (n * stride_dyn + oh * stride_dyh + ow * stride_dyw)[:, None] + dy_channel
        dy = tl.load(dy_ptr + dy_offset, mask=inside, other=0.0).to(tl.float32)
        x_offset = (n * stride_xn + h * stride_xh + w * stride_xw)[:, None] + x_channel
        x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
        products += dy * x
    total = tl.sum(products, axis=0)
    out = out_ptr + (split.to(tl.int64) * K + k) * (R * S) + tap
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=k_inside)


def depthwise_conv2d_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> torch.Tensor:
    """nnarch::depthwise_conv2d_weight_grad on a GPU; the same bits in every run."""
    check_dtype("depthwise_conv2d_weight_grad", grad, x)
    dw = grad.new_empty(list(weight_size))
    if dw.numel() == 0 or grad.numel() == 0 or x.numel() == 0:
        return dw.zero_()
    k, _, r, s = weight_size
    pixels = grad.shape[0] * grad.shape[2] * grad.shape[3]
    arguments = {
        **{"dy_ptr": grad, "x_ptr": x, "P": pixels, "K": k, "H": x.shape[2], "W": x.shape[3]},
        **{"OH": grad.shape[2], "OW": grad.shape[3]},
        **named_strides("dy", "nkhw", grad),
        **named_strides("x", "nchw", x),
        **geometry(x.shape[1], weight_size, stride, padding, dilation),
        "INT64": needs_int64(grad, x),
    }

    def run(tile: Tile) -> None:
        columns = r * s * cdiv(k, tile["BLOCK_N"])
        steps = cdiv(pixels, tile["BLOCK_M"])
        # Bound by memory: eight programs a processor keep enough loads in flight.
        splits = split_count(cdiv(columns, 8), steps)
        out = dw
        if splits > 1:
            out = dw.new_empty((splits, k, r * s, 1), dtype=torch.float32)
        pixels_per_split = cdiv(steps, splits) * tile["BLOCK_M"]
        split = {"out_ptr": out, "pixels_per_split": pixels_per_split}
        grid = flat_grid(columns * splits)
        launch(_depthwise_conv2d_bwd_dw_kernel, grid, arguments | split, tile)
        if splits > 1:
            sum_parts(out, dw)

    with device_guard(grad):
        run(pick(PIXELS_BY_CHANNELS, problem_of(x, pixels, k), run))
    return dw
