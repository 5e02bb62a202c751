"""Upsampling on the GPU, nearest and bilinear, and its gradient, gathered without atomics.

A program computes BLOCK_P pixels × BLOCK_C channels of its output, for any strides. Where an output
lies between its inputs is computed in float32 by the formula of the forward pass, in the gradient
too: it looks at all outputs that might have used an input and weighs those that did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.gpu.launch import check_dtype, device_guard, launch, named_strides
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.pooling.triton_tile import (
    index_64,
    merge_planes,
    pair,
    pixel_grid,
    pixel_tile,
    sizes,
)


@triton.jit
def _source(at, step, size, BILINEAR: tl.constexpr, CORNERS: tl.constexpr, SAME: tl.constexpr):
    """The two inputs that output position `at` lies between, and its part of the second."""
    if SAME and BILINEAR:
        return at, at, at.to(tl.float32) * 0.0
    position = at.to(tl.float32)
    if BILINEAR and not CORNERS:
        position = tl.maximum((position + 0.5) * step - 0.5, 0.0)
    else:
        position = position * step
    first = tl.minimum(tl.floor(position).to(tl.int32), size - 1)
    if not BILINEAR:
        return first, first, position * 0.0
    part = tl.minimum(tl.maximum(position - first.to(tl.float32), 0.0), 1.0)
    return first, tl.minimum(first + 1, size - 1), part


@triton.jit
def _upsample2d_fwd_kernel(
    x_ptr,  # [N, C, height, width]
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
    step_h,
    step_w,
    BILINEAR: tl.constexpr,
    CORNERS: tl.constexpr,
    SAME_H: tl.constexpr,
    SAME_W: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y of a pixel: a copy, or what four neighbours weigh."""
    n, oh, ow, c, inside = pixel_tile(
        pixels, channels, out_height, out_width, INT64, BLOCK_P, BLOCK_C
    )
    top, bottom, down = _source(oh, step_h, height, BILINEAR, CORNERS, SAME_H)
    left, right, across = _source(ow, step_w, width, BILINEAR, CORNERS, SAME_W)
    if INT64:
        top, bottom, left, right = (
            top.to(tl.int64),
            bottom.to(tl.int64),
            left.to(tl.int64),
            right.to(tl.int64),
        )
    x_row = x_ptr + n * stride_xn + c * stride_xc
    y_offset = n * stride_yn + c * stride_yc + oh * stride_yh + ow * stride_yw
    a = tl.load(x_row + (top * stride_xh + left * stride_xw), mask=inside, other=0.0)
    if BILINEAR:
        b = tl.load(x_row + (top * stride_xh + right * stride_xw), mask=inside, other=0.0)
        d = tl.load(x_row + (bottom * stride_xh + left * stride_xw), mask=inside, other=0.0)
        e = tl.load(x_row + (bottom * stride_xh + right * stride_xw), mask=inside, other=0.0)
        above = a.to(tl.float32) * (1.0 - across) + b.to(tl.float32) * across
        below = d.to(tl.float32) * (1.0 - across) + e.to(tl.float32) * across
        y = above * (1.0 - down) + below * down
        tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(y_ptr + y_offset, a, mask=inside)


@triton.jit
def _first_output(at, step, out_size, CORNERS: tl.constexpr, COVER: tl.constexpr):
    """An output before or at the first that may have used input `at`, COVER of which exist."""
    position = at.to(tl.float32) - 1.0
    guess = position / step if CORNERS else (position + 0.5) / step - 0.5
    guess = tl.where(step > 0.0, guess, 0.0)  # of one output alone
    # As float32 by a sum: of a size that is 1 the compiler makes a constant, which has no `.to`.
    last = guess * 0.0 + (out_size - COVER)
    return tl.minimum(tl.maximum(tl.floor(guess) - 1.0, 0.0), last).to(tl.int32)


@triton.jit
def _weight(out, at, step, size, BILINEAR: tl.constexpr, CORNERS: tl.constexpr, SAME: tl.constexpr):
    """The part of input `at` in output `out`, and whether it has one."""
    first, second, part = _source(out, step, size, BILINEAR, CORNERS, SAME)
    weight = tl.where(first == at, 1.0 - part, 0.0)
    if BILINEAR:
        weight += tl.where(second == at, part, 0.0)
    return weight, (first == at) | (second == at)


