"""A recurrent network learns to write like Shakespeare, one character after another.

    make example NAME=char_lm                       # an LSTM, a few minutes on two cores
    make example NAME=char_lm ARGS="--cell gru --steps 500"

Trained on nine tenths of the plays and poems, judged by its cross-entropy on a twentieth that it
never saw, against a trigram model of the same text. A run that was killed goes on where it was, bit
for bit; `--fresh` starts again.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from checkpoint import Checkpoint
from datasets import shakespeare
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

import nnarch

BATCH, TIME = 32, 64  # streams, and characters of each in a step
SAVE_EVERY = 100

console = Console()


class Text:
    """The characters as numbers, cut into what is learnt and what is asked."""

    def __init__(self, text: str) -> None:
        self.alphabet = sorted(set(text))
        number = {character: i for i, character in enumerate(self.alphabet)}
        codes = torch.tensor([number[character] for character in text])
        learnt, unseen = int(len(codes) * 0.9), int(len(codes) * 0.95)
        self.train, self.test = codes[:learnt], codes[unseen:]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Step `step` of 32 streams that each read on where they were: input, target [B, T]."""
        length = len(self.train) // BATCH
        begin = step * TIME % (length - TIME - 1)
        streams = self.train[: BATCH * length].view(BATCH, length)[:, begin : begin + TIME + 1]
        return streams[:, :-1], streams[:, 1:]

    def decode(self, codes: list[int]) -> str:
        """Numbers as text."""
        return "".join(self.alphabet[code] for code in codes)


def trigram_nats(text: Text) -> float:
    """Cross-entropy on the test text of a trigram model, in nats a character.

    Interpolates relative frequencies of three, two and one characters and the uniform distribution,
    with weights that grow with how often the context was seen (Witten and Bell, 1991).
    """
    size = len(text.alphabet)
    train, test = text.train.numpy(), text.test.numpy()
    probability = np.full(len(test) - 2, 1 / size)
    for order in (1, 2, 3):
        counts = np.zeros(size**order)
        np.add.at(counts, _codes(train, order, size), 1)
        table = counts.reshape(-1, size)
        seen, kinds = table.sum(1, keepdims=True), (table > 0).sum(1, keepdims=True)
        at = _codes(test[3 - order :], order, size)
        context = at // size
        n, k = seen[context, 0], kinds[context, 0]
        trust = np.where(n > 0, n / np.maximum(n + k, 1), 0.0)
        frequency = table.reshape(-1)[at] / np.maximum(n, 1)
        probability = trust * frequency + (1 - trust) * probability
    return float(-np.log(probability).mean())


def _codes(text: np.ndarray, order: int, size: int) -> np.ndarray:
    """Each run of `order` characters as one number."""
    count = len(text) - order + 1
    return sum(text[i : i + count] * size ** (order - 1 - i) for i in range(order))


@torch.inference_mode()
def unseen_nats(model: torch.nn.Module, text: Text) -> float:
    """Cross-entropy of the model on the test text, read as 64 streams, in nats a character."""
    model.eval()
    length = (len(text.test) - 1) // 64
    inputs = text.test[: 64 * length].view(64, length)
    targets = text.test[1 : 64 * length + 1].view(64, length)
    state, total = None, 0.0
    for begin in range(0, length, 256):
        part = slice(begin, begin + 256)
        logits, state = model(inputs[:, part], state)
        total += cross_entropy(logits, targets[:, part], "sum").item()
    return total / targets.numel()


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Of logits [B, T, V] and targets [B, T], in nats."""
    return nnarch.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction=reduction
    )


@torch.inference_mode()
def sample(model: torch.nn.Module, text: Text, length: int, temperature: float) -> str:
    """Text that the model writes after "\\nKING"."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    codes = [text.alphabet.index(character) for character in "\nKING"]
    logits, state = model(torch.tensor([codes]), None)
    for _ in range(length):
        odds = (logits[0, -1] / temperature).softmax(0)
        codes.append(int(torch.multinomial(odds, 1, generator=generator)))
        logits, state = model(torch.tensor([[codes[-1]]]), state)
    return text.decode(codes).strip()


def train(model: torch.nn.Module, text: Text, steps: int, checkpoint: Checkpoint) -> list[float]:
    """Truncated backpropagation through time; returns the loss of every step."""
    optimizer = checkpoint.parts["optimizer"]
    saved = checkpoint.load() or {"losses": [], "state": None}
    losses, state = list(saved["losses"]), saved["state"]
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("training", total=steps, completed=len(losses))
        model.train()
        for step in range(len(losses), steps):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (0.55 + 0.45 * math.cos(math.pi * step / steps))
            inputs, targets = text.batch(step)
            logits, state = model(inputs, state)
            loss = cross_entropy(logits, targets)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            state = _detached(state)
            losses.append(loss.item())
            bar.update(task, advance=1, description=f"loss {losses[-1]:.3f}")
            if len(losses) % SAVE_EVERY == 0 or len(losses) == steps:
                checkpoint.save(losses=losses, state=state)
    return losses


def _detached(state: Any) -> Any:
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def draw(losses: list[float], found: float, trigram: float, path: Path) -> None:
    """The loss of every step, smoothed, and where both models ended."""
    window = min(50, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axes = plt.subplots(figsize=(8, 4))
    axes.plot(np.arange(len(losses)), losses, color="0.85", linewidth=0.6)
    axes.plot(np.arange(len(smooth)) + window, smooth, label="training")
    axes.axhline(trigram, color="tab:red", linestyle="--", label=f"trigram, unseen: {trigram:.3f}")
    axes.axhline(found, color="tab:green", linestyle="--", label=f"this, unseen: {found:.3f}")
    top = max(trigram, float(smooth[min(len(smooth) - 1, window)])) + 0.3
    axes.set(xlabel="step", ylabel="nats a character", ylim=(min(found, smooth.min()) - 0.1, top))
    axes.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(
    cell: Annotated[str, typer.Option(help="lstm, gru or rnn")] = "lstm",
    steps: int = 1500,
    hidden: int = 256,
    fresh: Annotated[bool, typer.Option(help="forget an unfinished run")] = False,
    folder: Annotated[Path, typer.Option(help="checkpoint and picture")] = Path("out/char_lm"),
) -> None:
    """Train, compare with a trigram model, write a page, draw the curve."""
    text = Text(shakespeare())
    torch.manual_seed(0)
    model = nnarch.create_model(
        f"{cell}_language_model",
        vocabulary=len(text.alphabet),
        embedding=64,
        hidden=hidden,
        layers=1,
    )
    optimizer = torch.optim.Adam(model.parameters())
    path = folder / f"{cell}_{hidden}_{steps}.pt"
    if fresh:
        path.unlink(missing_ok=True)
    losses = train(model, text, steps, Checkpoint(path, model=model, optimizer=optimizer))

    with console.status("reading the unseen text …"):
        found, trigram = unseen_nats(model, text), trigram_nats(text)
    verdict = "beats" if found < trigram else "does NOT beat"
    console.print(
        f"{cell}, {sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps: "
        f"{found:.3f} nats a character on unseen text; it {verdict} the trigram's {trigram:.3f}"
    )
    console.print(Panel(sample(model, text, 400, temperature=0.7), title="it writes"))
    picture = folder / f"{cell}.png"
    draw(losses, found, trigram, picture)
    console.print(f"picture: {picture}")


if __name__ == "__main__":
    typer.run(main)
