"""A small Transformer learns to copy a sequence of digits, or to write it backwards.

    make example NAME=sequence_tasks                      # both, about a minute on two cores
    make example NAME=sequence_tasks ARGS="--task copy"

Judged by whole sequences that it never saw. The picture shows where the decoder looks: along one
diagonal to copy, along the other to reverse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from checkpoint import Checkpoint
from rich.console import Console
from seq2seq_training import (
    END,
    START,
    Batch,
    Recipe,
    attention_maps,
    draw_maps,
    padded,
    train,
)
from torch import Tensor

import nnarch
from nnarch.models.transformer import TransformerModel

FIRST = 3  # the token of digit 0
LONGEST = 16
TASKS = ("copy", "reverse")

console = Console()


def make_batch(task: str, seed: int, size: int = 64) -> Batch:
    """Sequences of 1 to 16 random digits, and what shall be written; `seed` decides which."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, LONGEST + 1, (size,), generator=generator).tolist()
    digits = [torch.randint(FIRST, FIRST + 10, (n,), generator=generator).tolist() for n in lengths]
    written = [d[::-1] if task == "reverse" else d for d in digits]
    return padded(digits), padded([[START, *w, END] for w in written])


def make_model() -> TransformerModel:
    """Two layers of 64 values each way."""
    return nnarch.create_model(
        "transformer_base",
        vocabulary=FIRST + 10, d_model=64, heads=4, feedforward=128, encoder_layers=2,
        decoder_layers=2, dropout=0.0, label_smoothing=0.0,
    )  # fmt: skip


def unseen_accuracy(model: TransformerModel, task: str) -> float:
    """Per cent of 1,000 unseen sequences that are written without a mistake."""
    model.eval()
    source, target = make_batch(task, seed=2**40, size=1000)
    written = model.generate(source, limit=LONGEST + 1)
    wanted = torch.nn.functional.pad(target[:, 1:], (0, LONGEST + 2 - target.shape[1]))
    written = torch.nn.functional.pad(written, (0, wanted.shape[1] - written.shape[1]))
    return 100 * float((written == wanted).all(1).float().mean())


def draw(model: TransformerModel, task: str, path: Path) -> None:
    """Where the decoder looks while it writes one sequence of 12 digits."""
    source = torch.arange(12)[None] * 7 % 10 + FIRST
    written = model.generate(source, limit=13)
    target = torch.cat([torch.full((1, 1), START), written[:, :-1]], 1)
    with torch.no_grad(), attention_maps(model) as maps:
        model(source, target)
    draw_maps(maps[0][0], _names(written[0]), _names(source[0]), path)


def _names(tokens: Tensor) -> list[str]:
    return ["end" if t == END else str(t - FIRST) for t in tokens.tolist()]


def main(
    task: Annotated[str, typer.Option(help="copy, reverse or both")] = "both",
    steps: int = 1000,
    fresh: Annotated[bool, typer.Option(help="forget an unfinished run")] = False,
    folder: Annotated[Path, typer.Option(help="checkpoints and pictures")] = Path(
        "out/sequence_tasks"
    ),
) -> None:
    """Train, write sequences that were never seen, draw where it looked."""
    if task not in (*TASKS, "both"):
        raise typer.BadParameter(f"task must be copy, reverse or both, got {task!r}")
    for name in TASKS if task == "both" else (task,):
        torch.manual_seed(0)
        model = make_model()
        optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
        path = folder / f"{name}_{steps}.pt"
        if fresh:
            path.unlink(missing_ok=True)
        checkpoint = Checkpoint(path, model=model, optimizer=optimizer, schedule=schedule)
        train(
            model, model.loss, lambda n, name=name: make_batch(name, n), Recipe(steps), checkpoint,
            console, name,
        )  # fmt: skip
        console.print(f"{name}: {unseen_accuracy(model, name):.1f} % of 1,000 unseen sequences")
        picture = folder / f"{name}.png"
        draw(model, name, picture)
        console.print(f"picture: {picture}")


if __name__ == "__main__":
    typer.run(main)
