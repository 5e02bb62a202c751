"""What the kernels that multiply matrices share: tiles, layout of operands, program order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.split import best_split, split_count
from nnarch.kernels.gpu.targets import Target
from nnarch.kernels.gpu.tiles import ALL_REGISTERS, Problem, Tile, TileTable, tile

# Registers of a thread beside accumulators and addresses, from compiled kernels: loop state, row
# indices and, where matrix instructions read them from registers, operand fragments.
_OTHER_REGISTERS = {"registers": 96, "shared": 48}


def matmul_fits(problem: Problem, tile: Tile, target: Target) -> bool:
    """Shared memory and registers of a tile with BLOCK_M, BLOCK_N and BLOCK_K, two operands."""
    m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    # AMD's pipeline keeps one stage in registers; the CUDA one keeps every stage in shared memory.
    stages = max(1, tile.num_stages - 1) if target.backend == "hip" else tile.num_stages
    shared = stages * (m + n) * k * problem.itemsize
    threads = tile.num_warps * target.warp_size
    loads = (m + n) * k // threads
    if problem.vectors:
        loads = loads * problem.itemsize // 16
    registers = m * n // threads + 3 * loads + _OTHER_REGISTERS[target.operands]
    if problem.precision == "tf32x3":  # the second part of every operand
        if target.operands == "shared":
            shared += n * k * problem.itemsize
        else:
            registers += 3 * (m + n) * k // threads
    return shared <= target.shared_bytes and registers <= target.max_registers and threads <= 1024


def matmul_cost(problem: Problem, tile: Tile, target: Target) -> float:
    """Relative time of an output-tiled product: padding, whole waves, and the best split counted.

    A tile's rate is taken as limited by operand traffic: BLOCK_M·BLOCK_N/(BLOCK_M + BLOCK_N)
    multiply-adds for each element it loads, saturating where the matrix units are the limit (the
    36 is fitted to an H100: test_measured_tiles.py).
    """
    m, n, k = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
    programs = triton.cdiv(problem.m, m) * triton.cdiv(problem.n, n)
    _, steps = best_split(programs, triton.cdiv(problem.k, k), target.processors, (m, n, k))
    intensity = m * n / (m + n)
    rate = intensity / (intensity + 36)
    return steps * m * n * k / rate


def matmul_split(tile: Tile, tiles: int, steps: int) -> int:
    """Into how many parts a product of `tiles` tiles and `steps` steps is split."""
    return split_count(tiles, steps, (tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]))


def matmul_tiles(*rows: tuple[int, int, int, int, int]) -> tuple[Tile, ...]:
    """Tiles from rows of BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages."""
    return tuple(
        tile(warps, stages, registers=ALL_REGISTERS, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)
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
        (128, 256, 32, 8, 3),
        (128, 128, 32, 8, 3),
        (128, 64, 32, 4, 3),
        (64, 64, 32, 4, 3),
        (128, 32, 32, 4, 3),
        (64, 64, 16, 4, 2),
        (64, 32, 16, 4, 2),
    ),
    "tf32x3": matmul_tiles(  # 128×64 with 4 warps is up to 5 % faster, but spills in convolutions
        (128, 128, 32, 8, 3),
        (128, 64, 32, 8, 3),
        (64, 128, 32, 4, 3),
        (64, 64, 32, 4, 3),
        (64, 64, 16, 4, 2),
        (64, 32, 16, 4, 2),
    ),
    "ieee": matmul_tiles(
        (64, 64, 16, 8, 2),  # without matrix instructions operands take registers: 4 warps spill
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
