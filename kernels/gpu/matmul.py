"""What the kernels that multiply matrices share: tiles, layout of operands, program order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.tiles import Tile, TileTable, matmul_cost, matmul_fits, tile


def matmul_tiles(*rows: tuple[int, int, int, int, int]) -> tuple[Tile, ...]:
    """Tiles from rows of BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages."""
    return tuple(
        tile(warps, stages, all_registers=True, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)
        for m, n, k, warps, stages in rows
    )


# BLOCK_M ≥ 64 throughout: HGMMA and tcgen05 multiply at least 64 rows. The last tiles of a list
# serve operands whose elements have an address each (few or oddly many channels).
MATMUL_TILES = {
    "half": matmul_tiles(
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 32, 4, 3),
        (128, 64, 64, 4, 3),
        (64, 64, 64, 4, 3),
        (128, 32, 64, 4, 3),
        (64, 64, 32, 4, 2),
        (64, 32, 32, 4, 2),
    ),
    "tf32": matmul_tiles(
        (128, 128, 32, 8, 3),
        (128, 64, 32, 4, 3),
        (64, 64, 32, 4, 3),
        (128, 32, 32, 4, 3),
        (64, 64, 16, 4, 2),
        (64, 32, 16, 4, 2),
    ),
    "ieee": matmul_tiles(
        (64, 64, 16, 4, 2),
        (64, 32, 16, 4, 2),
        (32, 32, 16, 4, 2),
    ),
}
MATMUL = TileTable("matmul", MATMUL_TILES, matmul_cost, matmul_fits)


def loads_vectors(*extents: int) -> bool:
    """Whether Triton reads operands with these row lengths and strides 16 bytes at a time.

    It specialises a kernel on every integer argument that 16 divides, and proves it from that.
    """
    return all(extent % 16 == 0 for extent in extents)


def loads_channel_vectors(x: torch.Tensor, channels: int) -> bool:
    """:func:`loads_vectors` for blocks of channels of an image [N, C, H, W]."""
    return x.stride(1) == 1 and loads_vectors(channels, x.stride(0), x.stride(2), x.stride(3))


def channels_innermost(x: torch.Tensor, channels: int) -> torch.Tensor:
    """[N, C, H, W] with C at stride 1, copied to it unless a group has only a few channels.

    The copy moves the tensor twice; without it every element of an operand has its own address.
    """
    if x.stride(1) == 1 or channels < 16:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def precision_of(dtype: torch.dtype, float32: str) -> str:
    """The key of a tile table: "half", or what float32 operands are multiplied with."""
    return float32 if dtype == torch.float32 else "half"


@triton.jit
def grouped_order(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column tile of a program, GROUP_M row tiles at a time: operands are reused in L2."""
    per_group = GROUP_M * tiles_n
    first = pid // per_group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % per_group % rows, pid % per_group // rows
