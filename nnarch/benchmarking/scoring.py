"""From times to a verdict: rates, distance to roofline and best peer, must and met."""

from __future__ import annotations

from collections.abc import Sequence

from nnarch.benchmarking.case import Case, Target
from nnarch.benchmarking.machine import Roof
from nnarch.benchmarking.peers import PROVIDERS
from nnarch.benchmarking.results import Row

# A row at these fractions of its limit has nothing left to win: it is met where no peer is faster.
ENOUGH = {"compute": 0.93, "memory": 0.85}
# Above the peak by more than its own error, an algorithm (Winograd) multiplies less than is
# counted, and its share tells nothing.
BEYOND_PEAK = 1.03


def score(rows: Sequence[Row], case: Case, roof: Roof, target: Target) -> None:
    """Fill in what follows from the times of all providers of one case.

    Args:
        rows: of one case; the timed ones are changed in place.
        case: gives the work of a call.
        roof: the machine's limits, measured in the same run.
        target: the ratios that nnarch's rows are held to.
    """
    for row in rows:
        row.gflop, row.mbytes = case.total_flops / 1e9, case.total_bytes / 1e6
        row.peak_gflops = roof.peak / 1e9
        row.bandwidth = " ".join(f"{size}:{rate / 1e9:.4g}" for size, rate in roof.bandwidth)
        row.roof_source = roof.source
        if row.timed:
            row.gflops, row.gbs = row.gflop / row.ms * 1e3, row.mbytes / row.ms
            floor, row.bound = roof.seconds(case.total_flops, case.total_bytes)
            row.roof = floor * 1e3 / row.ms
    peers = [row for row in rows if row.timed and not row.ours]
    best = min(peers, key=lambda row: row.ms, default=None)
    torch_best = min((row.ms for row in peers if _is_torch(row)), default=None)
    for row in rows:
        if row.ours:
            row.must, row.aim = target.must, target.aim
        if row.timed and best is not None:
            row.best_peer, row.ratio = best.provider, best.ms / row.ms
            if torch_best is not None:
                row.torch_ratio = torch_best / row.ms
        if row.ours:
            row.met, row.why = _verdict(row)


def _is_torch(row: Row) -> bool:
    return row.provider in PROVIDERS and PROVIDERS[row.provider].torch


def _verdict(row: Row) -> tuple[bool, str]:
    if not row.timed:
        return False, row.note
    if not row.best_peer:
        return False, "no peer to compare with"
    if row.ratio >= row.must:
        return True, f"{row.ratio:.2f} ≥ {row.must:g}"
    limit = "FMA peak" if row.bound == "compute" else "bandwidth"
    tells = row.bound == "memory" or row.roof <= BEYOND_PEAK
    if row.ratio >= 1 and tells and row.roof >= ENOUGH[row.bound]:
        return True, f"{row.roof:.0%} of {limit}, no peer faster"
    return False, f"{row.ratio:.2f} < {row.must:g}, {row.roof:.0%} of {limit}"
