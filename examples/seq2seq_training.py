"""What examples that turn one sequence into another share: batches, training, attention maps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from checkpoint import Checkpoint
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

PADDING, START, END = 0, 1, 2
SAVE_EVERY = 50

Batch = tuple[Tensor, Tensor]  # sources [B, S] and whole targets [B, T], filled up with PADDING


def padded(sequences: list[list[int]]) -> Tensor:
    """Sequences of tokens as one tensor [B, longest]."""
    tensors = [torch.tensor(s, dtype=torch.long) for s in sequences]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PADDING)


@dataclass(frozen=True)
class Recipe:
    """How a run trains.

    Attributes:
        steps: of the optimizer.
        accumulate: batches whose gradients are added up before a step.
        clip: largest norm of the gradient.
        amp: whether products are computed in bfloat16 (torch.autocast).
    """

    steps: int
    accumulate: int = 1
    clip: float = 1.0
    amp: bool = False


def train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: Callable[[int], Batch],
    recipe: Recipe,
    checkpoint: Checkpoint,
    console: Console,
    name: str,
) -> tuple[list[float], float]:
    """Train until `recipe.steps`, from where the checkpoint is.

    Args:
        model: whose parameters are clipped.
        loss: of a batch; differentiable.
        batch: the n-th batch of the run.
        recipe: how.
        checkpoint: has the parts "optimizer" and, if there is one, "schedule".
        console, name: for the progress bar.

    Returns:
        The loss of every step, and the seconds of processor time that all of them took: what else
        the machine does makes no difference.
    """
    saved = checkpoint.load() or {"losses": [], "seconds": 0.0}
    losses, seconds = list(saved["losses"]), saved["seconds"]
    optimizer, schedule = checkpoint.parts["optimizer"], checkpoint.parts.get("schedule")
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}"))
    model.train()
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(name, total=recipe.steps, completed=len(losses))
        for step in range(len(losses), recipe.steps):
            began = time.process_time()
            losses.append(_step(model, loss, batch, recipe, optimizer, step))
            if schedule is not None:
                schedule.step()
            seconds += time.process_time() - began
            bar.update(task, advance=1, description=f"{name}: loss {losses[-1]:.3f}")
            if len(losses) % SAVE_EVERY == 0 or len(losses) == recipe.steps:
                checkpoint.save(losses=losses, seconds=seconds)
    return losses, seconds


def _step(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: Callable[[int], Batch],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> float:
    optimizer.zero_grad()
    total = 0.0
    for part in range(recipe.accumulate):
        with torch.autocast("cpu", torch.bfloat16) if recipe.amp else contextlib.nullcontext():
            value = loss(*batch(step * recipe.accumulate + part)) / recipe.accumulate
        value.backward()
        total += value.item()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    return total


@contextlib.contextmanager
def attention_maps(model: Any) -> Iterator[list[Tensor]]:
    """Collect the weights [B, heads, T, S] with which the last decoder layer looks at the source.

    The kernels keep no weights: the layer is called a second time, on what it was given.
    """
    maps: list[Tensor] = []
    attention = model.decoder.layers[-1].multihead_attn

    def look(layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        handle.remove()
        wanted = {"need_weights": True, "average_attn_weights": False}
        maps.append(layer(*args, **{**options, **wanted})[1])

    handle = attention.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield maps
    finally:
        handle.remove()


def draw_maps(maps: Tensor, rows: list[str], columns: list[str], path: Path) -> None:
    """A picture of weights [heads, T, S]: what is written downwards, what is read across."""
    heads = maps.shape[0]
    width = 0.22 * len(columns) + 1.2
    figure, all_axes = plt.subplots(1, heads, figsize=(width * heads, 0.22 * len(rows) + 1.2))
    for head, axes in enumerate(all_axes):
        axes.imshow(maps[head].detach(), cmap="magma", vmin=0, vmax=1)
        axes.set_title(f"head {head + 1}", fontsize=8)
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=6)
        axes.set_yticks(range(len(rows)), rows if head == 0 else [""] * len(rows), fontsize=6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
