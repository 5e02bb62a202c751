"""Argument checks of the embedding operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import library

_INTEGERS = (torch.int64, torch.int32)


class OutOfRange(IndexError, ValueError):
    """An index past the end of its table: an IndexError, as torch raises; a ValueError, as ours."""


def table(op: str, name: str, weight: Any, like: Tensor | None = None) -> None:
    """Raise unless `weight` is a matrix; of the width, dtype and device of `like`."""
    library.check_tensor(op, name, weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: {name} must be [rows, C], got shape {tuple(weight.shape)}")
    if like is not None:
        library.check_same(op, name, weight, like, of="weight")
        if weight.shape[1] != like.shape[1]:
            raise ValueError(
                f"{op}: {name} must have the {like.shape[1]} columns of weight, "
                f"got shape {tuple(weight.shape)}"
            )


def indices(op: str, name: str, at: Any, weight: Tensor | None = None, rows: int = 0) -> None:
    """Raise unless `at` holds int64 or int32 numbers, where they can be seen below the rows."""
    if not isinstance(at, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(at).__name__}")
    if at.dtype not in _INTEGERS:
        raise TypeError(f"{op}: {name} must be int64 or int32, got {at.dtype}")
    if weight is not None:
        library.check_device(op, name, at, weight, of="weight")
        rows = weight.shape[0]
    # On a GPU that would wait for it; the kernel gives NaN there. Fake tensors hold no numbers.
    if type(at) is not Tensor or at.device.type != "cpu" or at.numel() == 0:
        return
    low, high = int(at.min()), int(at.max())
    if low < 0 or high >= rows:
        raise OutOfRange(
            f"{op}: {name} must be from 0 to {rows - 1} (the table has {rows} rows), "
            f"got {low if low < 0 else high}"
        )


def like_tokens(op: str, name: str, at: Tensor, tokens: Tensor) -> None:
    """Raise unless `at` has the shape of `tokens`."""
    if at.shape != tokens.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of tokens, {tuple(tokens.shape)}, "
            f"got {tuple(at.shape)}"
        )


def vector(op: str, name: str, v: Any, weight: Tensor) -> None:
    """Raise unless `v` is None or has one number a column of `weight`."""
    if v is None:
        return
    library.check_tensor(op, name, v)
    library.check_same(op, name, v, weight, of="weight")
    if tuple(v.shape) != (weight.shape[1],):
        raise ValueError(f"{op}: {name} must have shape ({weight.shape[1]},), got {tuple(v.shape)}")
