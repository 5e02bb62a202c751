"""What the pooling kernels share: the tile of a program, windows, and the host side of both.

A program computes BLOCK_P pixels × BLOCK_C channels of its output, whatever is gathered for them:
windows of the input in a forward pass, windows that cover the pixel in a backward pass. Every
tensor is addressed by its four strides, so NCHW, channels_last, slices and expanded gradients need
no copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.launch import cdiv, flat_grid, needs_int64
from nnarch.kernels.gpu.tiles import Tile, tile

_THREADS = 128
_FEW_PROGRAMS = 1024  # of full tiles: below it, smaller ones keep more processors busy
_MAX_UNROLL = 9  # taps of a 3×3 window: their loads are then in flight together


@triton.jit
def pixel_tile(
    pixels,  # N·height·width
    channels,
    height,
    width,
    INT64: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """This program's pixels and channels of a tensor [N, channels, height, width].

    Returns n, h, w: [BLOCK_P, 1]; c: [1, BLOCK_C]; inside: [BLOCK_P, BLOCK_C], what exists.
    """
    channel_blocks = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    p_block = pid // channel_blocks
    c = pid % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    if INT64:
        p_block = p_block.to(tl.int64)
        c = c.to(tl.int64)
    p = p_block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    n = p // (height * width)
    h = p // width % height
    w = p % width
    return n[:, None], h[:, None], w[:, None], c[None, :], inside


@triton.jit
def window(out, size, out_size, stride, padding, KERNEL: tl.constexpr, ADAPTIVE: tl.constexpr):
    """First position of the window of output position `out`, and the position after its last.

    Both are positions of the unpadded input and may lie outside it, unless ADAPTIVE.
    """
    if ADAPTIVE:
        first = out * size // out_size
        end = ((out + 1) * size + out_size - 1) // out_size
    else:
        first = out * stride - padding
        end = first + KERNEL
    return first, end


@triton.jit
def covering_windows(
    at, size, out_size, stride, padding, KERNEL: tl.constexpr, ADAPTIVE: tl.constexpr
):
    """First and last output position whose window covers input position `at`; last may be less."""
    if ADAPTIVE:
        first = at * out_size // size
        last = ((at + 1) * out_size + size - 1) // size - 1
    else:
        # Rounded up; the numerator is kept from being negative, where // rounds towards zero.
        first = tl.maximum(at + padding - KERNEL + stride, 0) // stride
        last = tl.minimum((at + padding) // stride, out_size - 1)
    return first, last


def merge_planes(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors as [N·C, 1, H, W], where that is a view of all of them; else as they are.

    NCHW planes that follow one another then fill a tile with pixels of several planes, which small
    images need.
    """
    if all(t.stride(0) == t.shape[1] * t.stride(1) for t in tensors):
        return tuple(t.flatten(0, 1).unsqueeze(1) for t in tensors)
    return tensors


def pixel_grid(out: torch.Tensor) -> tuple[tuple[int, ...], Tile]:
    """Grid and tile of the kernel that computes `out`.

    A thread moves 8 neighbouring channels. Along the pixels of a plane windows start `stride`
    apart, so a thread's elements are no neighbours there and two of them are enough.
    """
    n, c, h, w = out.shape
    threads = _THREADS
    if out.stride(1) == 1 and c > 1:
        elements, block_c = threads * 8, _channel_block(c)
    else:
        if out.numel() < _FEW_PROGRAMS * threads * 2:
            threads = 32
        elements, block_c = threads * 2, 1
    block_p = elements // block_c
    programs = cdiv(n * h * w, block_p) * cdiv(c, block_c)
    return flat_grid(programs), tile(BLOCK_P=block_p, BLOCK_C=block_c, num_warps=threads // 32)


def _channel_block(channels: int) -> int:
    """A power of two from 32 to 128 that wastes the fewest lanes, the largest of equals."""
    if channels < 32:
        return triton.next_power_of_2(channels)
    return min((128, 64, 32), key=lambda block: cdiv(channels, block) * block)


def sizes(image: torch.Tensor, pooled: torch.Tensor, out: torch.Tensor) -> dict[str, int]:
    """The size arguments of a kernel that computes `out`, which is one of the first two."""
    n, c, h, w = out.shape
    return {
        "pixels": n * h * w,
        "channels": c,
        "height": image.shape[2],
        "width": image.shape[3],
        "out_height": pooled.shape[2],
        "out_width": pooled.shape[3],
    }


def index_64(image: torch.Tensor, pooled: torch.Tensor, *others: torch.Tensor) -> bool:
    """The constexpr INT64: whether an offset, or a position scaled by a size, can pass 2**31.

    Args:
        image: the input, or its gradient.
        pooled: the output, or its gradient.
        others: further tensors that the kernel addresses.
    """
    height, width = image.shape[2:]
    scaled = max(height * (pooled.shape[2] + 1), width * (pooled.shape[3] + 1), height * width)
    return needs_int64(image, pooled, *others) or scaled >= 2**29


def adaptive_span(size: int, out_size: int) -> int:
    """Most positions of `size` in one adaptive window of `out_size` (exact where one divides).

    With the arguments exchanged: the most windows that cover one position.
    """
    if out_size == 0 or size % out_size == 0:
        return size // max(out_size, 1)
    if out_size % size == 0:
        return 1
    return cdiv(size, out_size) + 1


def pair(name: str, values: Sequence[Any]) -> dict[str, Any]:
    """{name_h: ..., name_w: ...}: a kernel's arguments from one of the operation's pairs.

    The suffix is a capital where the name is, as constexpr arguments are named.
    """
    h, w = ("H", "W") if name.isupper() else ("h", "w")
    return {f"{name}_{h}": values[0], f"{name}_{w}": values[1]}


def unroll(taps: int) -> int:
    """How many taps of a loop over `taps` the compiler is asked to unroll."""
    return taps if taps <= _MAX_UNROLL else 4
