"""Tests and benchmarks on this machine's GPU: `make gpu-check`.

Without a GPU it says so and does nothing. With one, it runs the tests marked `gpu`, then the
benchmark cases on the device, and appends the rows of every case to bench/results/<device>.csv at
once: a run that is cut off keeps what it has.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from nnarch.benchmarking import cases, gpu, gpu_summary, peers, results
from nnarch.benchmarking.gpu_cases import GPU_CASES
from nnarch.benchmarking.results import Row

RESULTS = Path(__file__).parent / "results"


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Part of a case's name or group, or a shell pattern; may be repeated."),
    ] = None,
    all_cases: Annotated[
        bool, typer.Option("--all", help="The cases that CPUs are measured on, too.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="The most important cases alone.")] = False,
    providers: Annotated[
        str, typer.Option(help="Who is measured, names with commas between.")
    ] = ",".join(gpu.PROVIDERS),
    seconds: Annotated[
        float | None, typer.Option(help="Begin no case after so many seconds.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="File that the rows are appended to.")] = None,
    processes: Annotated[
        int | None, typer.Option(help="Processes that compile kernels first; 0: none.")
    ] = None,
    tests: Annotated[bool, typer.Option(help="Run the tests first.")] = True,
    device: Annotated[str, typer.Option(hidden=True)] = "cuda",
) -> None:
    """Check and measure the GPU kernels on the first GPU."""
    started = time.monotonic()
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: no GPU on this machine: nothing was run, nothing was measured")
        return
    among = (*GPU_CASES, *cases.CASES) if all_cases else GPU_CASES
    names = providers.split(",")
    try:
        chosen = cases.select(only, quick=quick, among=among)
        peers.select(names)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if tests:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
        failed = subprocess.call(command, cwd=Path(__file__).parents[1])
        if failed:
            raise typer.Exit(failed)
    if seconds is not None:
        seconds -= time.monotonic() - started
    target = csv or RESULTS / f"{gpu.describe(device).slug}.csv"
    rows: list[Row] = []
    for case_rows in gpu.run(
        chosen,
        device=device,
        providers=names,
        seconds=seconds,
        processes=processes,
        report=lambda line: print(line, flush=True),
    ):
        results.append(case_rows, target)
        rows += case_rows
        print(gpu_summary.line(case_rows), flush=True)
    print(gpu_summary.text(rows, [case.name for case in chosen]))
    print(f"rows: {target}; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    typer.run(main)
