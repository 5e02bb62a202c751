"""Tests and benchmarks on this machine's GPU: `make gpu-check`.

Without a GPU it says so and does nothing. With one, it runs the tests marked `gpu`, then the
benchmark cases on the device, and appends the rows to bench/results/<device>.csv.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import nn

from nnarch.benchmarking import cases, machine, peers, results, runner, tables, timing
from nnarch.benchmarking.case import Case
from nnarch.benchmarking.machine import Machine, Roof
from nnarch.benchmarking.results import Row

RESULTS = Path(__file__).parent / "results"
PROVIDERS = ("nnarch", "eager", "channels_last", "compile")
_MIB = 2**20


def main(
    only: Annotated[
        str | None, typer.Option(help="Part of a case's name or group, or a shell pattern.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="One case of every group.")] = False,
    tests: Annotated[bool, typer.Option(help="Run the tests first.")] = True,
) -> None:
    """Check and measure the GPU kernels on the first GPU."""
    if not torch.cuda.is_available():
        print("gpu-check: no GPU on this machine: nothing was run, nothing was measured")
        return
    try:
        chosen = cases.select(only, quick=quick)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if tests:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
        failed = subprocess.call(command, cwd=Path(__file__).parents[1])
        if failed:
            raise typer.Exit(failed)
    rows = measure(torch.device("cuda"), chosen)
    tables.print_rows(rows, Console())
    target = RESULTS / f"{rows[0].machine}.csv"
    results.append(rows, target)
    print(f"rows: {target}")


def measure(device: torch.device, chosen: list[Case]) -> list[Row]:
    """Run `chosen` on `device`, correctness first.

    float32 stays float32: TF32 is off for all providers, so that the bound on errors is the same.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    host, roof = describe(device), calibrate(device)
    contestants = peers.select(PROVIDERS)
    rows: list[Row] = []
    for case in track(chosen, "measuring", transient=True):
        rows += runner.run_case(
            on_device(case, device), contestants, timing.Plan(), roof, host, measure=_timed(device)
        )
    return rows


def on_device(case: Case, device: torch.device) -> Case:
    """The same case with its module, its input and its truth on `device`."""

    def layer(namespace: Any) -> nn.Module:
        module = case.layer(namespace)
        # Work is counted on meta tensors, which have nowhere to go.
        on_meta = any(p.is_meta for p in module.parameters())
        return module if on_meta else module.to(device)

    class OnDevice(Case):
        def build(self) -> tuple[nn.Module, torch.Tensor]:
            module, x = case.build()
            return module.to(device), x.to(device)

    fields = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    return OnDevice(**{**fields, "layer": layer})


def _timed(device: torch.device) -> Callable[..., Mapping[str, timing.Timing]]:
    """As `timing.measure`, waiting for the device at the end of every call."""

    def measure(calls: Mapping[str, timing.Call], plan: timing.Plan) -> dict[str, timing.Timing]:
        return timing.measure({name: _waiting(call, device) for name, call in calls.items()}, plan)

    return measure


def _waiting(call: timing.Call, device: torch.device) -> timing.Call:
    def run() -> None:
        call()
        _synchronize(device)

    return run


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> Machine:
    """The machine, named after its GPU."""
    here = machine.describe()
    if device.type != "cuda":
        return here
    properties = torch.cuda.get_device_properties(device)
    isa = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip is not None:
        isa = properties.gcnArchName.partition(":")[0]
    return dataclasses.replace(here, cpu=properties.name, cores=1, isa=isa)


def calibrate(device: torch.device, size: int = 4096, megabytes: int = 512) -> Roof:
    """What torch's float32 matrix product and a copy reach: a lower bound of the device's limits.

    Args:
        device: where to measure.
        size: rows and columns of the matrices.
        megabytes: of the buffer that is copied; past every cache.
    """
    a = torch.ones(size, size, device=device)
    source = torch.ones(megabytes * _MIB // 4, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(a, a), "copy": lambda: target.copy_(source)}
    timings = _timed(device)(calls, timing.QUICK)
    moved = 2 * megabytes * _MIB
    return Roof(
        peak=2 * size**3 / timings["product"].best,
        bandwidth=((moved, moved / timings["copy"].best),),
        source="torch",
        threads=1,
    )


if __name__ == "__main__":
    typer.run(main)
