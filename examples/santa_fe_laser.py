"""The Santa Fe laser: one step ahead by an echo-state network, and a free run.

The intensity of a far-infrared laser (data set A of the Santa Fe competition, 1991): 10,093
measured values from 0 to 255.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import matplotlib
import numpy as np
import torch
import typer
from datasets import console, santa_fe_laser
from rich.progress import Progress

import nnarch.nn as nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAIN, WASHOUT, FREE = 6000, 200, 100


def build(seed: int = 0) -> nn.EchoStateNetwork:
    """A reservoir of 1,000 neurons that reads the intensity and predicts the next one."""
    return nn.EchoStateNetwork(
        1, 1000, 1, connectivity=0.01, spectral_radius=0.7, input_scaling=2.0,
        bias_scaling=1.0, washout=WASHOUT, solver="ridge", ridge=1e-5, input_to_readout=True,
        seed=seed, dtype=torch.float64,
    )  # fmt: skip


def nrmse(said: np.ndarray, truth: np.ndarray) -> float:
    """The error relative to the spread of the truth: 1 is what the mean would reach."""
    return float(np.sqrt(np.mean((said - truth) ** 2)) / truth.std())


def draw(
    path: Path, truth: np.ndarray, said: np.ndarray, after: np.ndarray, run: np.ndarray
) -> None:
    """One-step predictions over the truth, and a free run."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6))
    top.plot(truth[:400], label="laser")
    top.plot(said[:400], "--", label="predicted, one step ahead")
    top.set_title("Santa Fe laser, steps that the network has not seen", loc="left")
    top.set(ylabel="intensity")
    top.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, frameon=False)
    bottom.plot(after, label="laser")
    bottom.plot(run, "--", label="free run")
    bottom.set(xlabel="step", ylabel="intensity")
    bottom.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(
    picture: Annotated[Path, typer.Option(help="PNG to write")] = Path("out/santa_fe_laser.png"),
    seed: int = 0,
) -> None:
    """Fit, predict, run freely."""
    series = santa_fe_laser() / 255.0
    with Progress(console=console) as progress:
        task = progress.add_task("building the reservoir", total=4)
        network = build(seed)
        progress.update(task, description="fitting the readout", advance=1)
        network.fit(series[: TRAIN - 1], series[1:TRAIN])
        progress.update(task, description="predicting", advance=1)
        # From a little before, so that the state is the series' own where the test begins.
        said = network.predict(series[TRAIN - WASHOUT : -1])[WASHOUT:]
        truth = series[TRAIN + 1 :]
        progress.update(task, description="running freely", advance=1)
        network.warm_up(series[TRAIN - WASHOUT : TRAIN])
        run = network.generate(FREE)[:, 0]
        progress.update(task, description="done", advance=1)
    draw(picture, truth, said, series[TRAIN : TRAIN + FREE], run)
    persistence = nrmse(series[TRAIN:-1], truth)
    console.print(
        f"{len(truth)} steps not seen, one step ahead: NRMSE {nrmse(said, truth):.4f} "
        f"(repeating the last value: {persistence:.2f})\npicture: {picture}"
    )


if __name__ == "__main__":
    typer.run(main)
