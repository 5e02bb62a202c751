"""Ratio bars: how much faster than the best peer, case by case, with the whole field in view."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nnarch.benchmarking import canvas
from nnarch.benchmarking.canvas import GRID, INK, MUTED, PAPER
from nnarch.benchmarking.results import Row
from nnarch.benchmarking.tables import cases_of, milliseconds, providers_of, title_of

MET, SHORT, SLOWER = "#0f8b8d", "#7fc4c5", "#d1495b"
PEER_STYLE = {
    "eager": ("o", "#9aa5b1"),
    "channels_last": ("s", "#52606d"),
    "compile": ("^", "#e09f3e"),
    "onnxruntime": ("D", "#5b8def"),
    "openvino": ("v", "#8e5bb5"),
}
_OTHER_PEER = ("P", "#a47148")  # a peer that only some family of cases has
_INCH_PER_BAR = 0.29


def ratio_bars(
    rows: Sequence[Row], path: str | Path, title: str = "nnarch vs the best peer"
) -> None:
    """Draw one bar per nnarch row: its speed over that of the fastest peer on the same case.

    Every peer is a small mark on the line of its case, at its own speed over the fastest peer's,
    so that the whole field is seen. A black tick is the ratio to reach, where the row has one; a
    pale bar is ahead of every peer and short of that ratio, a red one is behind.

    Args:
        rows: of any number of cases; a bar needs `case`, `group`, `label`, `provider`, `ours` and
            `ms`, the rest may be left at its default. Rows without a time are left out.
        path: PNG file to write; its folder is made.
        title: above the plot; the protocol's essentials are added below it.

    Raises:
        ValueError: no case has a time of nnarch and of a peer.
    """
    lines = _lines(rows)
    if not lines:
        raise ValueError("ratio_bars: expected a case with times of nnarch and of a peer, got none")
    height = _INCH_PER_BAR * len(lines) + 1.5
    figure, axes = canvas.new(9.2, max(2.4, height))
    for y, line in enumerate(lines):
        if "heading" in line:
            axes.text(0, y + 0.28, line["heading"], weight="bold", size=9.5, color=INK, va="center")
        else:
            _draw_bar(axes, y, line)
    axes.axvline(1, color=INK, linewidth=1.1, zorder=4)
    axes.text(1, -0.72, "fastest peer", ha="center", va="bottom", size=8, color=INK)
    axes.set_ylim(len(lines) - 0.3, -0.7)
    axes.set_xlim(0, 1.04 * max(1.0, *(line.get("reach", 0.0) for line in lines)))
    axes.set_yticks(range(len(lines)), [line.get("label", "") for line in lines], size=8.5)
    axes.set_xlabel("speed relative to the fastest peer (larger is better)", size=8.5, color=MUTED)
    axes.xaxis.grid(True, color=GRID, linewidth=0.8)
    canvas.write_titles(figure, title, canvas.conditions(rows))
    _peer_legend(figure, rows)
    canvas.save(figure, path)


def _lines(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The lines of the plot from top to bottom: group headings and bars."""
    lines: list[dict[str, Any]] = []
    groups = list(cases_of(rows))
    for group, cases in groups:
        bars = list(itertools.chain.from_iterable(_bars(case) for case in cases))
        if bars and len(groups) > 1:
            lines.append({"heading": group})
        lines += bars
    return lines


def _bars(case: Sequence[Row]) -> list[dict[str, Any]]:
    peers = [row for row in case if row.timed and not row.ours]
    if not peers:
        return []
    best = min(row.ms for row in peers)
    marks = [(row.provider, best / row.ms) for row in peers]
    bars = []
    for row in case:
        if row.ours and row.timed:
            label = row.label + (f", {row.threads} threads" if row.threads > 1 else "")
            if row.provider != "nnarch":
                label += f" ({title_of(row.provider).removeprefix('nnarch, ')})"
            ratio = best / row.ms
            reach = max(ratio, row.must if row.must > 0 else 0.0)
            bars.append(
                {"row": row, "label": label, "ratio": ratio, "reach": reach, "marks": marks}
            )
    return bars


def _draw_bar(axes: Any, y: int, line: dict[str, Any]) -> None:
    ratio, row = line["ratio"], line["row"]
    short = row.must > 0 and not row.met and ratio < row.must
    colour = SLOWER if ratio < 1 else SHORT if short else MET
    axes.barh(y, ratio, height=0.62, color=colour, zorder=2)
    for provider, speed in line["marks"]:
        marker, shade = PEER_STYLE.get(provider, _OTHER_PEER)
        axes.plot(
            speed, y, marker, color=shade, markersize=5.2, markeredgecolor=PAPER,
            markeredgewidth=0.8, zorder=5,
        )  # fmt: skip
    if row.must > 0:
        axes.plot([row.must] * 2, [y - 0.4, y + 0.4], color=INK, linewidth=1.6, zorder=3)
    # The numbers stand in two columns beside the plot, where no mark can run into them.
    beside: dict[str, Any] = {
        "xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right",
        "va": "center", "annotation_clip": False,
    }  # fmt: skip
    ink = SLOWER if ratio < 1 else MET
    axes.annotate(f"{ratio:.2f}×", (1, y), (38, 0), size=8.5, weight="bold", color=ink, **beside)
    noisy = "~" if row.noisy else ""
    time = f"{noisy}{milliseconds(row.ms)} ms"
    axes.annotate(time, (1, y), (92, 0), size=8, color=MUTED, **beside)


def _peer_legend(figure: Any, rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    timed = [row for row in rows if row.timed and not row.ours]
    handles = []
    for name in providers_of(timed):
        marker, shade = PEER_STYLE.get(name, _OTHER_PEER)
        style: dict[str, Any] = {"marker": marker, "color": shade, "markersize": 5.5}
        handles.append(Line2D([], [], linestyle="", label=title_of(name), **style))
    if any(row.must > 0 for row in rows):
        tick: dict[str, Any] = {"linestyle": "", "marker": "|", "color": INK, "markersize": 9}
        handles.append(Line2D([], [], label="must reach", markeredgewidth=1.6, **tick))
    figure.legend(
        handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=8,
        handletextpad=0.1, columnspacing=1.4,
    )  # fmt: skip
