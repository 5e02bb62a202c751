"""The tables on the terminal: one per group of cases, then what the first call costs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from nnarch.benchmarking.machine import MIB, Machine, Roof
from nnarch.benchmarking.peers import PROVIDERS
from nnarch.benchmarking.results import Row

PROTOCOL = (
    "Time: minimum over interleaved blocks ± interquartile range; ~ marks a row whose two halves "
    "disagree by more than 10 %. Ratio: best peer / nnarch, larger is better. Roof: share of the "
    "FMA peak (c) or of the memory bandwidth (m) measured in this run. "
    "First call: preparation (conversion, compilation) + the call itself (of which packing)."
)


def cases_of(rows: Iterable[Row]) -> Iterator[tuple[str, list[list[Row]]]]:
    """Rows by group, and within it by case and number of threads, in the order first seen."""
    groups: dict[str, dict[tuple[str, int], list[Row]]] = {}
    for row in rows:
        groups.setdefault(row.group, {}).setdefault((row.case, row.threads), []).append(row)
    for group, cases in groups.items():
        yield group, list(cases.values())


def providers_of(rows: Iterable[Row]) -> list[str]:
    """Names of the providers in `rows`, in the order of the registry, unknown ones last."""
    present = dict.fromkeys(row.provider for row in rows)
    known = [name for name in PROVIDERS if name in present]
    return known + [name for name in present if name not in PROVIDERS]


def title_of(provider: str) -> str:
    """A provider's name for people."""
    return PROVIDERS[provider].title if provider in PROVIDERS else provider


def milliseconds(value: float) -> str:
    """A time to three significant digits: "0.0123", "4.56", "1230"."""
    if math.isnan(value):
        return "–"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1e-6))))}f}"


def number(value: float, digits: int = 1) -> str:
    """A rate; a dash where there is none."""
    return "–" if math.isnan(value) or value == 0 else f"{value:.{digits}f}"


def time_cell(row: Row | None) -> str:
    """The time with its spread, or why there is none."""
    if row is None:
        return ""
    if not row.timed:
        return row.status
    return f"{'~' * row.noisy}{milliseconds(row.ms)} ±{row.iqr_ms / row.ms:.0%}"


def roof_cell(row: Row) -> str:
    """The share of the limit reached, and which limit."""
    return "–" if math.isnan(row.roof) else f"{row.roof:.0%} {row.bound[:1]}"


def judged(rows: Sequence[Row]) -> list[Row]:
    """nnarch's rows of a case, the one on record first; the peers' where nnarch did not run."""
    return [row for row in rows if row.ours] or [row for row in rows if row.timed][:1]


