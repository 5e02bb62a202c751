"""What the pictures share: colours, the empty figure, its titles, and saving it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnarch.benchmarking.results import Row

INK, MUTED, GRID, PAPER = "#1f2933", "#7b8794", "#e4e7eb", "#ffffff"
_DPI = 160


def new(width: float, height: float) -> tuple[Any, Any]:
    """A figure of width x height inches with one pair of axes.

    It needs no display and touches no global state of matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(which="both", length=0, labelsize=8.5, labelcolor=INK)
    axes.set_axisbelow(True)
    return figure, axes


def write_titles(figure: Any, title: str, subtitle: str) -> None:
    """Title and subtitle, left-aligned; placed in inches, so that a tall figure looks the same."""
    height = figure.get_size_inches()[1]
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.55 / height))
    figure.text(0.012, 1 - 0.12 / height, title, size=13, weight="bold", color=INK, va="top")
    figure.text(0.012, 1 - 0.38 / height, subtitle, size=8.5, color=MUTED, va="top")


def conditions(rows: Sequence[Row]) -> str:
    """Where and how the rows were measured, for a subtitle."""
    threads = sorted({row.threads for row in rows})
    machines = [name for name in dict.fromkeys(row.machine for row in rows) if name]
    blocks = max((row.blocks for row in rows), default=0)
    counted = "1 thread" if threads == [1] else f"threads: {', '.join(map(str, threads))}"
    dtypes = sorted({row.dtype for row in rows})
    parts = [*machines[:1], counted, ", ".join(dtypes) or "float32"]
    if blocks:
        parts.append(f"minimum of {blocks} interleaved blocks")
    return ", ".join(parts)


def save(figure: Any, path: str | Path) -> None:
    """Write a PNG file, with its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=_DPI)
