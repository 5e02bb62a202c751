"""Max unpooling on the GPU.

Several inputs may have the same index, and the last one counts, whatever order programs run in: a
first pass leaves the greatest position of an input at every output, a second copies or clears.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.gpu.launch import check_dtype, device_guard, launch, named_strides
from nnarch.kernels.pooling.triton_tile import (
    index_64,
    merge_planes,
    pixel_grid,
    pixel_tile,
    sizes,
)


@triton.jit
def _last_position_kernel(
    indices_ptr,  # [N, C, height, width] int64, flat over out_height·out_width
    last_ptr,  # [N, C, out_height·out_width], -1 before
    pixels,
    channels,
    height,
    width,
    out_height,
    out_width,
    stride_in,
    stride_ic,
    stride_ih,
    stride_iw,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """last[index of input p] = max(p); an index outside the output is dropped."""
    n, h, w, c, inside = pixel_tile(pixels, channels, height, width, INT64, BLOCK_P, BLOCK_C)
    i_offset = n * stride_in + c * stride_ic + h * stride_ih + w * stride_iw
    index = tl.load(indices_ptr + i_offset, mask=inside, other=-1)
    area = out_height * out_width
    valid = inside & (index >= 0) & (index < area)
    if not INT64:
        index = index.to(tl.int32)
    position = (h * width + w).to(tl.int32) + tl.zeros((BLOCK_P, BLOCK_C), tl.int32)
    tl.atomic_max(last_ptr + ((n * channels + c) * area + index), position, mask=valid)


@triton.jit
def _max_unpool2d_kernel(
    x_ptr,  # [N, C, height, width]
    last_ptr,  # [N, C, out_height·out_width]
    y_ptr,  # [N, C, out_height, out_width]
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
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = x at the last position, 0 where there is none."""
    n, oh, ow, c, inside = pixel_tile(
        pixels, channels, out_height, out_width, INT64, BLOCK_P, BLOCK_C
    )
    offset = ((n * channels + c) * out_height + oh) * out_width + ow
    position = tl.load(last_ptr + offset, mask=inside, other=-1)
    x_offset = n * stride_xn + c * stride_xc
    x_offset += position // width * stride_xh + position % width * stride_xw
    x = tl.load(x_ptr + x_offset, mask=inside & (position >= 0), other=0.0)
    y_offset = n * stride_yn + c * stride_yc + oh * stride_yh + ow * stride_yw
    tl.store(y_ptr + y_offset, x, mask=inside)


def max_unpool2d(
    x: torch.Tensor, indices: torch.Tensor, output_size: Sequence[int]
) -> torch.Tensor:
    """``nnarch::max_unpool2d``."""
    check_dtype("max_unpool2d", x)
    if x.shape[2] * x.shape[3] >= 2**31:
        raise NotImplementedError("backend 'triton' lacks nnarch::max_unpool2d for such planes")
    y = library.new_output(x, (*x.shape[:2], *output_size))
    last = torch.full(y.shape, -1, dtype=torch.int32, device=x.device)
    x_view, indices_view, y_view, last_view = merge_planes(x, indices, y, last)
    int64 = index_64(x_view, y_view, indices_view, last_view)
    with device_guard(x):
        grid, tile = pixel_grid(indices_view)
        arguments = {
            "indices_ptr": indices,
            "last_ptr": last,
            **sizes(x_view, y_view, x_view),
            **named_strides("i", "nchw", indices_view),
            "INT64": int64,
        }
        launch(_last_position_kernel, grid, arguments, tile)
        grid, tile = pixel_grid(y_view)
        arguments = {
            "x_ptr": x,
            "last_ptr": last,
            "y_ptr": y,
            **sizes(x_view, y_view, y_view),
            **named_strides("x", "nchw", x_view),
            **named_strides("y", "nchw", y_view),
            "INT64": int64,
        }
        launch(_max_unpool2d_kernel, grid, arguments, tile)
    return y
