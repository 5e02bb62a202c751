"""The Triton kernels on GPUs that are not here: `python bench/static_gpu.py --help`.

Compiles every kernel with every tile for sm_80, sm_90, sm_100, sm_120 and gfx942 and prints
registers, spills, shared memory, matrix instructions and the predicted share of the roofline.
*Compiled* and *predicted*: nothing is measured. Exits with 1 where a kernel breaks a rule.
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


def main(
    family: Annotated[
        list[str] | None, typer.Option(help="Such as conv2d; may be repeated. All if left out.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Such as sm_90; may be repeated. All if left out.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A few minutes' selection.")] = False,
    csv: Annotated[bool, typer.Option(help="Write bench/results/static_gpu.csv.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write the rows to this CSV file.")] = None,
) -> None:
    """Compile the Triton kernels for GPUs that are not here and judge the result."""
    if launch.INTERPRETED:
        raise typer.BadParameter("TRITON_INTERPRET=1 is set: interpreted kernels do not compile")
    families = _known("family", family, static.FAMILIES)
    targets = [TARGETS[name] for name in _known("target", target, tuple(TARGETS))]
    all_cases = static.family_cases(families)
    cases = [case for name in families for case in all_cases[name]]
    select = survey.quick_jobs if quick else survey.all_jobs
    rows = compile_all(list(select(cases, targets)))
    Console().print(table(rows))
    path = RESULTS if csv else output
    if path is not None:
        write(path, rows)
    broken = [row for row in rows if row.broken]
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


def table(rows: list[Compiled]) -> Table:
    """The rows as people read them."""
    result = Table(title="Triton kernels, compiled ahead of time; roofline predicted, not measured")
    for name in ("case", "target", "kernel", "precision", "tile"):
        result.add_column(name, no_wrap=name != "case")
    for name in ("programs", "registers", "spills", "shared", "matrix", "roofline"):
        result.add_column(name, justify="right")
    result.add_column("broken", style="red")
    for row in rows:
        share = "" if row.roofline is None else f"{row.roofline:.0%}"
        result.add_row(
            *(row.case, row.target, row.kernel, row.precision, row.tile),
            *(f"{row.programs:,}", str(row.registers), str(row.spills), f"{row.shared:,}"),
            *(str(row.matrix_instructions), share, row.broken),
        )
    return result


def write(path: Path, rows: list[Compiled]) -> None:
    """The rows as CSV; a file that exists is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv_module.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(Compiled))
        for row in rows:
            values = dataclasses.asdict(row)
            if row.roofline is not None:
                values["roofline"] = f"{row.roofline:.3f}"
            writer.writerow(values.values())


if __name__ == "__main__":
    typer.run(main)
