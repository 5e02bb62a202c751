"""The benchmark: every case, every provider, correctness first, then interleaved times."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nnarch.benchmarking import cases, machine, peers, replays, results, scoring, tables, timing
from nnarch.benchmarking.case import Case
from nnarch.benchmarking.correctness import PEER_SLACK, Problem
from nnarch.benchmarking.peers import Contender, Provider, Unavailable
from nnarch.benchmarking.results import OK, UNAVAILABLE, WRONG, Row
from nnarch.benchmarking.timing import Plan
from nnarch.benchmarking.workers import one_line


def run(
    only: str | None = None,
    quick: bool = False,
    threads: int | Sequence[int] = 1,
    models: bool = True,
    html: str | Path | None = None,
    csv: str | Path | None = None,
    *,
    providers: Sequence[str] | None = None,
    console: Console | None = None,
) -> list[Row]:
    """Measure nnarch against what a user would otherwise run, and print the tables.

    Args:
        only: part of a case's name or group, or a shell pattern; everything by default.
        quick: a few cases with fewer blocks, for a first look; not figures of record.
        threads: 1 is the figure of record; a sequence measures several numbers in turn.
        models: whether whole models are measured.
        html: write a self-contained page with the plots, the tables and the machine to this file.
        csv: append the rows to this file.
        providers: names out of :data:`nnarch.benchmarking.peers.PROVIDERS`.
        console: where the tables and the progress bar go; the terminal by default.

    Returns:
        One row per case, provider and number of threads.

    Raises:
        ValueError: nothing matches `only`, or a provider or a number of threads is unknown.
    """
    chosen = cases.select(only, quick=quick, models=models)
    contestants = peers.select(providers)
    counts = [threads] if isinstance(threads, int) else list(threads)
    if not counts or min(counts) < 1:
        raise ValueError(f"threads: expected positive numbers, got {threads!r}")
    console = console or Console()
    host = machine.describe()
    plan = timing.QUICK if quick else Plan()

    rows: list[Row] = []
    roofs: list[machine.Roof] = []
    for count in counts:
        with _threads(count):
            console.print(f"calibrating, threads: {count} …", style="dim")
            roofs.append(machine.calibrate(count))
            tables.print_machine(host, roofs[-1], console)
            measured = []
            for case_rows in _measured(chosen, contestants, plan, roofs[-1], host, console):
                if csv is not None:  # at once, so that an interrupted run keeps what it measured
                    results.append(case_rows, csv)
                measured += case_rows
        tables.print_summary(measured, console)
        rows += measured
    if html is not None:
        from nnarch.benchmarking import report

        report.write(rows, host, html, roofs)
        console.print(f"page: {html}")
    if csv is not None:
        console.print(f"rows: {csv}")
    return rows


def _measured(
    chosen: Sequence[Case],
    contestants: Sequence[Provider],
    plan: Plan,
    roof: machine.Roof,
    host: machine.Machine,
    console: Console,
) -> Iterator[list[Row]]:
    """The rows of every case in turn, a progress bar beside; each group's table when it is done."""
    groups: dict[str, list[Case]] = {}
    for case in chosen:
        groups.setdefault(case.group, []).append(case)
    with _Bar(len(chosen), plan, console) as bar:
        for cases_of_group in groups.values():
            rows: list[Row] = []
            for case in cases_of_group:
                bar.begin(case.title)
                case_rows = run_case(case, contestants, plan, roof, host, on_round=bar.round)
                bar.end()
                yield case_rows
                rows += case_rows
            tables.print_groups(rows, console)


class _Bar:
    """A progress bar that moves between blocks only.

    rich's own refresh thread would wake up inside timed blocks, so it is not used.
    """

    def __init__(self, cases: int, plan: Plan, console: Console) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self._task = self._progress.add_task("", total=cases)
        self._step = 1 / (plan.blocks + 1)
        self._done = 0

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, title: str) -> None:
        self._progress.update(self._task, description=title, refresh=True)

    def round(self) -> None:
        part = self._progress.tasks[0].completed + self._step
        # A noisy case is measured again, and then waits at its end.
        part = min(part, self._done + 1 - self._step)
        self._progress.update(self._task, completed=part, refresh=True)

    def end(self) -> None:
        self._done += 1
        self._progress.update(self._task, completed=self._done, refresh=True)


