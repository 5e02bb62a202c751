"""Tile tables: a default for every problem, an optional search, its results cached on disk.

First use never searches: :func:`pick` answers from a cost model over the table's tiles that fit the
GPU. With ``NNARCH_AUTOTUNE=1`` it times them once for each problem and remembers the winner.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from nnarch.kernels.gpu import plans, targets
from nnarch.kernels.gpu.targets import Target

MAX_TILES = 10
ALL_REGISTERS = 255


@dataclass(frozen=True)
class Tile:
    """One configuration of a kernel.

    Attributes:
        block: constexpr arguments by name, such as BLOCK_M.
        num_warps, num_stages: Triton's launch options.
        registers: that ptxas may give a thread; 0: it decides. Left to itself it sometimes spills a
            few to raise the occupancy of a kernel that gains nothing from it (ALL_REGISTERS), and
            does not hold a few back where one block more would run beside the others.
    """

    block: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2
    registers: int = 0

    def __getitem__(self, name: str) -> int:
        return dict(self.block)[name]

    def __str__(self) -> str:
        shape = "×".join(str(value) for _, value in self.block if not isinstance(value, bool))
        words = [shape, f"w{self.num_warps}", f"s{self.num_stages}"]
        words += [name.lower() for name, value in self.block if value is True]
        if 0 < self.registers < ALL_REGISTERS:
            words.append(f"r{self.registers}")
        return " ".join(words)


def tile(num_warps: int = 4, num_stages: int = 2, registers: int = 0, **block: int) -> Tile:
    """A :class:`Tile` from keyword arguments."""
    return Tile(tuple(block.items()), num_warps, num_stages, registers)


@dataclass(frozen=True)
class Problem:
    """What a tile is chosen for: the extents that the grid and the inner loop run over.

    Attributes:
        m, n, k: rows and columns of the output and the length of the reduction. Kernels that do
            not multiply matrices use m and n as their two tiled extents and k = 1.
        precision: "half" (float16, bfloat16), "tf32", "tf32x3" or "ieee".
        vectors: whether operands load 16 bytes at a time; if not, every element has its address.
    """

    m: int
    n: int
    k: int = 1
    precision: str = "half"
    vectors: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of one operand element."""
        return 2 if self.precision == "half" else 4


@dataclass(frozen=True)
class TileTable:
    """The tiles that a kernel may run with.

    Attributes:
        name: of the kernel, unique.
        tiles: at most 10 for each precision.
        cost: relative time of a problem with a tile on a target; the least is the default.
        fits: whether a tile's operands fit the target's shared memory and registers.
    """

    name: str
    tiles: dict[str, tuple[Tile, ...]]
    cost: Callable[[Problem, Tile, Target], float]
    fits: Callable[[Problem, Tile, Target], bool]

    def __post_init__(self) -> None:
        for precision, tiles in self.tiles.items():
            if not 1 <= len(tiles) <= MAX_TILES:
                counts = f"{len(tiles)} tiles, not 1 to {MAX_TILES}"
                raise ValueError(f"{self.name}: {precision} has {counts}")

    def candidates(self, problem: Problem, target: Target) -> list[Tile]:
        """The tiles that fit `target`, cheapest first by the cost model."""
        fitting = [t for t in self.tiles[problem.precision] if self.fits(problem, t, target)]
        return sorted(fitting, key=lambda t: self.cost(problem, t, target))


# ------------------------------------------------------------------------------ models of tiles


def always_fits(problem: Problem, tile: Tile, target: Target) -> bool:
    """For kernels that keep nothing in shared memory and few values in registers."""
    return tile.num_warps * target.warp_size <= 1024


def padding_cost(problem: Problem, tile: Tile, target: Target) -> float:
    """Relative time of a kernel bound by memory: its tiles' area, and idle processors.

    The tile's first two block sizes run over the problem's m and n.
    """
    (_, m), (_, n) = tile.block[:2]
    programs = triton.cdiv(problem.m, m) * triton.cdiv(problem.n, n)
    waves = triton.cdiv(programs, target.processors)
    return max(programs, waves * target.processors / 4) * m * n


# ---------------------------------------------------------------------------- choosing a tile


_chosen: dict[tuple[str, Problem, str], Tile] = {}
_forced: dict[str, Tile] = {}
_asked: list[tuple[TileTable, Problem]] | None = None


@contextlib.contextmanager
def force(**tiles: Tile) -> Iterator[None]:
    """Make :func:`pick` return the given tile for each named table, for tests and compile checks.

    Args:
        tiles: tile by table name.
    """
    before = dict(_forced)
    _forced.update(tiles)
    try:
        with plans.paused():
            yield
    finally:
        _forced.clear()
        _forced.update(before)


@contextlib.contextmanager
def asked() -> Iterator[list[tuple[TileTable, Problem]]]:
    """Collect the table and the problem of every :func:`pick` in the block."""
    global _asked
    questions: list[tuple[TileTable, Problem]] = []
    _asked = questions
    try:
        with plans.paused():
            yield questions
    finally:
        _asked = None


def pick(table: TileTable, problem: Problem, run: Callable[[Tile], Any]) -> Tile:
    """The tile to run `problem` with.

    Args:
        table: of the kernel.
        problem: its extents and precision.
        run: launches the operation with a tile, for the search; it must be repeatable.

    Returns:
        A forced tile, else an earlier choice, else the search's winner, else the default.
    """
    if _asked is not None:
        _asked.append((table, problem))
    if _forced and table.name in _forced:
        return _forced[table.name]
    target = targets.current_target()
    key = (table.name, problem, target.name)
    choice = _chosen.get(key)
    if choice is None:
        candidates = table.candidates(problem, target)
        choice = _searched(table, problem, candidates, run) if _may_search() else candidates[0]
        _chosen[key] = choice
    return choice


def _may_search() -> bool:
    return (
        os.environ.get("NNARCH_AUTOTUNE") == "1"
        and torch.cuda.is_available()
        and not triton.knobs.runtime.interpret
        and not targets.recording()
    )


def _searched(
    table: TileTable, problem: Problem, candidates: list[Tile], run: Callable[[Tile], Any]
) -> Tile:
    """The fastest candidate, measured now or read from the cache of an earlier process."""
    plans.refuse("a search")
    path = _cache_path(table)
    known = _read(path)
    entry = known.get(str(asdict(problem)))
    for candidate in candidates:
        if str(candidate) == entry:
            return candidate
    seconds = {t: triton.testing.do_bench(lambda t=t: run(t)) for t in candidates}
    best = min(candidates, key=seconds.__getitem__)
    _write(path, _read(path) | {str(asdict(problem)): str(best)})
    return best


def _cache_path(table: TileTable) -> Path:
    """One file for each device, Triton version and source of the kernels."""
    device = torch.cuda.get_device_name().replace(" ", "-").replace("/", "-")
    base = os.environ.get("NNARCH_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "nnarch"
    )
    name = f"{table.name}-{device}-triton{triton.__version__}-{source_hash()}.json"
    return Path(base) / "tiles" / name


def source_hash() -> str:
    """Twelve hex digits over the text of every Triton kernel file: a change drops old results."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].glob("*/*.py")):
        if path.parent.name == "gpu" or "triton" in path.name:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _read(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):  # absent or cut short: search again
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, str]) -> None:
    """Replace the file in one step, so that a reader never sees half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(content, indent=1, sort_keys=True))
        draft.replace(path)
    except OSError:
        return  # a read-only home: the choice lives as long as the process
