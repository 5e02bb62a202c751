"""One measured row, and the CSV file that a machine's rows are appended to."""

from __future__ import annotations

import csv
import functools
import math
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

OK, WRONG, UNAVAILABLE = "ok", "wrong", "unavailable"


@dataclass
class Row:
    """One provider on one case.

    Args:
        case, group, label: what ran. provider: who ran it.
        time: when, as ISO 8601 in UTC. commit: of the source tree, "" outside one.
        machine, isa, threads: where it ran. version: of the provider.
        ours: whether the provider is nnarch.
        status: "ok", "wrong" (off against float64: no time) or "unavailable"; note says why.
        error: relative L2 error against float64.
        ms, iqr_ms: the minimum and the interquartile range of a call, in milliseconds.
        blocks: blocks timed. noisy: whether the two halves of them disagree.
        dtype: of the tensors.
        graph_ms: the kernels of a call without their launches: replayed from a CUDA graph.
        prepare_ms: conversion, graph passes and compilation before the first call. first_ms: that
            call. pack_ms: what the first call of a further instance costs over a later one: the
            packing of its weights (nnarch only).
        gflop, mbytes: work of a call. gflops, gbs: its rates.
        bound, roof: "compute" or "memory", and the fraction of that limit reached.
        best_peer: name of the fastest peer. ratio: its time over this one.
        torch_ratio: the same against the fastest of torch's own.
        must, aim: ratios to reach (nnarch's rows only). met: whether must is. why: in words.
        peak_gflops, bandwidth: the machine's limits in the same run, the second in GB/s by bytes
            of working set, as "262144:103.5 1048576:80.1". roof_source: who measured them.
    """

    case: str
    group: str
    label: str
    provider: str
    time: str = ""
    commit: str = ""
    machine: str = ""
    isa: str = ""
    threads: int = 1
    version: str = ""
    ours: bool = False
    status: str = OK
    note: str = ""
    error: float = math.nan
    ms: float = math.nan
    iqr_ms: float = math.nan
    blocks: int = 0
    noisy: bool = False
    prepare_ms: float = math.nan
    first_ms: float = math.nan
    pack_ms: float = math.nan
    gflop: float = math.nan
    mbytes: float = math.nan
    gflops: float = math.nan
    gbs: float = math.nan
    bound: str = ""
    roof: float = math.nan
    best_peer: str = ""
    ratio: float = math.nan
    torch_ratio: float = math.nan
    must: float = math.nan
    aim: float = math.nan
    met: bool = False
    why: str = ""
    peak_gflops: float = math.nan
    bandwidth: str = ""
    roof_source: str = ""
    dtype: str = "float32"
    graph_ms: float = math.nan

    @property
    def timed(self) -> bool:
        """Whether there is a time."""
        return self.status == OK and not math.isnan(self.ms)

    @property
    def bandwidths(self) -> dict[int, float]:
        """GB/s by bytes of working set."""
        pairs = (pair.split(":") for pair in self.bandwidth.split())
        return {int(size): float(rate) for size, rate in pairs}


_TYPES: dict[str, str] = {field.name: str(field.type) for field in fields(Row)}


def append(rows: Iterable[Row], path: str | Path) -> None:
    """Add rows to a CSV file, made with its folder where it is missing.

    A file written by an earlier version, with other columns, keeps its rows: they are rewritten
    under the union of the columns.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    old = _read_records(path)
    header = list(_TYPES)
    rewrite = not old or list(old[0]) != header
    if rewrite and old:
        header += [name for name in old[0] if name not in _TYPES]
    with path.open("w" if rewrite else "a", newline="") as file:
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        if rewrite:
            writer.writeheader()
            writer.writerows(old)
        writer.writerows({name: _text(getattr(row, name)) for name in _TYPES} for row in rows)


def read(path: str | Path) -> list[Row]:
    """The rows of a CSV file; unknown columns are dropped, missing ones take their defaults.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"results: no file {path}")
    return [
        Row(**{name: _value(name, text) for name, text in record.items() if name in _TYPES})
        for record in _read_records(path)
    ]


def latest(rows: Sequence[Row]) -> list[Row]:
    """The last measurement of every case, with all its providers, in the order first seen."""
    times: dict[tuple[str, int], str] = {}
    for row in rows:
        key = (row.case, row.threads)
        times[key] = max(row.time, times.get(key, ""))
    return [row for row in rows if row.time == times[row.case, row.threads]]


def _read_records(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)


def _value(name: str, text: str) -> Any:
    kind = _TYPES[name]
    if kind == "bool":
        return text == "yes"
    if kind == "int":
        return int(text or 0)
    if kind == "float":
        return float(text) if text else math.nan
    return text


@functools.cache
def commit() -> str:
    """The commit of the source tree that nnarch was imported from, with "+" where files differ
    from it; "" for an installed nnarch."""
    here = Path(__file__).resolve()
    if _git("rev-parse", "--show-toplevel") != str(here.parents[2]):
        return ""  # no repository, or one that only happens to hold the environment
    return _git("describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*")


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
