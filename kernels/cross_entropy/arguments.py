"""What both losses do with their arguments before an operation sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from nnarch import library

from .checks import check_integers, check_numbers
from .reference import MEAN, NONE, SUM, compute_dtype

_REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


def reduction_code(op: str, name: Any, size_average: Any = None, reduce: Any = None) -> int:
    if size_average is not None or reduce is not None:
        name = legacy_get_string(size_average, reduce)
    if not isinstance(name, str) or name not in _REDUCTIONS:
        raise ValueError(f'{op}: reduction must be "none", "mean" or "sum", got {name!r}')
    return _REDUCTIONS[name]


def checked_numbers(
    op: str, ignore_index: Any, smoothing: Any, z_loss: Any
) -> tuple[int, float, float]:
    if type(ignore_index) is int and smoothing == 0.0 and z_loss == 0.0:
        return ignore_index, 0.0, 0.0
    try:
        numbers = int(ignore_index.__index__()), float(smoothing), float(z_loss)
    except (AttributeError, TypeError, ValueError):
        raise TypeError(
            f"{op}: ignore_index must be an int, label_smoothing and z_loss numbers, got "
            f"{ignore_index!r}, {smoothing!r} and {z_loss!r}"
        ) from None
    check_numbers(op, *numbers[1:], NONE)
    return numbers


def target_sizes(op: str, input: Tensor, target: Tensor) -> torch.Size:
    """Sizes of an unreduced loss."""
    if input.dim() < 1:
        raise ValueError(f"{op}: input must be [C], [N, C] or [N, C, d1, …], got a scalar")
    shape = input.shape
    sizes = torch.Size(() if input.dim() == 1 else (shape[0], *shape[2:]))
    expected = shape if target.is_floating_point() else sizes
    if not target.is_floating_point():
        check_integers(op, target)
    if target.shape != expected:
        raise ValueError(
            f"{op}: target must have the shape {tuple(expected)} for input {tuple(shape)}, got "
            f"{tuple(target.shape)}"
        )
    return sizes


def checked_class_weight(op: str, name: str, weight: Tensor | None, x: Tensor) -> Tensor | None:
    if weight is None:
        return None
    library.check_tensor(op, name, weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: {name} has no gradient; detach it")
    return weight.to(compute_dtype(x.dtype))


def cast(t: Any, dtype: torch.dtype) -> Any:
    eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if eligible else t
