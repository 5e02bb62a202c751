"""Local response normalization on the GPU: one pass over memory forward, one backward.

A program computes BLOCK_P pixels × BLOCK_C channels. Windows are read tap by tap: a tensor comes
from memory once and its neighbours' reads from the first-level cache. The backward pass computes
the energy again for every channel whose window holds its own, instead of keeping it.
"""

from __future__ import annotations

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
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.gpu.tiles import Tile, tile

_ELEMENTS = 512  # of a tile: 4 a thread
_MAX_UNROLL = 9

_ANY, _THREE_QUARTERS, _HALF, _NONE = range(4)  # how s^-beta is computed
_POWERS = {0.75: _THREE_QUARTERS, 0.5: _HALF, 0.0: _NONE}


@triton.jit
def _tile_of(
    pixels, channels, size, INT64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):
    """This program's part of [N, channels, size], where pixels = N·size.

    Returns n, i: [BLOCK_P, 1]; c: [1, BLOCK_C]; inside: [BLOCK_P, BLOCK_C], what exists.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    block = pid // channel_blocks
    c = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    if INT64:
        block = block.to(tl.int64)
        c = c.to(tl.int64)
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    return (p // size)[:, None], (p % size)[:, None], c[None, :], inside


@triton.jit
def _response(x_row, c, channels, stride_xc, inside, RELU: tl.constexpr):
    """x of channel c, or relu(x); 0 where there is none."""
    valid = inside & (c >= 0) & (c < channels)
    x = tl.load(x_row + c * stride_xc, mask=valid, other=0.0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0.0, 0.0, x)
    return x


@triton.jit
def _energy(
    x_row, c, channels, stride_xc, inside, scale, k,
    BEFORE: tl.constexpr, SIZE: tl.constexpr, RELU: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """s = k + scale · Σ r² of the window around channel c."""
    total = tl.zeros(inside.shape, tl.float32)
    for tap in tl.range(0, SIZE, loop_unroll_factor=UNROLL):
        r = _response(x_row, c + (tap - BEFORE), channels, stride_xc, inside, RELU)
        total += r * r
    return k + scale * total


@triton.jit
def _inverse_power(s, beta, POWER: tl.constexpr):
    """s^-beta for s >= 0; NaN where s is negative."""
    if POWER == 1:
        root = tl.rsqrt(s)
        return root * tl.sqrt(root)
    elif POWER == 2:
        return tl.rsqrt(s)
    elif POWER == 3:
        return s * 0.0 + 1.0
    else:
        return tl.exp2(-beta * tl.log2(s))


@triton.jit
def _local_response_norm_fwd_kernel(
    x_ptr,
    y_ptr,
    pixels,
    channels,
    size,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_yn,
    stride_yc,
    stride_yl,
    scale,
    beta,
    k,
    BEFORE: tl.constexpr,
    SIZE: tl.constexpr,
    POWER: tl.constexpr,
    RELU: tl.constexpr,
    UNROLL: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = r · s^-beta"""
    n, i, c, inside = _tile_of(pixels, channels, size, INT64, BLOCK_P, BLOCK_C)
    x_row = x_ptr + n * stride_xn + i * stride_xl
    r = _response(x_row, c, channels, stride_xc, inside, RELU)
    s = _energy(x_row, c, channels, stride_xc, inside, scale, k, BEFORE, SIZE, RELU, UNROLL)
    y = r * _inverse_power(s, beta, POWER)
    y_offset = n * stride_yn + c * stride_yc + i * stride_yl
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _local_response_norm_bwd_kernel(
    grad_ptr,
    x_ptr,
    dx_ptr,
    pixels,
    channels,
    size,
    stride_gn,
    stride_gc,
    stride_gl,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_dn,
    stride_dc,
    stride_dl,
    scale,
    beta,
    k,
    BEFORE: tl.constexpr,
    SIZE: tl.constexpr,
    POWER: tl.constexpr,
    RELU: tl.constexpr,
    UNROLL: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = grad·p - 2·scale·beta·r · Σ grad·r·p/s over the channels whose windows hold c."""
    n, i, c, inside = _tile_of(pixels, channels, size, INT64, BLOCK_P, BLOCK_C)
    x_row = x_ptr + n * stride_xn + i * stride_xl
    grad_row = grad_ptr + n * stride_gn + i * stride_gl
    through = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    direct = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for tap in tl.range(0, SIZE):
        j = c + (BEFORE + 1 - SIZE + tap)
        valid = inside & (j >= 0) & (j < channels)
        s = _energy(x_row, j, channels, stride_xc, inside, scale, k, BEFORE, SIZE, RELU, UNROLL)
        r = _response(x_row, j, channels, stride_xc, inside, RELU)
        grad = tl.load(grad_row + j * stride_gc, mask=valid, other=0.0).to(tl.float32)
        gp = grad * _inverse_power(s, beta, POWER)
        # k may be 0, and then s where there is no channel.
        through += tl.where(valid, gp * r / s, 0.0)
        direct = tl.where(tap == SIZE - 1 - BEFORE, gp, direct)
    r = _response(x_row, c, channels, stride_xc, inside, RELU)
    dx = direct - 2.0 * scale * beta * r * through
    if RELU:
        x = tl.load(x_row + c * stride_xc, mask=inside, other=0.0).to(tl.float32)
        dx = tl.where(x <= 0.0, 0.0, dx)
    dx_offset = n * stride_dn + c * stride_dc + i * stride_dl
    tl.store(dx_ptr + dx_offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------- launchers


def local_response_norm(
    x: torch.Tensor, size: int, scale: float, beta: float, k: float, relu: bool
) -> torch.Tensor:
    """``nnarch::local_response_norm``."""
    _check("local_response_norm", scale, k, x)
    y = library.new_output(x, x.shape)
    tensors = {"x": x, "y": y}
    _launch(_local_response_norm_fwd_kernel, tensors, y, size, scale, beta, k, relu)
    return y


def local_response_norm_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    relu: bool,
) -> torch.Tensor:
    """``nnarch::local_response_norm_grad``."""
    _check("local_response_norm_grad", scale, k, grad, x)
    dx = library.new_output(x, x.shape)
    tensors = {"grad": grad, "x": x, "dx": dx}
    _launch(_local_response_norm_bwd_kernel, tensors, dx, size, scale, beta, k, relu)
    return dx


def _check(op: str, scale: float, k: float, *tensors: torch.Tensor) -> None:
    check_dtype(op, *tensors)
    if not (scale >= 0 and k >= 0):  # powers of negative numbers
        raise NotImplementedError(f"backend 'triton' lacks nnarch::{op} for negative alpha or k")


def _launch(
    kernel: object,
    tensors: dict[str, torch.Tensor],
    out: torch.Tensor,
    size: int,
    scale: float,
    beta: float,
    k: float,
    relu: bool,
) -> None:
    if out.numel() == 0:
        return
    flat = {name: t.flatten(2) for name, t in tensors.items()}
    views = list(flat.values())
    n, channels, length = out.flatten(2).shape
    block = _blocks(views[-1])
    # Windows of more channels than there are need no more taps than that.
    before, after = min(size // 2, channels), min((size - 1) // 2, channels)
    arguments = {
        **{f"{name}_ptr": t for name, t in flat.items()},
        **{"pixels": n * length, "channels": channels, "size": length},
        **{"scale": float(scale), "beta": float(beta), "k": float(k)},
        **{"BEFORE": before, "SIZE": before + after + 1},
        **{"POWER": _POWERS.get(beta, _ANY), "RELU": relu},
        "UNROLL": before + after + 1 if before + after < _MAX_UNROLL else 4,
        "INT64": needs_int64(*views),
    }
    for name, t in flat.items():
        arguments |= named_strides({"grad": "g", "dx": "d"}.get(name, name), "ncl", t)
    programs = cdiv(n * length, block["BLOCK_P"]) * cdiv(channels, block["BLOCK_C"])
    with device_guard(out):
        launch(kernel, flat_grid(programs), arguments, block)


def _blocks(out: torch.Tensor) -> Tile:
    """Neighbours in memory side by side: channels, or pixels of one channel."""
    channels = out.shape[1]
    inner = min(64, triton.next_power_of_2(channels)) if out.stride(1) == 1 else 1
    return tile(BLOCK_P=_ELEMENTS // inner, BLOCK_C=inner, num_warps=4)


# ------------------------------------------------------------------------------ static checks

_SIZE = (8, 96, 55, 55)  # AlexNet's first layer
_COUNT = float(torch.Size(_SIZE).numel())


def _forward_case(dtype: torch.dtype, *, channels_last: bool) -> None:
    x = meta(*_SIZE, dtype=dtype, channels_last=channels_last)
    local_response_norm(x, 5, 2e-5, 0.75, 2.0, True)


def _backward_case(dtype: torch.dtype, *, channels_last: bool) -> None:
    x = meta(*_SIZE, dtype=dtype, channels_last=channels_last)
    local_response_norm_grad(x, x, 5, 2e-5, 0.75, 2.0, True)


STATIC_CASES = [
    StaticCase(
        f"{operation} 5 C96 H55 N8{'' if channels_last else ' NCHW'}",
        lambda dtype, run=run, channels_last=channels_last: run(dtype, channels_last=channels_last),
        flops=flops * _COUNT,
        elements=tensors * _COUNT,
    )
    for operation, run, flops, tensors in (
        ("local_response_norm", _forward_case, 20, 2),
        ("local_response_norm_grad", _backward_case, 130, 3),
    )
    for channels_last in (True, False)
]