def run_case(
    case: Case,
    contestants: Sequence[Provider],
    plan: Plan,
    roof: machine.Roof,
    host: machine.Machine,
    *,
    measure: Callable[[Mapping[str, timing.Call], Plan], Mapping[str, timing.Timing]] | None = None,
    on_round: Callable[[], object] = lambda: None,
    capture: Callable[[timing.Call, int], timing.Call] | None = None,
) -> list[Row]:
    """Check and time every provider that takes a case.

    Args:
        case: what to run.
        contestants: providers; those that do not take the case are skipped.
        plan: how to measure.
        roof: the machine's limits for `roof.threads`, the number of threads used.
        host: the machine.
        measure: times the right ones against each other; :func:`timing.measure` by default.
        on_round: called after every round of blocks.
        capture: turns a call and a number into a call that replays it so often; on a GPU, where
            launches can cost more than kernels, replays are timed too.

    Returns:
        One row per provider; the wrong and the missing ones carry a note instead of a time.
    """
    stamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with torch.set_grad_enabled(case.backward):
        problem = Problem(case)
        rows: dict[str, Row] = {}
        ready: dict[str, Contender] = {}
        for provider in contestants:
            if not provider.takes(case):
                continue
            row = _new_row(case, provider, roof, host, stamp)
            rows[provider.name] = row
            contender = _make_ready(problem, provider, row)
            if contender is not None:
                ready[provider.name] = contender
        calls = {name: contender.call for name, contender in ready.items()}
        measure = measure or functools.partial(timing.measure, on_round=on_round)
        timings = measure(calls, plan)
        for name, result in timings.items():
            _fill(rows[name], result)
            if rows[name].ours and not case.backward and case.device == "cpu":
                rows[name].pack_ms = _packing_ms(problem, peers.PROVIDERS[name], rows[name])
        if capture is not None:
            replays.time_replays(problem, ready, rows, capture, measure)
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()
    scoring.score(list(rows.values()), case, roof, cases.target(case))
    return list(rows.values())


def _make_ready(problem: Problem, provider: Provider, row: Row) -> Contender | None:
    """Prepare a provider and check its first output; notes in `row` why it gets no time."""
    try:
        start = time.perf_counter()
        contender = provider.prepare(problem, row.threads)
        prepared = time.perf_counter()
        contender.call()
        row.first_ms = (time.perf_counter() - prepared) * 1e3
        row.prepare_ms = (prepared - start) * 1e3
        strict = provider.ours or problem.case.device == "cpu"
        verdict = problem.judge(contender.outputs(), 1.0 if strict else PEER_SLACK)
    except Unavailable as error:
        row.status, row.note = UNAVAILABLE, str(error)
        return None
    except Exception as error:  # a peer that fails on a case must not end the run
        row.status, row.note = UNAVAILABLE, one_line(error)
        return None
    row.error = verdict.error
    if not verdict.right:
        row.status, row.note = WRONG, verdict.reason
        return None
    return contender


def _packing_ms(problem: Problem, provider: Provider, row: Row) -> float:
    """What the first call of a fresh instance costs over a later one, in milliseconds."""
    contender = provider.prepare(problem, row.threads)
    start = time.perf_counter()
    contender.call()
    return max(0.0, (time.perf_counter() - start) * 1e3 - row.ms)


def _fill(row: Row, result: timing.Timing) -> None:
    row.ms, row.iqr_ms = result.best * 1e3, result.iqr * 1e3
    row.blocks, row.noisy = len(result.samples), result.noisy


def _new_row(
    case: Case, provider: Provider, roof: machine.Roof, host: machine.Machine, stamp: str
) -> Row:
    return Row(
        time=stamp,
        commit=results.commit(),
        machine=host.slug,
        isa=host.isa,
        threads=roof.threads,
        case=case.name,
        group=case.group,
        label=case.title,
        dtype=str(case.dtype).removeprefix("torch."),
        provider=provider.name,
        version=_version(provider),
        ours=provider.ours,
        status=OK,
    )


def _version(provider: Provider) -> str:
    if provider.torch:
        return torch.__version__
    if provider.ours:
        import nnarch

        return nnarch.__version__
    try:
        return importlib.metadata.version(provider.name.partition("_")[0])
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
