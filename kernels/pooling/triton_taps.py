"""Maximum pooling for training on the GPU: maxima with the numbers of their taps, and the gradient.

The forward pass is triton_max.py's. A tap names the one window that has it over a pixel, so the
gradient is gathered in one pass, without atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.gpu.launch import check_dtype, device_guard, launch, named_strides
from nnarch.kernels.pooling.checks import output_size
from nnarch.kernels.pooling.triton_max import max_pool
from nnarch.kernels.pooling.triton_tile import (
    index_64,
    merge_planes,
    pair,
    pixel_grid,
    pixel_tile,
    sizes,
    unroll,
)


@triton.jit
def _max_pool2d_taps_bwd_kernel(
    grad_ptr,  # [N, C, out_height, out_width]
    taps_ptr,  # the same size, uint8
    dx_ptr,  # [N, C, height, width]
    pixels,
    channels,
    height,
    width,
    out_height,
    out_width,
    stride_gn,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_tn,
    stride_tc,
    stride_th,
    stride_tw,
    stride_dn,
    stride_dc,
    stride_dh,
    stride_dw,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    UNROLL: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of a pixel: for every tap the one window that has it there, where that tap was largest."""
    n, h, w, c, inside = pixel_tile(pixels, channels, height, width, INT64, BLOCK_P, BLOCK_C)
    grad_row = grad_ptr + n * stride_gn + c * stride_gc
    taps_row = taps_ptr + n * stride_tn + c * stride_tc
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in tl.range(0, KERNEL_H * KERNEL_W, loop_unroll_factor=UNROLL):
        from_h = h + padding_h - tap // KERNEL_W * dilation_h
        from_w = w + padding_w - tap % KERNEL_W * dilation_w
        oh, ow = from_h // stride_h, from_w // stride_w
        valid = inside & (from_h >= 0) & (from_w >= 0) & (oh < out_height) & (ow < out_width)
        valid = valid & (oh * stride_h == from_h) & (ow * stride_w == from_w)
        largest = tl.load(taps_row + (oh * stride_th + ow * stride_tw), mask=valid, other=255)
        grad = tl.load(grad_row + (oh * stride_gh + ow * stride_gw), mask=valid, other=0.0)
        acc += tl.where(largest.to(tl.int32) == tap, grad.to(tl.float32), 0.0)
    dx_offset = n * stride_dn + c * stride_dc + h * stride_dh + w * stride_dw
    tl.store(dx_ptr + dx_offset, acc.to(dx_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------- launchers


def max_pool2d_taps(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``nnarch::max_pool2d_taps``."""
    check_dtype("max_pool2d_taps", x)
    size = output_size("max_pool2d_taps", x.shape, kernel, stride, padding, dilation, ceil_mode)
    windows = pair("stride", stride) | pair("padding", padding) | pair("dilation", dilation)
    shape = (kernel[0], kernel[1])
    return max_pool(x, size, shape, windows, True, adaptive=False, taps=True)


def max_pool2d_taps_grad(
    grad: torch.Tensor,
    taps: torch.Tensor,
    input_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> torch.Tensor:
    """``nnarch::max_pool2d_taps_grad``."""
    check_dtype("max_pool2d_taps_grad", grad)
    dx = library.new_output(grad, input_size)
    if grad.numel() == 0:
        return dx.zero_()
    grad_view, taps_view, dx_view = merge_planes(grad, taps, dx)
    grid, tile = pixel_grid(dx_view)
    arguments = {
        "grad_ptr": grad,
        "taps_ptr": taps,
        "dx_ptr": dx,
        **sizes(dx_view, grad_view, dx_view),
        **named_strides("g", "nchw", grad_view),
        **named_strides("t", "nchw", taps_view),
        **named_strides("d", "nchw", dx_view),
        **pair("stride", stride),
        **pair("padding", padding),
        **pair("dilation", dilation),
        **{"KERNEL_H": kernel[0], "KERNEL_W": kernel[1]},
        "UNROLL": unroll(kernel[0] * kernel[1]),
        "INT64": index_64(dx_view, grad_view, taps_view),
    }
    with device_guard(grad):
        launch(_max_pool2d_taps_bwd_kernel, grid, arguments, tile)
    return dx
