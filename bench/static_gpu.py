"""The Triton kernels on GPUs that are not here: `python bench/static_gpu.py --help`.

Compiles every kernel with every tile for sm_80, sm_90, sm_100, sm_120 and gfx942 and prints
registers, spills, shared memory, matrix instructions and the predicted share of the roofline.
*Compiled* and *predicted*: nothing is measured. Exits with 1 where a kernel breaks a rule. All of
it takes about half an hour on one core the first time; Triton keeps what it has compiled.
"""

from __future__ import annotations

import csv as csv_module
import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nnarch.kernels.gpu import launch, static, survey
from nnarch.kernels.gpu.survey import Compiled, Job
from nnarch.kernels.gpu.targets import TARGETS

RESULTS = Path(__file__).parent / "results" / "static_gpu.csv"
_TITLE = "Triton kernels, compiled ahead of time; roofline predicted, not measured"
_WIDTH = 200  # a line that wraps can still be read, a column of width 0 cannot


def main(
    family: Annotated[
        list[str] | None, typer.Option(help="Such as conv2d; may be repeated. All if left out.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Such as sm_90; may be repeated. All if left out.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Every kernel once a target, default tile.")] = False,
    each: Annotated[bool, typer.Option(help="Print a line for each compiled kernel.")] = False,
    csv: Annotated[bool, typer.Option(help="Write bench/results/static_gpu.csv.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the rows to this CSV file.")] = None,
) -> None:
    """Compile the Triton kernels for GPUs that are not here and judge the result."""
    if launch.INTERPRETED:
        raise typer.BadParameter("TRITON_INTERPRET=1 is set: interpreted kernels do not compile")
    families = _known("family", family, static.FAMILIES)
    targets = [TARGETS[name] for name in _known("target", target, tuple(TARGETS))]
    cases = [case for group in static.family_cases(families).values() for case in group]
    select = survey.each_kernel if quick else survey.all_jobs
    rows = compile_all(list(select(cases, targets)))
    broken = [row for row in rows if row.broken]
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(table(rows) if each else summary(rows))
    if broken and not each:
        console.print(table(broken))
    path = RESULTS if csv else output
    if path is not None:
        write(path, rows)
    typer.echo(f"{len(rows)} kernels compiled, {len(broken)} break a rule; nothing was measured")
    raise typer.Exit(1 if broken else 0)


def _known(what: str, names: list[str] | None, known: tuple[str, ...]) -> list[str]:
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"{what} must be one of {', '.join(known)}, got {unknown[0]}")
    return list(names or known)


def compile_all(jobs: list[Job]) -> list[Compiled]:
    """One row for each job, with a progress bar on the terminal."""
    columns = (TextColumn("{task.description:<60}"), BarColumn(), MofNCompleteColumn())
    rows = []
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(bar, description=f"{job.target.name} {job.case.name}")
            rows.append(survey.compile_job(job))
            progress.advance(bar)
    return rows


def summary(rows: list[Compiled]) -> Table:
    """One line for each kernel and target: the worst of all its tiles, shapes and precisions."""
    result = Table(title=_TITLE)
    for name in ("kernel", "target"):
        result.add_column(name, no_wrap=True)
    for name in ("compiled", "registers", "spills", "shared", "least roofline", "broken"):
        result.add_column(name, justify="right")
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.target), []).append(row)
    for (kernel, target), group in groups.items():
        shares = [r.roofline for r in group if r.roofline is not None and r.default]
        result.add_row(
            *(kernel, target, str(len(group))),
            *(f"{max(getattr(r, f) for r in group):,}" for f in ("registers", "spills", "shared")),
            *(f"{min(shares):.0%}" if shares else "", str(sum(bool(r.broken) for r in group))),
        )
    return result


def table(rows: list[Compiled]) -> Table:
    """One line for each compiled kernel."""
    result = Table(title=_TITLE)
    for name in ("case", "target", "kernel", "precision", "tile", "default"):
        result.add_column(name, no_wrap=name != "case")
    for name in ("programs", "registers", "spills", "shared", "matrix", "roofline"):
        result.add_column(name, justify="right")
    result.add_column("broken", style="red")
    for row in rows:
        share = "" if row.roofline is None else f"{row.roofline:.0%}"
        result.add_row(
            *(row.case, row.target, row.kernel, row.precision, row.tile, row.default),
            *(f"{row.programs:,}", str(row.registers), str(row.spills), f"{row.shared:,}"),
            *(str(row.matrix_instructions), share, row.broken),
        )
    return result


def write(path: Path, rows: list[Compiled]) -> None:
    """The rows as CSV; a file that exists is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv_module.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(Compiled))
        for row in rows:
            values = dataclasses.asdict(row)
            if row.roofline is not None:
                values["roofline"] = f"{row.roofline:.3f}"
            writer.writerow(values.values())


if __name__ == "__main__":
    typer.run(main)
