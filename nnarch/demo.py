"""The main job: real photos, real weights, our kernels beside torch's, then the clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from nnarch.accelerate import accelerate
from nnarch.backends import trace
from nnarch.benchmarking import machine, plots, timing
from nnarch.benchmarking.case import Case, Target
from nnarch.benchmarking.correctness import Problem
from nnarch.benchmarking.peers import PROVIDERS, Contender, Provider, select
from nnarch.benchmarking.results import Row
from nnarch.benchmarking.runner import run_case
from nnarch.classify import (
    DEMO_MODEL,
    demo_photos,
    demo_weights,
    imagenet_classes,
    load_model,
    probabilities,
    top_classes,
)
from nnarch.models import create_model, model_info
from nnarch.preprocess import imagenet_input

AGREEMENT = 1e-4
RACED = {"mobilenet_v2": "MobileNetV2", "resnet50": "ResNet-50"}
RIVALS = ("nnarch", "eager", "channels_last", "compile")

# Roughly how long the slow steps of a race take, so that the bar moves at an even speed.
_EXPECTED_SECONDS = {"compile": 40.0, "timing": 12.0}

Step = Callable[[str, float], None]


class Disagreement(RuntimeError):
    """nnarch and torch computed different results from the same weights and photo."""


def run(console: Console, picture: Path, *, race: bool = True) -> None:
    """Classify three photos, compare with torch, time two models and draw the ratios.

    Args:
        console: where it is told.
        picture: PNG file to write.
        race: whether to time the models; without it nothing is drawn.

    Raises:
        nnarch.classify.InputError: weights or photos are not installed.
        Disagreement: an output differs from torch's by more than 1e-4.
    """
    _classify(console)
    if not race:
        return
    rows = _race(console)
    _report(console, rows)
    plots.ratio_bars(rows, picture, title="nnarch.accelerate(model) vs the best of torch")
    console.print(f"picture: {picture}")


# -------------------------------------------------------------------------------------- photos


def _classify(console: Console) -> None:
    """Every photo through torch's model, nnarch's, and nnarch's accelerated."""
    weights = demo_weights()
    reference = load_model(DEMO_MODEL, weights, nn=torch.nn)
    plain = load_model(DEMO_MODEL, weights)
    accelerated = accelerate(plain)

    worst = 0.0
    photos = demo_photos()
    inputs = {name: imagenet_input(photo) for name, photo in photos.items()}
    for name, pixels in inputs.items():
        expected = probabilities(reference, pixels)
        got = probabilities(accelerated, pixels)
        for ours in (got, probabilities(plain, pixels)):
            difference = float((ours - expected).abs().max())
            if not difference <= AGREEMENT:  # a NaN is no agreement either
                raise Disagreement(f"{name}: off by {difference:.1e} from torch")
            worst = max(worst, difference)
        height, width = photos[name].shape[:2]
        console.print(_top5(f"{name} ({width}×{height})", got, expected))
    console.print(
        f"Every probability agrees with torch's: largest difference {worst:.1e}, "
        f"allowed {AGREEMENT:.0e}.\n{_kernels(accelerated, inputs['chelsea'])}\n"
    )


def _top5(title: str, ours: torch.Tensor, reference: torch.Tensor) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("MobileNetV2 sees", min_width=24)
    table.add_column("nnarch", justify="right")
    table.add_column("torch", justify="right")
    expected = dict(top_classes(reference, imagenet_classes(), count=1000))
    for label, share in top_classes(ours, imagenet_classes()):
        table.add_row(label, f"{share:.4f}", f"{expected[label]:.4f}")
    return table


def _kernels(model: torch.nn.Module, pixels: torch.Tensor) -> str:
    """Which operations ran, as evidence that these were our kernels."""
    with trace() as record:
        probabilities(model, pixels)
    ran = Counter((entry.op, entry.backend) for entry in record)
    return "It ran on: " + ", ".join(f"{n}× {op} ({backend})" for (op, backend), n in ran.items())


# ---------------------------------------------------------------------------------------- race


def _race(console: Console) -> list[Row]:
    """Time one image through every model and rival, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # One refresh a second: more would wake up inside the timed blocks.
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=1,
        transient=True,
    )
    try:
        with bar:
            task = bar.add_task("calibrating", total=len(RACED) * sum(_EXPECTED_SECONDS.values()))

            def step(what: str, seconds: float) -> None:
                bar.update(task, description=what, advance=seconds)

            host, roof = machine.describe(), machine.calibrate(1)
            return [row for name in RACED for row in _race_one(name, roof, host, step)]
    finally:
        torch.set_num_threads(threads)


def _race_one(name: str, roof: machine.Roof, host: machine.Machine, step: Step) -> list[Row]:
    case = Case(
        name=name,
        group="models",
        label=RACED[name],
        layer=lambda nn: create_model(name, nn=nn),
        shape=(1, *model_info(name).input_size),
        ours=accelerate,
        tolerance=AGREEMENT,
        target=Target(0, 0),  # the picture compares; it judges nothing
    )
    plan = timing.Plan()
    part = _EXPECTED_SECONDS["timing"] / plan.blocks

    rivals = [_announced(rival, RACED[name], step) for rival in select(RIVALS)]
    rows = run_case(
        case, rivals, plan, roof, host, on_round=lambda: step(f"{RACED[name]}: timing", part)
    )
    if not rows[0].timed:
        raise Disagreement(f"{name}: {rows[0].note}")
    return rows


def _announced(rival: Provider, model: str, step: Step) -> Provider:
    """The same provider, which tells the progress bar what it is about to prepare."""

    def prepare(problem: Problem, threads: int) -> Contender:
        step(f"{model}: preparing {rival.title}", 0)
        ready = rival.prepare(problem, threads)
        step(f"{model}: checking {rival.title}", _EXPECTED_SECONDS.get(rival.name, 0))
        return ready

    return replace(rival, prepare=prepare)


def _report(console: Console, rows: Sequence[Row]) -> None:
    table = Table(
        title="milliseconds for one image, one thread (minimum of 20 interleaved runs)",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("")
    for model in RACED.values():
        table.add_column(model, justify="right")
    for name in RIVALS:
        cells = [f"{row.ms:.1f}" if row.timed else row.note for row in rows if row.provider == name]
        table.add_row(PROVIDERS[name].title, *cells)
    ratios = [f"{row.ratio:.2f}×" for row in rows if row.ours]
    table.add_section()
    table.add_row("nnarch against the best of torch", *ratios, style="bold")
    console.print(table)
