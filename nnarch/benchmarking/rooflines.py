"""The roofline: what every case reached under the limits measured in the same run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnarch.benchmarking import canvas
from nnarch.benchmarking.canvas import GRID, INK, MUTED, PAPER
from nnarch.benchmarking.machine import KIB, MIB
from nnarch.benchmarking.results import Row

_COLOURS = (
    "#0f8b8d", "#d1495b", "#e09f3e", "#3d6fd9", "#8e5bb5", "#4c9f38", "#8c5a2b", "#d64f9c",
    "#3e4c59", "#a3a71f", "#35b5d6", "#7b1e2b", "#1b5e20", "#9aa5b1", "#f3722c",
)  # fmt: skip

# Families of cases in a column of the legend, and the inches that one takes.
_LEGEND_ROWS, _LEGEND_WIDTH = 24, 1.7

# A roof within this factor of the one above it would only thicken the line.
_DISTINCT = 1.3


def roofline(rows: Sequence[Row], path: str | Path, title: str = "Roofline") -> None:
    """Draw operations per second over operations per byte.

    A filled mark is nnarch (square where the backward is timed too), the hollow one on the thin
    line from it the best peer.

    Args:
        rows: of one number of threads; those without operations or a time are left out.
        path: PNG file to write; its folder is made.
        title: above the plot.

    Raises:
        ValueError: no nnarch row has a time, operations and limits.
    """
    ours = [row for row in rows if row.ours and row.timed and row.gflop > 0 and row.bandwidth]
    if not ours:
        raise ValueError("roofline: expected a timed nnarch row with limits, got none")
    peak = max(row.peak_gflops for row in ours)
    roofs = _distinct_roofs(ours)
    left = min(*(_intensity(row) for row in ours), peak / roofs[0][1]) / 1.8
    right = max(*(_intensity(row) for row in ours), 4 * peak / roofs[-1][1]) * 1.8
    columns = math.ceil(len({_family(row.group) for row in ours}) / _LEGEND_ROWS)
    figure, axes = canvas.new(7.5 + _LEGEND_WIDTH * columns, 5.6)
    _scales(axes)
    axes.set_xlim(left, right)
    peers = {(row.case, row.threads, row.provider): row for row in rows if row.timed}
    pairs = [(row, peers.get((row.case, row.threads, row.best_peer))) for row in ours]
    heights = [row.gflops for pair in pairs for row in pair if row is not None]
    # Algorithms that multiply less lie above the peak.
    axes.set_ylim(min(heights) / 1.5, max(peak * 1.6, max(heights) * 1.2))
    _draw_points(axes, pairs, columns)
    canvas.write_titles(
        figure, title, canvas.conditions(rows) + "; filled: nnarch, hollow: best peer"
    )
    _draw_roofs(axes, peak, roofs, left, right)
    canvas.save(figure, path)


def _family(group: str) -> str:
    """A group of cases, with the one that times its backward, too."""
    return group.removesuffix(" fwd+bwd")


def _intensity(row: Row) -> float:
    return row.gflop * 1e3 / row.mbytes


def _distinct_roofs(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """(name, GB/s) from the fastest to main memory, near-equal ones merged into the larger.

    Rows of several runs may disagree: the best that was seen is what the machine can do.
    """
    best: dict[int, float] = {}
    for row in rows:
        for size, rate in row.bandwidths.items():
            best[size] = max(rate, best.get(size, 0.0))
    roofs: list[tuple[str, float]] = []
    for size, rate in sorted(best.items()):
        unit = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
        if roofs and roofs[-1][1] < rate * _DISTINCT:
            roofs.pop()
        roofs.append(("memory" if size == max(best) else unit, rate))
    return roofs


def _scales(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        getattr(axes, f"set_{name}scale")("log")
        axis.set_major_locator(LogLocator(subs=(1.0,) if name == "x" else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("operations per byte that has to move", size=8.5, color=MUTED)
    axes.set_ylabel("GFLOP/s", size=8.5, color=MUTED)
    axes.grid(True, which="major", color=GRID, linewidth=0.8)


def _draw_points(axes: Any, pairs: Sequence[tuple[Row, Row | None]], columns: int) -> None:
    colours = itertools.cycle(_COLOURS)
    families: dict[str, str] = {}
    for row, peer in pairs:
        family = _family(row.group)
        known = family in families
        colour = families.setdefault(family, "" if known else next(colours))
        marker = "s" if row.case.endswith(("_fb", "_train")) else "o"
        style = {"linestyle": "", "marker": marker}
        x = _intensity(row)
        if peer is not None:
            ends = [x, x], [peer.gflops, row.gflops]
            axes.plot(*ends, color=colour, linewidth=1, alpha=0.55, zorder=2)
            hollow = {**style, "markersize": 4.2, "markeredgewidth": 1.0}
            axes.plot(x, peer.gflops, color=PAPER, markeredgecolor=colour, **hollow)
        filled = {**style, "markersize": 6, "markeredgewidth": 0.7, "markeredgecolor": PAPER}
        label = None if known else family
        axes.plot(x, row.gflops, color=colour, label=label, zorder=4, **filled)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8, ncols=columns,
        columnspacing=1.0,
    )  # fmt: skip


def _draw_roofs(
    axes: Any, peak: float, roofs: Sequence[tuple[str, float]], left: float, right: float
) -> None:
    axes.plot([peak / roofs[0][1], right], [peak, peak], color=INK, linewidth=1.6, zorder=1)
    axes.annotate(
        f"FMA peak {peak:.0f} GFLOP/s", (right, peak), (-4, 5), textcoords="offset points",
        ha="right", size=8, color=INK,
    )  # fmt: skip
    bottom = axes.get_ylim()[0]
    slope = _degrees_of_a_decade(axes)
    for name, rate in roofs:
        memory = name == roofs[-1][0]
        colour = INK if memory else MUTED
        dashes, width = ("-", 1.6) if memory else ("--", 0.9)
        ends = [left, peak / rate], [left * rate, peak]
        axes.plot(*ends, linestyle=dashes, linewidth=width, color=colour, zorder=1)
        # The name runs along its line, from where the line enters the plot.
        x = max(left, bottom / rate) * 1.08
        axes.annotate(
            f"{name} {rate:.0f} GB/s", (x, x * rate), (-2, 4), textcoords="offset points",
            rotation=slope, rotation_mode="anchor", size=7.5, color=colour,
        )  # fmt: skip


def _degrees_of_a_decade(axes: Any) -> float:
    """The angle on paper of a line that rises one decade per decade."""
    axes.figure.draw_without_rendering()  # settles the layout, and with it the aspect
    (x0, y0), (x1, y1) = axes.transData.transform([(1, 1), (10, 10)])
    return math.degrees(math.atan2(y1 - y0, x1 - x0))
