"""Turn stored results into one self-contained HTML page: `python bench/report.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnarch.benchmarking import machine, report, results

RESULTS = Path(__file__).parent / "results"


def main(
    csv: Annotated[Path | None, typer.Argument(help="This machine's file if left out.")] = None,
    html: Annotated[Path, typer.Option(help="The page to write.")] = Path("out/bench.html"),
) -> None:
    """Write a page of the last measurement of every case in a results file."""
    host = machine.describe()
    csv = csv or RESULTS / f"{host.slug}.csv"
    try:
        rows = results.latest(results.read(csv))
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from error
    elsewhere = any(row.machine != host.slug for row in rows)
    report.write(rows, None if elsewhere else host, html)
    print(f"page: {html}")


if __name__ == "__main__":
    typer.run(main)
