"""The arguments of recurrent operations: what fits together, and the message where it does not."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nnarch.library import check_same, check_tensor

from . import kinds


def check_scan(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    norm: Tensor | None,
    batch_sizes: Tensor | None,
    packed: Tensor | None,
    kind: int,
    reverse: bool,
    eps: float,
    save: bool,
) -> None:
    """Raise ValueError or TypeError, naming the cell and the argument."""
    if not 0 <= kind < len(kinds.NAMES):
        raise ValueError(f"recurrent_scan: kind must be 0 to 3, got {kind}")
    op = kinds.NAMES[kind]
    tensors = {
        "x": x, "h0": h0, "c0": c0, "weight_ih": weight_ih, "weight_hh": weight_hh,
        "bias_ih": bias_ih, "bias_hh": bias_hh, "weight_hr": weight_hr, "peephole": peephole,
        "norm": norm,
    }  # fmt: skip
    for name, tensor in tensors.items():
        if tensor is not None:
            check_tensor(op, name, tensor)
            check_same(op, name, tensor, x)
    batch = _check_input(op, x, batch_sizes)
    hidden = _check_weights(op, kind, x, weight_ih, weight_hh, weight_hr)
    rows = weight_ih.shape[0]
    if batch is None and h0 is not None and h0.dim() == 2:
        batch = h0.shape[0]
    _check_shape(op, "h0", h0, (batch, weight_hh.shape[1]))
    _check_shape(op, "bias_ih", bias_ih, (rows,))
    _check_shape(op, "bias_hh", bias_hh, (rows,))
    if kind != kinds.LSTM:
        for name in ("c0", "weight_hr", "peephole", "norm"):
            if tensors[name] is not None:
                raise ValueError(f"{op}: {name} belongs to the LSTM alone")
    if batch is None and c0 is not None and c0.dim() == 2:
        batch = c0.shape[0]
    _check_shape(op, "c0", c0, (batch, hidden))
    _check_shape(op, "peephole", peephole, (3, hidden))
    _check_shape(op, "norm", norm, (kinds.NORM_ROWS, hidden))


def _check_input(op: str, x: Tensor, batch_sizes: Tensor | None) -> int | None:
    """The number of sequences; None where it cannot be known."""
    if batch_sizes is None:
        if x.dim() not in (2, 3):
            raise ValueError(f"{op}: x must be [T, B, I] or [B, I], got {tuple(x.shape)}")
        return x.shape[-2]
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be [rows, I] with batch_sizes, got {tuple(x.shape)}")
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
        raise ValueError(f"{op}: batch_sizes must be [T] of int64")
    if without_values(batch_sizes):
        return None
    if not batch_sizes.is_cpu:
        raise ValueError(f"{op}: batch_sizes must be on the CPU, got {batch_sizes.device}")
    counts = batch_sizes.tolist()
    falls = all(a >= b for a, b in itertools.pairwise(counts))
    if not falls or (counts and counts[-1] < 1) or sum(counts) != x.shape[0]:
        raise ValueError(
            f"{op}: batch_sizes must not grow, be at least 1 and add up to the rows of x "
            f"({x.shape[0]}), got {counts[:10]}"
        )
    return counts[0] if counts else 0


def without_values(t: Tensor) -> bool:
    """Whether a tensor has a shape and nothing in it, as while a graph is traced."""
    return t.is_meta or isinstance(t, FakeTensor)


def _check_weights(
    op: str, kind: int, x: Tensor, weight_ih: Tensor, weight_hh: Tensor, weight_hr: Tensor | None
) -> int:
    """The hidden size."""
    gates = kinds.GATES[kind]
    if weight_ih.dim() != 2 or weight_ih.shape[0] % gates:
        raise ValueError(
            f"{op}: weight_ih must be [{gates} * H, I], got shape {tuple(weight_ih.shape)}"
        )
    hidden = weight_ih.shape[0] // gates
    if weight_ih.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: the last size of x ({x.shape[-1]}) must be the second of weight_ih "
            f"({weight_ih.shape[1]})"
        )
    out = hidden if weight_hr is None or weight_hr.dim() != 2 else weight_hr.shape[0]
    _check_shape(op, "weight_hh", weight_hh, (gates * hidden, out))
    _check_shape(op, "weight_hr", weight_hr, (out, hidden))
    return hidden


def _check_shape(op: str, name: str, tensor: Tensor | None, shape: tuple[Any, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
