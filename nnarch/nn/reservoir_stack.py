"""Reservoirs one above the other, run over long sequences chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from nnarch import functional as F
from nnarch.nn.reservoir import Reservoir

_CHUNK_ELEMENTS = 4 << 20  # states held at a time: 32 MB in float64


def make_stack(
    inputs: int, sizes: Sequence[int], scaling: list[float], seed: int, **options: Any
) -> nn.ModuleList:
    """Layers of `sizes` neurons, each of which reads the states of the one before.

    Args:
        inputs: of the first.
        sizes: neurons of each.
        scaling: of the first one's input weights, a number an input.
        seed: of the first; the others' follow it.
        options: of every :class:`Reservoir`.
    """
    layers = nn.ModuleList()
    for i, size in enumerate(sizes):
        layers.append(Reservoir(inputs, size, input_scaling=scaling, seed=seed + i, **options))
        # A state has N numbers of about 1: keep the sum of its inputs at that size.
        inputs, scaling = size, [(3.0 / size) ** 0.5] * size
    return layers


def reservoirs(layers: nn.ModuleList) -> list[Reservoir]:
    """The layers by their type."""
    return cast(list[Reservoir], list(layers))


def run_stack(
    layers: nn.ModuleList, x: Tensor, states: list[Tensor] | None, noise: float = 0.0,
    generator: torch.Generator | None = None, keep: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The states of every layer over a chunk, and those after it.

    Args:
        layers: of :func:`make_stack`.
        x: ``[T, B, inputs]``.
        states: before it, of every layer; zeros where None.
        noise: standard deviation of what is added to the neurons' inputs.
        generator: where that comes from.
        keep: whether the last layer's states over the chunk are wanted too.
    """
    kept, after = [], []
    for i, layer in enumerate(reservoirs(layers)):
        last_layer = i == len(layers) - 1
        skip = 0 if keep or not last_layer else x.shape[0]
        state = None if states is None else states[i]
        if noise:
            drive = F.linear(x, layer.w_in, layer.bias)
            drive += noise * torch.randn(drive.shape, generator=generator).to(drive)
            x, last = F.reservoir_scan(
                drive, layer.matrix, None, None, state, leak=layer.leak,
                activation=layer.activation, skip=skip, packed=layer.packed(),
            )  # fmt: skip
        else:
            x, last = layer(x, state, skip=skip)
        kept.append(x)
        after.append(last)
    return kept, after


def chunks(steps: int, batch: int, width: int) -> Iterator[tuple[int, int]]:
    """The first and last step of every chunk, with `width` numbers a step and sequence."""
    size = max(1, _CHUNK_ELEMENTS // max(1, batch * width))
    for first in range(0, steps, size):
        yield first, min(first + size, steps)


def run_in_chunks(
    layers: nn.ModuleList, backward_layers: nn.ModuleList | None, x: Tensor,
    states: list[Tensor] | None, width: int, noise: float = 0.0, seed: int = 0,
) -> Iterator[tuple[int, int, list[Tensor], list[Tensor]]]:  # fmt: skip
    """Chunk by chunk: its first and last step, the states of every layer, the states after it.

    Args:
        layers: a stack that reads forwards.
        backward_layers: another that reads backwards, or None.
        x: ``[T, B, inputs]``.
        states: before it, of the first stack; zeros where None.
        width: numbers of a step that a chunk is cut by.
        noise, seed: as of :func:`run_stack`.
    """
    cuts = list(chunks(x.shape[0], x.shape[1], width))
    generator = torch.Generator().manual_seed(seed) if noise else None
    # Backwards, only the states between chunks are kept; each chunk is run again in its turn.
    entry: dict[int, list[Tensor] | None] = {}
    if backward_layers is not None:
        reverse: list[Tensor] | None = None
        for first, end in reversed(cuts):
            entry[first] = reverse
            if first:
                _, reverse = run_stack(backward_layers, x[first:end].flip(0), reverse, keep=False)
    for first, end in cuts:
        part = x[first:end]
        kept, states = run_stack(layers, part, states, noise, generator)
        if backward_layers is not None:
            backward, _ = run_stack(backward_layers, part.flip(0), entry[first])
            kept = kept + [s.flip(0) for s in backward]
        yield first, end, kept, states
