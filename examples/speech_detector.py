"""Where somebody speaks: Silero's detector with its published weights, on nnarch's layers.

    make example NAME=speech_detector            # the recording that comes with the weights
    make example NAME=speech_detector ARGS="--wav mine.wav"

Three ways to the same probabilities: chunk after chunk with an LSTM cell, as a microphone would
deliver them; all chunks at once with a whole-sequence LSTM; and the first on torch's own layers.
Noise of equal power must leave the detector unmoved. A picture shows both curves.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from datasets import silero_vad
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from scipy.io import wavfile
from torch import Tensor

import nnarch.nn

RATE = 16_000
CHUNK, CONTEXT = 512, 64  # samples: a decision every 32 ms, which also sees the 4 ms before it
THRESHOLD = 0.5

console = Console()


class SpeechDetector(torch.nn.Module):
    """Spectrum by convolution, four convolutions, an LSTM cell, a probability.

    Args:
        nn: where the layers come from, nnarch.nn or torch.nn.
    """

    def __init__(self, nn: Any = nnarch.nn) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def features(self, chunks: Tensor) -> Tensor:
        """Chunks with their context [N, 576] to features [N, 128]."""
        padded = torch.nn.functional.pad(chunks[:, None], (0, CONTEXT), mode="reflect")
        real, imaginary = self.stft_conv(padded).chunk(2, 1)
        x = (real.square() + imaginary.square()).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        return x.squeeze(2)

    def probability(self, h: Tensor) -> Tensor:
        """Of speech, from the LSTM's output [N, 128]: [N]."""
        return self.final_conv(h.relu()[:, :, None]).sigmoid().flatten()

    def forward(self, chunk: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        """One chunk a sequence [B, 576] and the state before it: probability [B], state after."""
        state = self.lstm_cell(self.features(chunk), state)
        return self.probability(state[0]), state


def detector(nn: Any, weights: Path) -> SpeechDetector:
    """The detector with its published weights."""
    model = SpeechDetector(nn).eval()
    model.load_state_dict(load_file(weights))
    return model


def whole_sequence(model: SpeechDetector) -> torch.nn.Module:
    """An LSTM over whole sequences with the weights of the model's cell."""
    lstm = nnarch.nn.LSTM(128, 128)
    lstm.load_state_dict({f"{k}_l0": v for k, v in model.lstm_cell.state_dict().items()})
    return lstm.eval()


# ----------------------------------------------------------------------------------- running


def chunks_of(samples: Tensor) -> Tensor:
    """[T, 576]: every chunk of 512 samples behind the 64 before it."""
    whole = samples[: len(samples) // CHUNK * CHUNK]
    return torch.nn.functional.pad(whole, (CONTEXT, 0)).unfold(0, CHUNK + CONTEXT, CHUNK)


@torch.inference_mode()
def streamed(model: SpeechDetector, chunks: Tensor, what: str) -> tuple[Tensor, float]:
    """Probabilities chunk after chunk, and milliseconds a chunk."""
    state = (torch.zeros(1, 128), torch.zeros(1, 128))
    found = []
    model(chunks[:1], state)  # what happens once: weights are packed
    begin = time.perf_counter()
    for chunk in track(chunks, what, console=console, transient=True):
        probability, state = model(chunk[None], state)
        found.append(probability)
    return torch.cat(found), (time.perf_counter() - begin) * 1e3 / len(chunks)


@torch.inference_mode()
def at_once(model: SpeechDetector, chunks: Tensor) -> tuple[Tensor, float]:
    """The same of a whole recording in one go."""
    lstm = whole_sequence(model)
    begin = time.perf_counter()
    h, _ = lstm(model.features(chunks))
    found = model.probability(h)
    return found, (time.perf_counter() - begin) * 1e3 / len(chunks)


def read_wav(path: Path) -> Tensor:
    """A mono recording at 16 kHz as float32 in [-1, 1]."""
    rate, samples = wavfile.read(path)
    if rate != RATE or samples.ndim != 1:
        raise typer.BadParameter(f"{path} has {rate} Hz and shape {samples.shape}: 16 kHz mono")
    scale = np.iinfo(samples.dtype).max if samples.dtype.kind == "i" else 1.0
    return torch.from_numpy(samples.astype(np.float32) / np.float32(scale))


def draw(samples: Tensor, curves: dict[str, Tensor], path: Path) -> None:
    """The recording, and the probability of speech in it and in the noise."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 4.5), sharex=True)
    top.plot(np.arange(len(samples)) / RATE, samples, linewidth=0.4, color="0.35")
    top.set_ylabel("amplitude")
    for name, curve in curves.items():
        bottom.plot((np.arange(len(curve)) + 1) * CHUNK / RATE, curve, linewidth=1, label=name)
    bottom.axhline(THRESHOLD, color="0.7", linewidth=0.8, linestyle=":")
    bottom.set(xlabel="seconds", ylabel="probability of speech", ylim=(-0.03, 1.03))
    bottom.legend(loc="lower right", bbox_to_anchor=(1, 1.0), ncols=2, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    wav: Annotated[Path | None, typer.Option(help="a mono recording at 16 kHz")] = None,
    seconds: Annotated[float, typer.Option(help="how much of it")] = 30.0,
    picture: Path = Path("out/speech_detector.png"),
) -> None:
    """Find speech in a recording, and none in noise."""
    weights, recording = silero_vad()
    samples = read_wav(wav or recording)[: int(seconds * RATE)]
    chunks = chunks_of(samples)
    noise = torch.randn(len(samples), generator=torch.Generator().manual_seed(0))
    noise *= samples.square().mean().sqrt()

    ours = detector(nnarch.nn, weights)
    speech, streaming_ms = streamed(ours, chunks, "nnarch, streaming")
    once, once_ms = at_once(ours, chunks)
    torchs, torch_ms = streamed(detector(torch.nn, weights), chunks, "torch, streaming")
    silence, _ = streamed(ours, chunks_of(noise), "noise")

    table = Table("way", "ms a chunk", "times real time", "largest difference")
    for name, ms, found in (
        ("torch.nn, streaming", torch_ms, torchs),
        ("nnarch.nn, streaming", streaming_ms, speech),
        ("nnarch.nn, all at once", once_ms, once),
    ):
        difference = (found - torchs).abs().max().item()
        table.add_row(name, f"{ms:.3f}", f"{CHUNK / RATE * 1e3 / ms:.0f}", f"{difference:.1e}")
    console.print(table)
    share = (speech > THRESHOLD).float().mean().item()
    console.print(
        f"speech in {share:.0%} of the chunks, highest probability {speech.max():.3f}; "
        f"in noise of the same power at most {silence.max():.3f}"
    )
    draw(samples, {"recording": speech, "noise of the same power": silence}, picture)
    console.print(f"picture: {picture}")


if __name__ == "__main__":
    typer.run(main)
