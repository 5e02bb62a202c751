"""Recurrent modules of ours beside their torch.nn twins, with the same weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import nnarch.nn as nn

IN, HIDDEN, BATCH, TIME = 3, 5, 4, 6
LENGTHS = [3, 6, 1, 4]  # unsorted, the longest is TIME

KINDS = {
    "lstm": ("LSTM", {}),
    "lstm, projected": ("LSTM", {"proj_size": 2}),
    "gru": ("GRU", {}),
    "rnn tanh": ("RNN", {}),
    "rnn relu": ("RNN", {"nonlinearity": "relu"}),
}


def twins(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """(ours, torch's)."""
    name, own = KINDS[kind]
    with warnings.catch_warnings():  # dropout behind the only layer
        warnings.simplefilter("ignore", UserWarning)
        theirs = getattr(torch.nn, name)(IN, HIDDEN, dtype=dtype, **own, **options)
        ours = getattr(nn, name)(IN, HIDDEN, dtype=dtype, **own, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_input(module: Any, form: str) -> Any:
    """A batch, an unbatched sequence, or a packed batch, sorted or not."""
    dtype = module.weight_ih_l0.dtype
    x = torch.randn(TIME, BATCH, IN, dtype=dtype)
    if form == "packed":
        return pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    if form == "packed, sorted":
        return pack_padded_sequence(x, sorted(LENGTHS, reverse=True))
    if form == "unbatched":
        return x[:, 0]
    return x.transpose(0, 1) if module.batch_first else x


def make_state(module: Any, form: str) -> Any:
    """A state to start from."""
    layers = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if form == "unbatched" else (BATCH,)
    dtype = module.weight_ih_l0.dtype
    h = torch.randn(layers, *batch, module.proj_size or HIDDEN, dtype=dtype)
    if not isinstance(module, torch.nn.LSTM):
        return h
    return h, torch.randn(layers, *batch, HIDDEN, dtype=dtype)


def flat(result: Any) -> list[Tensor]:
    """The tensors of an output or a state."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def run(module: Any, x: Any, hx: Any = None) -> tuple[Any, dict[str, Tensor]]:
    """The module's result; outputs, states and all gradients by name."""
    module.zero_grad()
    leaves = [t.detach().clone().requires_grad_() for t in flat(x)]
    given = PackedSequence(leaves[0], *x[1:]) if isinstance(x, PackedSequence) else leaves[0]
    if hx is not None:
        states = [t.detach().clone().requires_grad_() for t in flat(hx)]
        leaves += states
        hx = tuple(states) if len(states) > 1 else states[0]
    torch.manual_seed(1)  # for dropout
    result = module(given, hx)
    outputs = flat(result)
    torch.manual_seed(2)
    sum((out * torch.randn_like(out)).sum() for out in outputs).backward()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    found |= {f"gradient of input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    found |= {f"gradient of {n}": p.grad for n, p in module.named_parameters()}
    return result, found
