"""What is measured: prints every case with its work and its target.

To add one, add an entry to nnarch/benchmarking/cases.py.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from nnarch.benchmarking import cases
from nnarch.benchmarking.peers import Unavailable


def main(
    only: Annotated[
        str | None, typer.Option(help="Part of a case's name or group, or a shell pattern.")
    ] = None,
) -> None:
    """List the cases."""
    table = Table()
    for heading in ("case", "group", "input", "GFLOP", "MB", "must", "aim", "quick"):
        table.add_column(heading, no_wrap=True)
    for case in cases.select(only):
        goal = cases.target(case)
        try:
            work = [f"{case.total_flops / 1e9:.3g}", f"{case.total_bytes / 1e6:.3g}"]
        except Unavailable as error:
            work = ["–", str(error)]
        shape = "×".join(map(str, case.shape))
        goals = [f"{goal.must:g}", f"{goal.aim:g}", "yes" if case.quick else ""]
        table.add_row(case.name, case.group, shape, *work, *goals)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
