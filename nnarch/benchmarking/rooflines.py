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
from nnarch.benchmarking.tables import cases_of

_COLOURS = (
    "#0f8b8d", "#d1495b", "#e09f3e", "#3d6fd9", "#8e5bb5", "#4c9f38", "#8c5a2b", "#d64f9c",
    "#3e4c59", "#a3a71f", "#35b5d6", "#7b1e2b", "#1b5e20", "#9aa5b1", "#f3722c",
)  # fmt: skip

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
    figure, axes = canvas.new(9.2, 5.6)
    _scales(axes)
    axes.set_xlim(left, right)
    axes.set_ylim(min(row.gflops for row in ours) / 2.2, peak * 1.6)
    _draw_points(axes, ours, rows)
    canvas.write_titles(
        figure, title, canvas.conditions(rows) + "; filled: nnarch, hollow: best peer"
    )
    _draw_roofs(axes, peak, roofs, left, right)
    canvas.save(figure, path)


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


def _draw_points(axes: Any, ours: Sequence[Row], rows: Sequence[Row]) -> None:
    peers = {(row.case, row.threads, row.provider): row for row in rows if row.timed}
    for (group, cases), colour in zip(cases_of(ours), itertools.cycle(_COLOURS), strict=False):
        points = list(itertools.chain.from_iterable(cases))
        marker = "s" if points[0].case.endswith(("_fb", "_train")) else "o"
        style = {"markersize": 6, "markeredgewidth": 0.7, "linestyle": "", "marker": marker}
        for row in points:
            peer = peers.get((row.case, row.threads, row.best_peer))
            if peer is not None:
                pair = [_intensity(row)] * 2, [peer.gflops, row.gflops]
                axes.plot(*pair, color=colour, linewidth=1, alpha=0.55, zorder=2)
                hollow = {**style, "markersize": 4.2, "markeredgewidth": 1.0}
                axes.plot(pair[0][0], peer.gflops, color=PAPER, markeredgecolor=colour, **hollow)
        axes.plot(
            [_intensity(row) for row in points],
            [row.gflops for row in points],
            color=colour,
            markeredgecolor=PAPER,
            label=group,
            zorder=4,
            **style,
        )
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8)


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
