"""Draw the stored results: `python bench/plot.py` writes ratio bars and the roofline as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nnarch.benchmarking import machine, plots, results, rooflines

RESULTS = Path(__file__).parent / "results"


def main(
    csv: Annotated[Path | None, typer.Argument(help="This machine's file if left out.")] = None,
    folder: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("out"),
    threads: Annotated[int, typer.Option(help="Rows of this many threads.")] = 1,
) -> None:
    """Draw the last measurement of every case in a results file."""
    csv = csv or RESULTS / f"{machine.describe().slug}.csv"
    try:
        rows = [row for row in results.latest(results.read(csv)) if row.threads == threads]
        plots.ratio_bars(rows, folder / f"{csv.stem}-ratios.png")
        rooflines.roofline(rows, folder / f"{csv.stem}-roofline.png")
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    print(f"pictures: {folder}/{csv.stem}-ratios.png, {folder}/{csv.stem}-roofline.png")


if __name__ == "__main__":
    typer.run(main)
