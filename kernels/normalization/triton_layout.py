"""What the normalization kernels share: tensors as [N, C, L], the tile of a program, its host side.

L stands for the dimensions behind the channels. Kernels address [N, C, L] by three strides, so
NCHW, channels_last, slices and expanded gradients need no copy; where the images follow one
another with a constant step, as in channels_last, they become one long L.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.gpu.launch import cdiv, flat_grid
from nnarch.kernels.gpu.tiles import Tile, tile

_ELEMENTS = 1024
_WARPS = 4
_MAX_SPLITS = 256
_PROGRAMS = 1024  # as many as fill any GPU of today several times over
_MIN_TILES = 4  # of a split: fewer would write partial results rather than add


@triton.jit
def channel_columns(block, channels, INT64: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels of a block as a column [BLOCK_C, 1], and which of them exist."""
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    if INT64:
        c = c.to(tl.int64)
    return c[:, None], (c < channels)[:, None]


@triton.jit
def image_rows(index, length, INT64: tl.constexpr, BLOCK_L: tl.constexpr):
    """The image n and the positions [1, BLOCK_L] of row tile `index`, and which of them exist."""
    tiles = tl.cdiv(length, BLOCK_L)
    n = index // tiles
    l_block = index % tiles
    if INT64:
        n = n.to(tl.int64)
        l_block = l_block.to(tl.int64)
    position = l_block * BLOCK_L + tl.arange(0, BLOCK_L)
    return n, position[None, :], (position < length)[None, :]


@triton.jit
def elementwise_tile(
    channels, length, INT64: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr
):
    """This program's n, c: [BLOCK_C, 1], position: [1, BLOCK_L], and what exists, all and c."""
    blocks = tl.cdiv(channels, BLOCK_C)
    pid = tl.program_id(0)
    c, c_inside = channel_columns(pid % blocks, channels, INT64, BLOCK_C)
    n, position, inside = image_rows(pid // blocks, length, INT64, BLOCK_L)
    return n, c, position, c_inside & inside, c_inside


@triton.jit
def load_tile(ptr, n, c, position, stride_n, stride_c, stride_l, inside):
    """A tile in float32, 0 outside."""
    offset = n * stride_n + (c * stride_c + position * stride_l)
    return tl.load(ptr + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, value, n, c, position, stride_n, stride_c, stride_l, inside):
    """Store a tile in the element type of `ptr`."""
    offset = n * stride_n + (c * stride_c + position * stride_l)
    tl.store(ptr + offset, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_channels(ptr, c, c_inside):
    """One number per channel, float32, as a column."""
    return tl.load(ptr + c, mask=c_inside, other=0.0).to(tl.float32)


# ------------------------------------------------------------------------------------ host side


def as_ncl(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Views [N, C, L] of tensors of one shape, [1, C, N·L] where that is a view of all of them.

    A tensor whose dimensions behind the channels cannot be merged is copied.
    """
    views = [None if t is None else _merged(t) for t in tensors]
    given = [v for v in views if v is not None]
    length = given[0].shape[2]
    if all(length == 1 or v.stride(0) == length * v.stride(2) for v in given):
        return [None if v is None else _one_image(v) for v in views]
    return views


def _merged(t: torch.Tensor) -> torch.Tensor:
    size = (*t.shape[:2], math.prod(t.shape[2:]))
    try:
        return t.view(size)
    except RuntimeError:  # no view: rows apart, or transposed
        return t.contiguous().view(size)


def _one_image(v: torch.Tensor) -> torch.Tensor:
    n, c, length = v.shape
    step = v.stride(0) if length == 1 else v.stride(2)
    return v.as_strided((1, c, n * length), (0, v.stride(1), step))


def blocks(view: torch.Tensor) -> Tile:
    """BLOCK_C × BLOCK_L elements of [N, C, L], long in the direction in which memory runs."""
    _, channels, length = view.shape
    if view.stride(1) == 1 and channels > 1:
        block_c = min(triton.next_power_of_2(channels), 64)
        block_l = _ELEMENTS // block_c
    else:
        block_l = min(triton.next_power_of_2(length), *_long_blocks(length))
        block_c = _ELEMENTS // block_l
    return tile(BLOCK_C=block_c, BLOCK_L=block_l, num_warps=_WARPS)


def _long_blocks(length: int) -> list[int]:
    """Blocks of 256 to 1024, the one that wastes the fewest lanes first, the largest of equals."""
    return sorted((1024, 512, 256), key=lambda block: cdiv(length, block) * block)[:1]


def elementwise_grid(view: torch.Tensor, tile: Tile) -> tuple[int, ...]:
    """One program for each tile of [N, C, L]."""
    n, channels, length = view.shape
    return flat_grid(n * cdiv(length, tile["BLOCK_L"]) * cdiv(channels, tile["BLOCK_C"]))


def reduction_grid(view: torch.Tensor, tile: Tile) -> tuple[int, int, int]:
    """How a reduction over N and L is split.

    Returns:
        Row tiles of each channel block, row tiles of each split, and the number of splits; a
        function of the shape alone, so that results do not depend on the device.
    """
    n, channels, length = view.shape
    row_tiles = n * cdiv(length, tile["BLOCK_L"])
    wanted = max(1, _PROGRAMS // cdiv(channels, tile["BLOCK_C"]))
    splits = max(1, min(wanted, _MAX_SPLITS, row_tiles // _MIN_TILES))
    per_split = cdiv(row_tiles, splits)
    return row_tiles, per_split, cdiv(row_tiles, per_split)


def statistic(x: torch.Tensor) -> torch.Tensor:
    """A float32 tensor for one number per channel of `x`."""
    return torch.empty(x.shape[1], dtype=torch.float32, device=x.device)


def output_like(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of the shape and memory format of `x`."""
    return library.new_output(x, x.shape)
