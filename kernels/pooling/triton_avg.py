"""Average pooling on the GPU: regular, adaptive and global windows, and the gradient.

The gradient is gathered: each input pixel adds up the gradients of the windows that cover it, each
divided as its window was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    flat_grid,
    launch,
    named_strides,
    needs_int64,
)
from nnarch.kernels.gpu.tiles import tile
from nnarch.kernels.pooling.checks import output_size
from nnarch.kernels.pooling.triton_tile import (
    adaptive_span,
    covering_windows,
    index_64,
    merge_planes,
    pair,
    pixel_grid,
    pixel_tile,
    sizes,
    unroll,
    window,
)


@triton.jit
def _window_area(
    first_h,
    end_h,
    first_w,
    end_w,
    height,
    width,
    padding_h,
    padding_w,
    INCLUDE_PAD: tl.constexpr,
):
    """How many positions of a window count, float32; 1 for the lanes outside, which have none."""
    if not INCLUDE_PAD:
        first_h, first_w = tl.maximum(first_h, 0), tl.maximum(first_w, 0)
        padding_h, padding_w = 0, 0
    # The padding may count; what ceil_mode adds beyond it does not.
    rows = tl.minimum(end_h, height + padding_h) - first_h
    columns = tl.minimum(end_w, width + padding_w) - first_w
    return tl.maximum(rows * columns, 1).to(tl.float32)


@triton.jit
def _avg_pool2d_fwd_kernel(
    x_ptr,
    y_ptr,
    pixels,
    channels,
    height,
    width,
    out_height,
    out_width,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    divisor,  # float, the same for all windows; None: each window's own area
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    UNROLL: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sum of each window over its divisor."""
    n, oh, ow, c, inside = pixel_tile(
        pixels, channels, out_height, out_width, INT64, BLOCK_P, BLOCK_C
    )
    first_h, end_h = window(oh, height, out_height, stride_h, padding_h, KERNEL_H, ADAPTIVE)
    first_w, end_w = window(ow, width, out_width, stride_w, padding_w, KERNEL_W, ADAPTIVE)
    x_row = x_ptr + n * stride_xn + c * stride_xc
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in tl.range(0, KERNEL_H * KERNEL_W, loop_unroll_factor=UNROLL):
        h = first_h + tap // KERNEL_W
        w = first_w + tap % KERNEL_W
        valid = inside & (h >= 0) & (h < tl.minimum(end_h, height))
        valid &= (w >= 0) & (w < tl.minimum(end_w, width))
        x = tl.load(x_row + (h * stride_xh + w * stride_xw), mask=valid, other=0.0)
        acc += x.to(tl.float32)
    if divisor is None:
        area = _window_area(
            first_h, end_h, first_w, end_w, height, width, padding_h, padding_w, INCLUDE_PAD
        )
        y = acc / area
    else:
        y = acc / divisor
    y_offset = n * stride_yn + c * stride_yc + oh * stride_yh + ow * stride_yw
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _avg_pool2d_bwd_kernel(
    grad_ptr,  # [N, C, out_height, out_width]
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
    stride_dn,
    stride_dc,
    stride_dh,
    stride_dw,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    divisor,  # float, the same for all windows; None: each window's own area
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    COVER_H: tl.constexpr,  # most windows that cover one row
    COVER_W: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    INCLUDE_PAD: tl.constexpr,
    UNROLL: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of a pixel: the sum of grad / divisor over the windows that cover it."""
    n, h, w, c, inside = pixel_tile(pixels, channels, height, width, INT64, BLOCK_P, BLOCK_C)
    oh_0, last_h = covering_windows(h, height, out_height, stride_h, padding_h, KERNEL_H, ADAPTIVE)
    ow_0, last_w = covering_windows(w, width, out_width, stride_w, padding_w, KERNEL_W, ADAPTIVE)
    grad_row = grad_ptr + n * stride_gn + c * stride_gc
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in tl.range(0, COVER_H * COVER_W, loop_unroll_factor=UNROLL):
        oh = oh_0 + i // COVER_W
        ow = ow_0 + i % COVER_W
        covered = (oh <= last_h) & (ow <= last_w)
        offset = tl.where(covered, oh * stride_gh + ow * stride_gw, 0)  # some grad exists there
        grad = tl.load(grad_row + offset, mask=inside, other=0.0)
        g = tl.where(covered, grad.to(tl.float32), 0.0)
        if divisor is None:
            first_h, end_h = window(oh, height, out_height, stride_h, padding_h, KERNEL_H, ADAPTIVE)
            first_w, end_w = window(ow, width, out_width, stride_w, padding_w, KERNEL_W, ADAPTIVE)
            g /= _window_area(
                first_h, end_h, first_w, end_w, height, width, padding_h, padding_w, INCLUDE_PAD
            )
        acc += g
    if divisor is not None:
        acc /= divisor
    dx_offset = n * stride_dn + c * stride_dc + h * stride_dh + w * stride_dw
    tl.store(dx_ptr + dx_offset, acc.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _global_avg_pool2d_kernel(
    x_ptr,  # [N, C, area]
    y_ptr,  # [N, C]
    channels,
    area,
    stride_xn,
    stride_xc,
    stride_xa,
    stride_yn,
    stride_yc,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """The mean of each plane, of BLOCK_C channels of one image."""
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    n = pid // channel_blocks
    c = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    a = tl.arange(0, BLOCK_A)
    if INT64:
        n, c, a = n.to(tl.int64), c.to(tl.int64), a.to(tl.int64)
    x_tile = x_ptr + n * stride_xn + (c[:, None] * stride_xc + a[None, :] * stride_xa)
    acc = tl.zeros((BLOCK_C, BLOCK_A), tl.float32)
    for start in range(0, area, BLOCK_A):
        inside = (c < channels)[:, None] & (a < area - start)[None, :]
        acc += tl.load(x_tile, mask=inside, other=0.0).to(tl.float32)
        x_tile += BLOCK_A * stride_xa
    y = tl.sum(acc, 1) / area
    y_tile = y_ptr + n * stride_yn + c * stride_yc
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=c < channels)


# ----------------------------------------------------------------------------------- launchers


def avg_pool2d(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> torch.Tensor:
    """``nnarch::avg_pool2d``."""
    check_dtype("avg_pool2d", x)
    size = output_size("avg_pool2d", x.shape, kernel, stride, padding, (1, 1), ceil_mode)
    windows = _regular_windows(
        x.shape[2:], size, kernel, stride, padding, count_include_pad, divisor_override
    )
    return _forward(x, size, windows)


def adaptive_avg_pool2d(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """``nnarch::adaptive_avg_pool2d``."""
    check_dtype("adaptive_avg_pool2d", x)
    if tuple(size) == (1, 1) and x.stride(2) == x.shape[3] * x.stride(3):
        return _global_avg_pool2d(x)
    return _forward(x, size, _adaptive_windows(x.shape[2:], size))


def avg_pool2d_input_grad(
    grad: torch.Tensor,
    input_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> torch.Tensor:
    """``nnarch::avg_pool2d_input_grad``; the size of `grad` says what `ceil_mode` would."""
    check_dtype("avg_pool2d_input_grad", grad)
    windows = _regular_windows(
        input_size[2:],
        grad.shape[2:],
        kernel,
        stride,
        padding,
        count_include_pad,
        divisor_override,
    )
    cover = (cdiv(kernel[0], stride[0]), cdiv(kernel[1], stride[1]))
    return _input_grad(grad, input_size, windows, cover)


def adaptive_avg_pool2d_input_grad(grad: torch.Tensor, input_size: Sequence[int]) -> torch.Tensor:
    """``nnarch::adaptive_avg_pool2d_input_grad``."""
    check_dtype("adaptive_avg_pool2d_input_grad", grad)
    size, out_size = input_size[2:], grad.shape[2:]
    cover = (adaptive_span(out_size[0], size[0]), adaptive_span(out_size[1], size[1]))
    return _input_grad(grad, input_size, _adaptive_windows(size, out_size), cover)


def _regular_windows(
    size: Sequence[int],
    out_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    include_pad: bool,
    divisor_override: int | None,
) -> dict[str, Any]:
    """The window arguments that both kernels take, of regular pooling from `size` to `out_size`."""
    divisor = divisor_override
    if divisor is None and (include_pad or not any(padding)):
        ends = [(out_size[i] - 1) * stride[i] + kernel[i] for i in (0, 1)]
        if all(ends[i] <= size[i] + 2 * padding[i] for i in (0, 1)):  # ceil_mode may pass it
            divisor = kernel[0] * kernel[1]
    return {
        **pair("stride", stride),
        **pair("padding", padding),
        "divisor": None if divisor is None else float(divisor),
        **pair("KERNEL", kernel),
        "ADAPTIVE": False,
        "INCLUDE_PAD": include_pad,
    }


def _adaptive_windows(size: Sequence[int], out_size: Sequence[int]) -> dict[str, Any]:
    """The window arguments of adaptive pooling from `size` to `out_size`."""
    spans = (adaptive_span(size[0], out_size[0]), adaptive_span(size[1], out_size[1]))
    even = all(n and not size[i] % n for i, n in enumerate(out_size))
    return {
        **pair("stride", (1, 1)),
        **pair("padding", (0, 0)),
        "divisor": float(spans[0] * spans[1]) if even else None,
        **pair("KERNEL", spans),
        "ADAPTIVE": True,
        "INCLUDE_PAD": False,
    }


def _forward(x: torch.Tensor, size: Sequence[int], windows: dict[str, Any]) -> torch.Tensor:
    y = library.new_output(x, (*x.shape[:2], *size))
    x_view, y_view = merge_planes(x, y)
    grid, tile = pixel_grid(y_view)
    arguments = {
        "x_ptr": x,
        "y_ptr": y,
        **sizes(x_view, y_view, y_view),
        **named_strides("x", "nchw", x_view),
        **named_strides("y", "nchw", y_view),
        **windows,
        "UNROLL": unroll(windows["KERNEL_H"] * windows["KERNEL_W"]),
        "INT64": index_64(x_view, y_view),
    }
    with device_guard(x):
        launch(_avg_pool2d_fwd_kernel, grid, arguments, tile)
    return y


def _input_grad(
    grad: torch.Tensor,
    input_size: Sequence[int],
    windows: dict[str, Any],
    cover: tuple[int, int],
) -> torch.Tensor:
    dx = library.new_output(grad, input_size)
    if grad.numel() == 0:
        return dx.zero_()
    grad_view, dx_view = merge_planes(grad, dx)
    grid, tile = pixel_grid(dx_view)
    arguments = {
        "grad_ptr": grad,
        "dx_ptr": dx,
        **sizes(dx_view, grad_view, dx_view),
        **named_strides("g", "nchw", grad_view),
        **named_strides("d", "nchw", dx_view),
        **windows,
        **pair("COVER", cover),
        "UNROLL": unroll(cover[0] * cover[1]),
        "INT64": index_64(dx_view, grad_view),
    }
    with device_guard(grad):
        launch(_avg_pool2d_bwd_kernel, grid, arguments, tile)
    return dx


def _global_avg_pool2d(x: torch.Tensor) -> torch.Tensor:
    """The mean over the image, whose rows follow one another without a gap."""
    n, c, h, w = x.shape
    y = library.new_output(x, (n, c, 1, 1))
    channels_inside = x.stride(1) == 1 and c > 1
    block_c = 64 if channels_inside else 4
    block_a = 16 if channels_inside else 256
    arguments = {
        "x_ptr": x,
        "y_ptr": y,
        **{"channels": c, "area": h * w},
        **{"stride_xn": x.stride(0), "stride_xc": x.stride(1), "stride_xa": x.stride(3)},
        **{"stride_yn": y.stride(0), "stride_yc": y.stride(1)},
        "INT64": needs_int64(x, y),
    }
    blocks = tile(BLOCK_C=block_c, BLOCK_A=block_a)
    with device_guard(x):
        launch(_global_avg_pool2d_kernel, flat_grid(n * cdiv(c, block_c)), arguments, blocks)
    return y
