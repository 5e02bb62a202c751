"""The tiles of attention's Triton kernels: tables, what fits, who reads by tensor descriptors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nnarch.kernels.gpu.targets import Target
from nnarch.kernels.gpu.tiles import ALL_REGISTERS, Problem, Tile, TileTable, tile

DEEPEST = 256
"""The widest head that the tiles hold."""

CHUNK = 32
"""Columns of a head that :func:`row_products` takes at a time."""

# BLOCK_M, BLOCK_N, warps, stages, and the widest heads at which a compiled kernel does not spill:
# on targets whose matrix instructions read operands from registers, from shared memory, on AMD's.
# A pair stands for sm_90 and sm_100 where they differ, a set for the widths themselves where the
# widest, read in chunks, take less than those before. Then, where it was measured on an H100, the
# relative time of a query and key, in the units of `attention_cost`.
Widest = int | set[int]
TileRow = tuple[Widest | float | tuple[Widest, Widest], ...]


@dataclass(frozen=True)
class DescribedTile:
    """A tile of half types that reads by tensor descriptors, on sm_90, where it was measured.

    Attributes:
        sizes: BLOCK_M, BLOCK_N, warps, stages.
        widest: heads at which it does not spill.
        measured: the relative time of a query and key, as in a row.
        one_loop: whether one loop goes through all tiles, with a branch at the band's edges.
        registers: of a thread, fewer where one block more then runs beside the others.
    """

    sizes: tuple[int, int, int, int]
    widest: int
    measured: float
    one_loop: bool = True
    registers: int = ALL_REGISTERS

    def tile(self) -> Tile:
        m, n, warps, stages = self.sizes
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "DESCRIPTORS": True, "ONE_LOOP": self.one_loop}
        return tile(warps, stages, self.registers, **blocks)


def attention_table(
    name: str,
    shared: Callable[[int, int, int], int],
    widest: int,
    described: Sequence[DescribedTile] = (),
    **rows: list[TileRow],
) -> TileTable:
    """A table of tiles of queries × keys.

    Args:
        name: of the table.
        shared: rows of a head in shared memory, from BLOCK_M, BLOCK_N and the stages.
        widest: as of :func:`reads_chunks`.
        described: more tiles of half types.
        rows: by precision.
    """
    tiles, deepest, measured = {}, {}, {}
    for precision, entries in rows.items():
        made = []
        for m, n, warps, stages, *depths in entries:
            made.append(tile(warps, stages, ALL_REGISTERS, BLOCK_M=m, BLOCK_N=n))
            deepest[precision, made[-1]] = depths[:3]
            measured[precision, made[-1]] = depths[3] if len(depths) > 3 else 0.0
        tiles[precision] = tuple(made)
    for row in described:
        deepest["half", row.tile()] = (0, (row.widest, 0), 0)
        measured["half", row.tile()] = row.measured
        tiles["half"] += (row.tile(),)

    def fits(problem: Problem, tile: Tile, target: Target) -> bool:
        kind = 2 if target.backend == "hip" else int(target.operands == "shared")
        # AMD's pipeline keeps one stage in registers.
        stages = tile.num_stages - 1 if target.backend == "hip" else tile.num_stages
        width = min(problem.k, CHUNK) if reads_chunks(problem, widest) else problem.k
        size = shared(tile["BLOCK_M"], tile["BLOCK_N"], max(1, stages)) * width * problem.itemsize
        depth = deepest[problem.precision, tile][kind]
        if isinstance(depth, tuple):
            depth = depth[target.name != "sm_90"]
        whole = problem.vectors and not reads_chunks(problem, widest)
        if dict(tile.block).get("DESCRIPTORS", False) and not (target.descriptors and whole):
            return False
        holds = problem.k in depth if isinstance(depth, set) else problem.k <= depth
        return holds and size <= target.shared_bytes

    def cost(problem: Problem, tile: Tile, target: Target) -> float:
        return attention_cost(problem, tile, measured[problem.precision, tile])

    return TileTable(name, tiles, cost, fits)


def narrowed(
    rows: dict[str, list[TileRow]], **changes: dict[tuple[int, ...], TileRow]
) -> dict[str, list[TileRow]]:
    """Rows of a table for calls with a mask or dropout, which spill at narrower heads.

    Args:
        rows: of the table for calls without, by precision.
        changes: by precision and (BLOCK_M, BLOCK_N, warps, stages), the three widest heads; (0, 0,
            0) leaves the tile out, and one that the rows lack is added.
    """
    made = {}
    for precision, entries in rows.items():
        found = dict(changes.get(precision, {}))
        kept = []
        for row in entries:
            depths = found.pop(tuple(map(int, row[:4])), row[4:7])  # type: ignore[arg-type]
            if any(depths):
                kept.append((*row[:4], *depths, *row[7:]))
        made[precision] = kept + [(*key, *depths) for key, depths in found.items()]
    return made


def reads_chunks(problem: Problem, widest: int) -> bool:
    """Whether scores are multiplied chunk by chunk; problem.k is the padded width of a head, and
    `widest` what TF32 products take whole; half types take twice as much, and products of the two
    parts of float32 half as much."""
    whole = {"ieee": 0, "tf32x3": widest // 2, "tf32": widest, "half": 2 * widest}
    return problem.k > whole[problem.precision]


def attention_cost(problem: Problem, tile: Tile, measured: float) -> float:
    """Relative time of a head: padded tiles and a first one that is waited for, each by what was
    measured or else by how often its operands are used."""
    m, n = tile["BLOCK_M"], tile["BLOCK_N"]
    area = triton.cdiv(problem.m, m) * m * (triton.cdiv(problem.n, n) + 1) * n
    used = (1 + 24 * (1 / m + 1 / n)) * (1.02 if tile.num_stages == 1 else 1.0)
    return area * (measured or used)


def describable(*tensors: Tensor | None) -> bool:
    """Whether the tensor memory accelerator can read these tensors: the last dimension's elements
    adjacent, everything else on 16 bytes."""
    return all(
        t.stride(-1) == 1
        and t.data_ptr() % 16 == 0
        and all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
        if t is not None
    )


def described(tile: Tile, tensors: dict[str, Tensor]) -> dict[str, object]:
    """Tensor descriptors in the place of pointers, where a tile asks for them.

    Args:
        tile: of the launch.
        tensors: [B, H, rows, D] or [B, H, rows], by the kernel's argument; read BLOCK_M queries or
            BLOCK_N keys of one head at a time.
    """
    if not dict(tile.block).get("DESCRIPTORS", False):
        return {}
    found: dict[str, object] = {}
    for name, t in tensors.items():
        rows = tile["BLOCK_N" if name in ("k_ptr", "v_ptr") else "BLOCK_M"]
        block = [1, 1, rows, *map(padded, t.shape[3:])]
        found[name] = TensorDescriptor(t, list(t.shape), list(t.stride()), block)
    return found


def padded(depth: int) -> int:
    """A head's width as the tiles hold it: a power of two, no less than a matrix instruction's."""
    return max(16, triton.next_power_of_2(depth))
