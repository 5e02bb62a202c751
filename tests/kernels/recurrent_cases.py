"""Recurrent layers as functions of lists of tensors, for the tests of their family."""

from __future__ import annotations

from typing import Any

import torch
from kernel_cases import on_fresh_memory
from tolerances import assert_as_accurate
from torch import Tensor

from nnarch.kernels.recurrent import kinds, reference

RNN_TANH, RNN_RELU, LSTM, GRU = range(4)
KINDS = (RNN_TANH, RNN_RELU, LSTM, GRU)
NAMES = ("y", "h", "c", "reserve")


def arguments(
    kind: int,
    size: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    *,
    states: bool = True,
    biases: bool = True,
    projection: int = 0,
    peephole: bool = False,
    norm: bool = False,
    lengths: list[int] | None = None,
) -> list[Tensor | None]:
    """x to batch_sizes, as the operation takes them; every sum of products is near 1."""
    time, batch, width, hidden = size
    gates, out = kinds.GATES[kind], projection or hidden
    x, batch_sizes = torch.randn(time, batch, width), None
    if lengths is not None:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths))
        x, batch_sizes = packed.data, packed.batch_sizes
    lstm = kind == LSTM
    tensors = [
        x,
        torch.randn(batch, out) / 2 if states else None,
        torch.randn(batch, hidden) / 2 if states and lstm else None,
        torch.randn(gates * hidden, width) / width**0.5,
        torch.randn(gates * hidden, out) / max(out, 1) ** 0.5,
        torch.randn(gates * hidden) / 2 if biases else None,
        torch.randn(gates * hidden) / 2 if biases else None,
        torch.randn(out, hidden) / hidden**0.5 if projection else None,
        torch.randn(3, hidden) / 2 if peephole else None,
        torch.rand(kinds.NORM_ROWS, hidden) + 0.2 if norm else None,
    ]
    return [*(t if t is None else t.to(dtype) for t in tensors), batch_sizes]


def pack(
    tensors: list[Tensor | None], kind: int, bfloat16: bool = False, pairs: bool = False
) -> Tensor:
    ih, hh, hr = tensors[3], tensors[4], tensors[7]
    return torch.ops.nnarch.recurrent_pack(ih, hh, hr, kind, bfloat16, pairs)


def run(
    tensors: list[Tensor | None],
    kind: int,
    reverse: bool = False,
    save: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return torch.ops.nnarch.recurrent_scan(*tensors, packed, kind, reverse, 1e-5, save)


def define(
    tensors: list[Tensor | None],
    kind: int,
    reverse: bool = False,
    save: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """The definition, in `dtype` if given."""
    cast = [t if t is None or t.dtype == torch.int64 else t.to(dtype or t.dtype) for t in tensors]
    return reference.recurrent_scan(*cast, None, kind, reverse, 1e-5, save)  # type: ignore[arg-type]


def compare(tensors: list[Tensor | None], kind: int, **options: Any) -> tuple[Tensor, ...]:
    """Assert that all outputs are as accurate as torch's own operators; return them."""
    packed = options.pop("packed", None)
    # Normalization divides rounding errors by the deviation of what it normalizes.
    ulps = 8.0 if tensors[9] is not None and tensors[9].dtype == torch.float32 else None
    mine = on_fresh_memory(lambda: run(tensors, kind, packed=packed, **options))
    theirs = define(tensors, kind, **options)
    truth = define(tensors, kind, dtype=torch.float64, **options)
    for what, a, b, c in zip(NAMES, mine, theirs, truth, strict=True):
        assert_as_accurate(a, b, c, what=what, ulps=ulps)
    return mine
