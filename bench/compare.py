"""Head to head: `python bench/compare.py --help`. The protocol is nnarch/benchmarking/timing.py's.

Rows are appended to bench/results/<machine>.csv; bench/plot.py and bench/report.py draw from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnarch import benchmarking
from nnarch.benchmarking import machine

RESULTS = Path(__file__).parent / "results"


def main(
    only: Annotated[
        str | None, typer.Option(help="Part of a case's name or group, or a shell pattern.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A few cases with fewer blocks; not stored unless --csv is given.")
    ] = False,
    threads: Annotated[
        str, typer.Option(help="1 is the figure of record; 1,2 also reports two threads.")
    ] = "1",
    models: Annotated[bool, typer.Option(help="Include whole models.")] = True,
    providers: Annotated[
        str | None, typer.Option(help="Names, separated by commas; all default ones if left out.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Append the rows to this file.")] = None,
) -> None:
    """Measure nnarch against torch eager, channels_last, torch.compile and other runtimes."""
    if csv is None and not quick:
        csv = RESULTS / f"{machine.describe().slug}.csv"
    try:
        benchmarking.run(
            only,
            quick,
            [int(count) for count in threads.split(",")],
            models,
            html,
            csv,
            providers=providers.split(",") if providers else None,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
