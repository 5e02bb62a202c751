"""The Santa Fe laser: one step ahead by an echo-state network, and a free run through a collapse.

The series is the intensity of a far-infrared laser (data set A of the Santa Fe competition, 1991),
10,093 measured values, as the reservoirpy package carries them: `make laser` fetches that package
into .venv/laser, as a file and not as a dependency.
Usage: python examples/santa_fe_laser.py [--data FILE] [--picture out/santa_fe_laser.png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

import nnarch.nn as nn

TRAIN, WASHOUT, FREE = 6000, 200, 100
ROOT = Path(__file__).resolve().parents[1]


def laser(file: Path | None = None) -> np.ndarray:
    """The series, scaled to 0 … 1.

    Raises:
        FileNotFoundError: it was not fetched; the message says how.
    """
    found = [file] if file else sorted((ROOT / ".venv" / "laser").rglob("santafe_laser.npy"))
    if not found or not found[0].exists():
        raise FileNotFoundError("no santafe_laser.npy: `make laser` fetches it, --data names one")
    series = np.load(found[0]).astype(np.float64).ravel()
    return series / 255.0


def build(seed: int = 0) -> nn.EchoStateNetwork:
    """A reservoir of 1,000 neurons that reads the intensity and predicts the next one."""
    return nn.EchoStateNetwork(
        1, 1000, 1, connectivity=0.01, spectral_radius=0.9, leak=0.9, input_scaling=2.0,
        bias_scaling=0.5, washout=WASHOUT, solver="ridge", ridge=1e-6, input_to_readout=True,
        seed=seed, dtype=torch.float64,
    )  # fmt: skip


def nrmse(said: np.ndarray, truth: np.ndarray) -> float:
    """The error relative to the spread of the truth: 1 is what the mean would reach."""
    return float(np.sqrt(np.mean((said - truth) ** 2)) / truth.std())


def picture(path: Path, truth: np.ndarray, said: np.ndarray, after: np.ndarray, run: np.ndarray):
    """One-step predictions over the truth, and a free run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6))
    top.plot(truth[:400], label="laser")
    top.plot(said[:400], "--", label="predicted, one step ahead")
    top.set(title="Santa Fe laser, steps that the network has not seen", ylabel="intensity")
    top.legend(loc="upper right")
    bottom.plot(after, label="laser")
    bottom.plot(run, "--", label="free run")
    bottom.set(xlabel="step", ylabel="intensity")
    bottom.legend(loc="upper right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Fit, predict, run freely."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--picture", type=Path, default=Path("out/santa_fe_laser.png"))
    options = parser.parse_args()
    console = Console()
    try:
        series = laser(options.data)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    with Progress(console=console) as progress:
        task = progress.add_task("building the reservoir", total=4)
        network = build()
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
    picture(options.picture, truth, said, series[TRAIN : TRAIN + FREE], run)
    persistence = nrmse(series[TRAIN:-1], truth)
    console.print(
        f"{len(truth)} steps not seen, one step ahead: NRMSE {nrmse(said, truth):.4f} "
        f"(repeating the last value: {persistence:.2f})\npicture: {options.picture}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