@triton.jit
def _upsample2d_bwd_kernel(
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
    step_h,
    step_w,
    BILINEAR: tl.constexpr,
    CORNERS: tl.constexpr,
    SAME_H: tl.constexpr,
    SAME_W: tl.constexpr,
    COVER_H: tl.constexpr,
    COVER_W: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx of a pixel: the gradients of the outputs that used it, by the parts they used."""
    n, h, w, c, inside = pixel_tile(pixels, channels, height, width, INT64, BLOCK_P, BLOCK_C)
    grad_row = grad_ptr + n * stride_gn + c * stride_gc
    first_h = _first_output(h, step_h, out_height, CORNERS, COVER_H)
    first_w = _first_output(w, step_w, out_width, CORNERS, COVER_W)
    acc = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for i in tl.range(0, COVER_H):
        oh = first_h + i
        down, used_h = _weight(oh, h, step_h, height, BILINEAR, CORNERS, SAME_H)
        for j in tl.range(0, COVER_W):
            ow = first_w + j
            across, used_w = _weight(ow, w, step_w, width, BILINEAR, CORNERS, SAME_W)
            row, column = oh, ow
            if INT64:
                row, column = oh.to(tl.int64), ow.to(tl.int64)
            grad = tl.load(
                grad_row + (row * stride_gh + column * stride_gw),
                mask=inside & used_h & used_w,
                other=0.0,
            )
            acc += grad.to(tl.float32) * (down * across)
    dx_offset = n * stride_dn + c * stride_dc + h * stride_dh + w * stride_dw
    tl.store(dx_ptr + dx_offset, acc.to(dx_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------- launchers


def upsample2d(
    x: torch.Tensor,
    output_size: Sequence[int],
    bilinear: bool,
    align_corners: bool,
    scale_h: float,
    scale_w: float,
) -> torch.Tensor:
    """``nnarch::upsample2d``."""
    check_dtype("upsample2d", x)
    y = library.new_output(x, (*x.shape[:2], *output_size))
    x_view, y_view = merge_planes(x, y)
    grid, tile = pixel_grid(y_view)
    arguments = {
        "x_ptr": x,
        "y_ptr": y,
        **sizes(x_view, y_view, y_view),
        **named_strides("x", "nchw", x_view),
        **named_strides("y", "nchw", y_view),
        **_positions(x.shape[2:], output_size, bilinear, align_corners, (scale_h, scale_w)),
        "INT64": index_64(x_view, y_view),
    }
    with device_guard(x):
        launch(_upsample2d_fwd_kernel, grid, arguments, tile)
    return y


def upsample2d_input_grad(
    grad: torch.Tensor,
    input_size: Sequence[int],
    bilinear: bool,
    align_corners: bool,
    scale_h: float,
    scale_w: float,
) -> torch.Tensor:
    """``nnarch::upsample2d_input_grad``."""
    check_dtype("upsample2d_input_grad", grad)
    dx = library.new_output(grad, input_size)
    grad_view, dx_view = merge_planes(grad, dx)
    grid, tile = pixel_grid(dx_view)
    positions = _positions(
        input_size[2:], grad.shape[2:], bilinear, align_corners, (scale_h, scale_w)
    )
    cover = [
        _cover(positions[f"step_{axis}"], size, bilinear)
        for axis, size in zip("hw", grad.shape[2:], strict=True)
    ]
    arguments = {
        "grad_ptr": grad,
        "dx_ptr": dx,
        **sizes(dx_view, grad_view, dx_view),
        **named_strides("g", "nchw", grad_view),
        **named_strides("d", "nchw", dx_view),
        **positions,
        **pair("COVER", cover),
        "INT64": index_64(dx_view, grad_view),
    }
    with device_guard(grad):
        launch(_upsample2d_bwd_kernel, grid, arguments, tile)
    return dx


def _positions(
    size: Sequence[int],
    out_size: Sequence[int],
    bilinear: bool,
    align_corners: bool,
    scales: Sequence[float],
) -> dict[str, Any]:
    """The arguments that say where outputs lie."""
    steps = []
    for inputs, outputs, scale in zip(size, out_size, scales, strict=True):
        given = scale > 0 and (bilinear or outputs not in (inputs, 2 * inputs))
        step = 1 / scale if given else inputs / outputs
        if bilinear and align_corners:
            step = (inputs - 1) / (outputs - 1) if outputs > 1 else 0.0
        steps.append(float(step))
    return {
        **pair("step", steps),
        "BILINEAR": bilinear,
        "CORNERS": bilinear and align_corners,
        **pair("SAME", [a == b for a, b in zip(size, out_size, strict=True)]),
    }


def _cover(step: float, out_size: int, bilinear: bool) -> int:
    """Outputs that may have used one input, with two to spare on both sides."""
    if step * out_size < 1:  # all lie before the second input
        return int(out_size)
    return min(int(out_size), math.ceil(2 / step) + 4)


# ------------------------------------------------------------------------------ static checks

_SMALL, _LARGE = (8, 64, 56, 56), (8, 64, 112, 112)  # the decoder of a U-Net
_COUNT = float(torch.Size(_SMALL).numel() + torch.Size(_LARGE).numel())


def _forward_case(dtype: torch.dtype, bilinear: bool, channels_last: bool) -> None:
    x = meta(*_SMALL, dtype=dtype, channels_last=channels_last)
    upsample2d(x, _LARGE[2:], bilinear, False, 2.0, 2.0)


def _backward_case(dtype: torch.dtype, bilinear: bool, channels_last: bool) -> None:
    grad = meta(*_LARGE, dtype=dtype, channels_last=channels_last)
    upsample2d_input_grad(grad, _SMALL, bilinear, False, 2.0, 2.0)


STATIC_CASES = [
    StaticCase(
        f"{operation} {'bilinear' if bilinear else 'nearest'} ×2 C64 H56 N8"
        + ("" if channels_last else " NCHW"),
        lambda dtype, run=run, bilinear=bilinear, last=channels_last: run(dtype, bilinear, last),
        flops=8 * _COUNT,
        elements=_COUNT,
    )
    for operation, run in (
        ("upsample2d", _forward_case),
        ("upsample2d_input_grad", _backward_case),
    )
    for bilinear in (False, True)
    for channels_last in (True, False)
]
