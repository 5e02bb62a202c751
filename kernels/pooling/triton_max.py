"""Maximum pooling on the GPU: window maxima with indices, the gradient, and the gather.

The gradient is gathered, without atomics: each input pixel visits the windows that may have taken
it and adds the gradients of those whose index is the pixel, in a fixed order. The operation is
given indices only, not windows, so a first pass over the indices finds how far a window's index
lies from the window, and the second visits the windows within that reach. It serves regular and
adaptive pooling alike, and any indices that a user may pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.gpu.launch import (
    check_dtype,
    device_guard,
    launch,
    named_strides,
)
from nnarch.kernels.pooling.checks import output_size
from nnarch.kernels.pooling.triton_tile import (
    adaptive_span,
    index_64,
    merge_planes,
    pair,
    pixel_grid,
    pixel_tile,
    sizes,
    unroll,
    window,
)

_MAX_REACH_PROGRAMS = 256


@triton.jit
def _max_pool2d_fwd_kernel(
    x_ptr,
    y_ptr,
    indices_ptr,  # int64, flat over height·width, in the strides of y; None: not wanted;
    # uint8: the number of the tap, 255 for none
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
    dilation_h,
    dilation_w,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The maximum of each window and its first position; NaN wins, as in torch."""
    n, oh, ow, c, inside = pixel_tile(
        pixels, channels, out_height, out_width, INT64, BLOCK_P, BLOCK_C
    )
    first_h, end_h = window(oh, height, out_height, stride_h, padding_h, KERNEL_H, ADAPTIVE)
    first_w, end_w = window(ow, width, out_width, stride_w, padding_w, KERNEL_W, ADAPTIVE)
    if not ADAPTIVE:  # dilation spreads the window; the image is its only end
        end_h, end_w = height, width

    x_row = x_ptr + n * stride_xn + c * stride_xc
    best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK_P, BLOCK_C), tl.int64 if INT64 else tl.int32) - 1
    for tap in tl.range(0, KERNEL_H * KERNEL_W, loop_unroll_factor=UNROLL):
        h = first_h + tap // KERNEL_W * dilation_h
        w = first_w + tap % KERNEL_W * dilation_w
        valid = inside & (h >= 0) & (h < end_h) & (w >= 0) & (w < end_w)
        x = tl.load(x_row + (h * stride_xh + w * stride_xw), mask=valid, other=float("-inf"))
        x = x.to(tl.float32)
        better = valid & ((x > best) | (x != x) | (at < 0))
        best = tl.where(better, x, best)
        at = tl.where(better, tap if TAPS else h * width + w, at)

    y_offset = n * stride_yn + c * stride_yc + oh * stride_yh + ow * stride_yw
    tl.store(y_ptr + y_offset, best.to(y_ptr.dtype.element_ty), mask=inside)
    if indices_ptr is not None:
        # As uint8, -1 is 255.
        tl.store(indices_ptr + y_offset, at.to(indices_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _max_pool2d_reach_kernel(
    indices_ptr,  # [N, C, out_height, out_width] int64
    reach_ptr,  # [4, programs]: least and greatest row reach, least and greatest column reach
    pixels,
    channels,
    height,
    width,
    out_height,
    out_width,
    tiles,
    stride_in,
    stride_ic,
    stride_ih,
    stride_iw,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """How far indices lie from their windows: row·out_height - oh·height, and so for columns.

    In these units a regular or adaptive window has nearly the same reach wherever it stands.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    none_h, none_w = height * out_height, width * out_width  # beyond every reach
    least_h = tl.zeros((BLOCK_P, BLOCK_C), tl.int64 if INT64 else tl.int32) + none_h
    least_w = tl.zeros((BLOCK_P, BLOCK_C), tl.int64 if INT64 else tl.int32) + none_w
    greatest_h, greatest_w = -least_h, -least_w
    for t in range(program, tiles, programs):
        p_block, c_block = t // channel_blocks, t % channel_blocks
        if INT64:
            p_block, c_block = p_block.to(tl.int64), c_block.to(tl.int64)
        p = (p_block * BLOCK_P + tl.arange(0, BLOCK_P))[:, None]
        c = (c_block * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
        n, oh, ow = p // (out_height * out_width), p // out_width % out_height, p % out_width
        offset = n * stride_in + c * stride_ic + oh * stride_ih + ow * stride_iw
        inside = (p < pixels) & (c < channels)
        index = tl.load(indices_ptr + offset, mask=inside, other=-1)
        valid = (index >= 0) & (index < height * width)
        if not INT64:
            index = index.to(tl.int32)
        reach_h = index // width * out_height - oh * height
        reach_w = index % width * out_width - ow * width
        least_h = tl.where(valid, tl.minimum(least_h, reach_h), least_h)
        least_w = tl.where(valid, tl.minimum(least_w, reach_w), least_w)
        greatest_h = tl.where(valid, tl.maximum(greatest_h, reach_h), greatest_h)
        greatest_w = tl.where(valid, tl.maximum(greatest_w, reach_w), greatest_w)
    tl.store(reach_ptr + program, tl.min(tl.min(least_h, 1), 0))
    tl.store(reach_ptr + programs + program, tl.max(tl.max(greatest_h, 1), 0))
    tl.store(reach_ptr + 2 * programs + program, tl.min(tl.min(least_w, 1), 0))
    tl.store(reach_ptr + 3 * programs + program, tl.max(tl.max(greatest_w, 1), 0))


@triton.jit
def _reach(reach_ptr, parts, beyond, PARTS: tl.constexpr):
    """Least and greatest reach of one axis over all programs of the first pass."""
    part = tl.arange(0, PARTS)
    least = tl.load(reach_ptr + part, mask=part < parts, other=beyond)
    greatest = tl.load(reach_ptr + parts + part, mask=part < parts, other=-beyond)
    return tl.min(least, 0), tl.max(greatest, 0)


@triton.jit
def _windows_in_reach(at, size, out_size, least, greatest):
    """First and last output position from which input position `at` is in reach."""
    first = tl.maximum(at * out_size - greatest + size - 1, 0) // size
    from_least = at * out_size - least
    last = tl.minimum(tl.maximum(from_least, 0) // size, out_size - 1)
    return first, tl.where(from_least < 0, -1, last)


@triton.jit
def _max_pool2d_bwd_kernel(
    grad_ptr,  # [N, C, out_height, out_width]
    indices_ptr,  # the same size, int64
    reach_ptr,  # [4, parts]
    dx_ptr,  # [N, C, height, width]
    pixels,
    channels,
    height,
    width,
    out_height,
    out_width,
    parts,
    stride_gn,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_in,
    stride_ic,
    stride_ih,
    stride_iw,
    stride_dn,
    stride_dc,
    stride_dh,
    stride_dw,
    PARTS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of a pixel: the sum of grad over the windows in reach whose index is the pixel."""
    n, h, w, c, inside = pixel_tile(pixels, channels, height, width, INT64, BLOCK_P, BLOCK_C)
    least_h, greatest_h = _reach(reach_ptr, parts, height * out_height, PARTS)
    least_w, greatest_w = _reach(reach_ptr + 2 * parts, parts, width * out_width, PARTS)
    first_h, last_h = _windows_in_reach(h, height, out_height, least_h, greatest_h)
    first_w, last_w = _windows_in_reach(w, width, out_width, least_w, greatest_w)

    pixel = h * width + w
    grad_row = grad_ptr + n * stride_gn + c * stride_gc
    indices_row = indices_ptr + n * stride_in + c * stride_ic
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in range((greatest_h - least_h) // height + 1):
        oh = first_h + i
        for j in range((greatest_w - least_w) // width + 1):
            ow = first_w + j
            valid = inside & (oh <= last_h) & (ow <= last_w)
            index = tl.load(indices_row + (oh * stride_ih + ow * stride_iw), mask=valid, other=-1)
            grad = tl.load(grad_row + (oh * stride_gh + ow * stride_gw), mask=valid, other=0.0)
            acc += tl.where(index == pixel, grad.to(tl.float32), 0.0)
    dx_offset = n * stride_dn + c * stride_dc + h * stride_dh + w * stride_dw
    tl.store(dx_ptr + dx_offset, acc.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _max_pool2d_gather_kernel(
    x_ptr,
    indices_ptr,  # [N, C, out_height, out_width] int64, flat over height·width of x
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
    stride_in,
    stride_ic,
    stride_ih,
    stride_iw,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = x at the indices; 0 where an index points outside the image."""
    n, oh, ow, c, inside = pixel_tile(
        pixels, channels, out_height, out_width, INT64, BLOCK_P, BLOCK_C
    )
    i_offset = n * stride_in + c * stride_ic + oh * stride_ih + ow * stride_iw
    index = tl.load(indices_ptr + i_offset, mask=inside, other=-1)
    valid = (index >= 0) & (index < height * width)
    if not INT64:
        index = index.to(tl.int32)
    x_offset = n * stride_xn + c * stride_xc
    x_offset += index // width * stride_xh + index % width * stride_xw
    x = tl.load(x_ptr + x_offset, mask=valid, other=0.0)
    y_offset = n * stride_yn + c * stride_yc + oh * stride_yh + ow * stride_yw
    tl.store(y_ptr + y_offset, x, mask=inside)


# ----------------------------------------------------------------------------------- launchers


def max_pool2d(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    return_indices: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``nnarch::max_pool2d``."""
    check_dtype("max_pool2d", x)
    size = output_size("max_pool2d", x.shape, kernel, stride, padding, dilation, ceil_mode)
    windows = pair("stride", stride) | pair("padding", padding) | pair("dilation", dilation)
    return max_pool(x, size, (kernel[0], kernel[1]), windows, return_indices, adaptive=False)


def adaptive_max_pool2d(
    x: torch.Tensor, size: Sequence[int], return_indices: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``nnarch::adaptive_max_pool2d``."""
    check_dtype("adaptive_max_pool2d", x)
    kernel = tuple(adaptive_span(x.shape[2 + i], size[i]) for i in (0, 1))
    windows = pair("stride", (1, 1)) | pair("padding", (0, 0)) | pair("dilation", (1, 1))
    return max_pool(x, size, kernel, windows, return_indices, adaptive=True)


def max_pool(
    x: torch.Tensor,
    size: Sequence[int],
    kernel: tuple[int, ...],
    windows: dict[str, int],
    return_indices: bool,
    adaptive: bool,
    taps: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = library.new_output(x, (*x.shape[:2], *size))
    dtype = torch.uint8 if taps else torch.int64
    indices = torch.empty_like(y, dtype=dtype) if return_indices else y.new_empty(0).long()
    x_view, y_view = merge_planes(x, y)
    grid, tile = pixel_grid(y_view)
    arguments = {
        "x_ptr": x,
        "y_ptr": y,
        "indices_ptr": indices if return_indices else None,
        **sizes(x_view, y_view, y_view),
        **named_strides("x", "nchw", x_view),
        **named_strides("y", "nchw", y_view),
        **windows,
        **{"KERNEL_H": kernel[0], "KERNEL_W": kernel[1], "ADAPTIVE": adaptive, "TAPS": taps},
        "UNROLL": unroll(kernel[0] * kernel[1]),
        "INT64": index_64(x_view, y_view),
    }
    with device_guard(x):
        launch(_max_pool2d_fwd_kernel, grid, arguments, tile)
    return y, indices


def max_pool2d_input_grad(
    grad: torch.Tensor, indices: torch.Tensor, input_size: Sequence[int]
) -> torch.Tensor:
    """``nnarch::max_pool2d_input_grad``."""
    check_dtype("max_pool2d_input_grad", grad)
    dx = library.new_output(grad, input_size)
    if grad.numel() == 0:
        return dx.zero_()
    grad_view, indices_view, dx_view = merge_planes(grad, indices, dx)
    int64 = index_64(dx_view, grad_view, indices_view)
    with device_guard(grad):
        reach = _index_reach(indices_view, dx_view, int64)
        grid, tile = pixel_grid(dx_view)
        arguments = {
            "grad_ptr": grad,
            "indices_ptr": indices,
            "reach_ptr": reach,
            "dx_ptr": dx,
            **sizes(dx_view, grad_view, dx_view),
            "parts": reach.shape[1],
            **named_strides("g", "nchw", grad_view),
            **named_strides("i", "nchw", indices_view),
            **named_strides("d", "nchw", dx_view),
            **{"PARTS": _MAX_REACH_PROGRAMS, "INT64": int64},
        }
        launch(_max_pool2d_bwd_kernel, grid, arguments, tile)
    return dx


def _index_reach(indices: torch.Tensor, dx: torch.Tensor, int64: bool) -> torch.Tensor:
    """[4, programs]: what the first pass of the gradient found."""
    (tiles,), tile = pixel_grid(indices)
    programs = min(tiles, _MAX_REACH_PROGRAMS)
    dtype = torch.int64 if int64 else torch.int32
    reach = torch.empty((4, programs), dtype=dtype, device=indices.device)
    arguments = {
        "indices_ptr": indices,
        "reach_ptr": reach,
        **sizes(dx, indices, indices),
        "tiles": tiles,
        **named_strides("i", "nchw", indices),
        "INT64": int64,
    }
    launch(_max_pool2d_reach_kernel, (programs,), arguments, tile)
    return reach


def max_pool2d_gather(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """``nnarch::max_pool2d_gather``."""
    check_dtype("max_pool2d_gather", x)
    y = library.new_output(x, indices.shape)
    x_view, indices_view, y_view = merge_planes(x, indices, y)
    grid, tile = pixel_grid(y_view)
    arguments = {
        "x_ptr": x,
        "indices_ptr": indices,
        "y_ptr": y,
        **sizes(x_view, y_view, y_view),
        **named_strides("x", "nchw", x_view),
        **named_strides("i", "nchw", indices_view),
        **named_strides("y", "nchw", y_view),
        "INT64": index_64(x_view, y_view, indices_view),
    }
    with device_guard(x):
        launch(_max_pool2d_gather_kernel, grid, arguments, tile)
    return y
