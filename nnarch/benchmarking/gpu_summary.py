"""A run on a GPU in one line a case, what deserves a look at its end: losses, then errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nnarch.benchmarking.results import Row
from nnarch.benchmarking.tables import milliseconds

_NOTE_WIDTH = 90


def text(rows: Sequence[Row], asked: Sequence[str]) -> str:
    """All cases: wins from the largest down, then losses, then cases without a time of ours.

    Args:
        rows: of all cases.
        asked: names of the cases that were to be measured.
    """
    by_case: dict[str, list[Row]] = {}
    for row in rows:
        by_case.setdefault(row.case, []).append(row)
    ratios = {name: _ratio(of_case) for name, of_case in by_case.items()}
    wins = [name for name in by_case if ratios[name] >= 1]
    losses = [name for name in by_case if ratios[name] < 1]
    broken = [name for name in by_case if math.isnan(ratios[name])]
    heading = (
        "case | ours ms [as a graph], best peer ms [as a graph] | peer/ours [graphs] | of roof\n"
    )
    parts = [heading + _limits(rows)]
    for title, names in (("wins", wins), ("losses", losses), ("no ratio", broken)):
        if names:
            names.sort(key=lambda name: -ratios[name] if title != "no ratio" else 0)
            parts.append(f"{title}: {len(names)}")
            parts += [line(by_case[name]) for name in names]
    missing = [name for name in asked if name not in by_case]
    if missing:
        parts.append(f"not begun: {len(missing)}: {', '.join(missing)[:400]}")
    return "\n".join(parts)


def line(rows: Sequence[Row]) -> str:
    """One case."""
    ours = next((row for row in rows if row.ours), None)
    peer = _best_peer(rows)
    parts = [rows[0].case]
    if ours is not None and ours.timed:
        parts.append(_time(ours))
    if peer is not None:
        parts.append(f"{peer.provider} {_time(peer)}")
    if ours is not None and peer is not None and ours.timed:
        graphs = min((row.graph_ms for row in rows if _has_graph(row) and not row.ours), default=0)
        both = f" [×{graphs / ours.graph_ms:.2f}]" if graphs and _has_graph(ours) else ""
        parts.append(f"×{peer.ms / ours.ms:.2f}{both}")
    if ours is not None and ours.timed:
        parts.append(f"{ours.roof:.0%}{ours.bound[:1]}")
    notes = [f"{row.provider}: {row.note}"[:_NOTE_WIDTH] for row in rows if row.note]
    return " | ".join([*parts, *notes])


def _best_peer(rows: Sequence[Row]) -> Row | None:
    peers = [row for row in rows if row.timed and not row.ours]
    return min(peers, key=lambda row: row.ms, default=None)


def _ratio(rows: Sequence[Row]) -> float:
    ours = [row.ms for row in rows if row.ours and row.timed]
    peer = _best_peer(rows)
    return peer.ms / min(ours) if ours and peer is not None else math.nan


def _has_graph(row: Row) -> bool:
    return not math.isnan(row.graph_ms)


def _time(row: Row) -> str:
    noisy = "~" * row.noisy
    graph = f" [{milliseconds(row.graph_ms)}]" if _has_graph(row) else ""
    return f"{noisy}{milliseconds(row.ms)}{graph}"


def _limits(rows: Sequence[Row]) -> str:
    """The peak of every dtype and the bandwidth, as measured in the run."""
    peaks = {row.dtype: row.peak_gflops for row in rows if row.peak_gflops > 0}
    rates = [rate for row in rows for rate in row.bandwidths.values()]
    shown = ", ".join(f"{dtype} {peak / 1e3:.0f} TFLOP/s" for dtype, peak in peaks.items())
    return f"limits: {shown}, memory {max(rates, default=math.nan):.0f} GB/s"