def notes(rows: Iterable[Row]) -> list[str]:
    """One sentence for every provider that got no time, cases with the same reason together."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if not row.timed:
            reasons.setdefault((row.provider, row.status, row.note), []).append(row.label)
    return [
        f"{title_of(provider)}: {status} on {_some(labels)}: {note}"
        for (provider, status, note), labels in reasons.items()
    ]


def _some(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - 2} more" if len(labels) > 2 else ""
    return ", ".join(labels[:2]) + more


def print_machine(host: Machine, roof: Roof, console: Console) -> None:
    """One line on the machine and one on its limits."""
    console.print(
        f"[bold]{host.cpu}[/], cores: {host.cores}, {host.isa}, torch {host.torch}; "
        f"threads: [bold]{roof.threads}[/]"
    )
    console.print(roof_text(roof))
    if roof.source != "native":
        console.print("[yellow]limits from torch's own loops: the native library has none here[/]")


def roof_text(roof: Roof) -> str:
    """Peak and bandwidths in words."""
    reads = ", ".join(
        f"{rate / 1e9:.0f} at {f'{size // MIB} MiB' if size >= MIB else f'{size >> 10} KiB'}"
        for size, rate in roof.bandwidth
    )
    return f"peak {roof.peak / 1e9:.0f} GFLOP/s; reading, GB/s: {reads}"


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """All tables of a run."""
    print_groups(rows, console)
    print_summary(rows, console)


def print_groups(rows: Iterable[Row], console: Console) -> None:
    """One table per group."""
    for group, cases in cases_of(rows):
        _print_whole(_group_table(group, cases), console)


def _print_whole(table: Table, console: Console) -> None:
    """A table at its full width: where that is too much, lines wrap, but no number is cut off."""
    kept = console.width
    wide = console.options.update(width=1000)
    console.width = max(kept, console.measure(table, options=wide).maximum)
    console.print(table)
    console.width = kept


def print_summary(rows: Sequence[Row], console: Console) -> None:
    """What all groups share: first calls, who got no time and why, the protocol, the verdict."""
    _print_whole(_first_call_table(rows), console)
    for note in notes(rows):
        console.print(note, style="yellow", highlight=False, markup=False)
    console.print(PROTOCOL, style="dim", highlight=False)
    console.print(verdict(rows), highlight=False)


def verdict(rows: Sequence[Row]) -> str:
    """How many of nnarch's rows meet their must, in all and by group."""
    ours = [row for row in rows if row.ours]
    if not ours:
        return "nnarch was not among the providers."
    groups = {row.group: [other.met for other in ours if other.group == row.group] for row in ours}
    counts = ", ".join(f"{group} {sum(met)}/{len(met)}" for group, met in groups.items())
    return f"{sum(row.met for row in ours)} of {len(ours)} nnarch rows meet their must: {counts}."


def _group_table(group: str, cases: Sequence[Sequence[Row]]) -> Table:
    table = Table(title=group, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    providers = providers_of(itertools.chain.from_iterable(cases))
    for name in providers:
        ours = name in PROVIDERS and PROVIDERS[name].ours
        style = "bold" if ours else None
        table.add_column(f"{title_of(name)}\nms", justify="right", no_wrap=True, style=style)
    for heading in ("ratio", "GFLOP/s", "GB/s", "roof", "must"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("met", overflow="fold")
    for rows in cases:
        by_provider = {row.provider: row for row in rows}
        cells = [time_cell(by_provider.get(name)) for name in providers]
        for i, row in enumerate(judged(rows)):
            head = [row.label + (f" ({row.threads} threads)" if row.threads > 1 else "")]
            lead = head + cells if i == 0 else [f"  {title_of(row.provider)}"] + [""] * len(cells)
            table.add_row(*lead, *_rates(row))
    return table


def _rates(row: Row) -> list[str]:
    rates = [number(row.gflops), number(row.gbs), roof_cell(row)]
    if not row.ours:
        return ["", *rates, "", ""]
    colour = "green" if row.met else "red"
    ratio = "–" if math.isnan(row.ratio) else f"[{colour}]{row.ratio:.2f}[/]"
    verdict = f"[{colour}]{'yes' if row.met else 'no'}[/], {row.why}"
    return [ratio, *rates, f"{row.must:g}", verdict]


def _first_call_table(rows: Sequence[Row]) -> Table:
    """What comes before the steady state, as the largest case of every group shows it."""
    table = Table(
        title="first call, ms",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    providers = providers_of(rows)
    table.add_column("case", no_wrap=True)
    for name in providers:
        table.add_column(title_of(name), justify="right", no_wrap=True)
    for _, cases in cases_of(rows):
        largest = max(cases, key=lambda case: case[0].gflop)
        by_provider = {row.provider: row for row in largest}
        table.add_row(largest[0].label, *(first_cell(by_provider.get(name)) for name in providers))
    return table


def first_cell(row: Row | None) -> str:
    """Preparation, first call and packing of one row."""
    if row is None or math.isnan(row.first_ms):
        return ""
    packing = "" if math.isnan(row.pack_ms) else f" ({milliseconds(row.pack_ms)})"
    return f"{milliseconds(row.prepare_ms)} + {milliseconds(row.first_ms)}{packing}"
