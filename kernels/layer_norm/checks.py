"""What the operations of layer and RMS normalization require of their arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnarch.kernels.dropout.seed import check_dropout
from nnarch.library import check_device, check_same, check_tensor

_HALF = (torch.float16, torch.bfloat16)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    columns: int,
    eps: float,
    rms: bool,
) -> None:
    """Rows of `columns`; a residual of x's shape; parameters [columns]."""
    op = "rms_norm" if rms else "layer_norm"
    has_rows(op, "input", x, columns)
    alike(op, "residual", residual, x)
    per_column(op, "weight", weight, x, columns)
    per_column(op, "bias", bias, x, columns)
    if rms and bias is not None:
        raise ValueError("rms_norm: bias must be None, got a tensor")


def layer_norm_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    columns: int,
    eps: float,
    dropout_p: float,
    rms: bool,
) -> None:
    """The same, and a seed where elements are dropped."""
    layer_norm(x, weight, bias, residual, columns, eps, rms)
    check_dropout("rms_norm" if rms else "layer_norm", seed, dropout_p, x)


def row_dropout(x: Tensor, seed: Tensor, columns: int, dropout_p: float) -> None:
    """Rows of `columns`, and a seed."""
    has_rows("row_dropout", "x", x, columns)
    if not isinstance(seed, Tensor):
        raise TypeError(f"row_dropout: seed must be a tensor, got {seed!r}")
    check_dropout("row_dropout", seed, dropout_p, x)


def layer_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    columns: int,
    wanted: int,
) -> None:
    """Gradients of the shape of s, and the forward's statistics."""
    op = "layer_norm_backward"
    has_rows(op, "s", s, columns)
    alike(op, "grad", grad, s, of="s")
    alike(op, "grad_sum", grad_sum, s, of="s")
    per_column(op, "weight", weight, s, columns)
    statistics(op, stats, s, columns)


def layer_norm_backward_backward(
    gg_ds: Tensor,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    grad: Tensor,
    s: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    columns: int,
) -> None:
    """The same, and gradients of gradients."""
    op = "layer_norm_backward_backward"
    has_rows(op, "s", s, columns)
    alike(op, "grad", grad, s, of="s")
    alike(op, "gg_ds", gg_ds, s, of="s")
    for name, value in (("gg_weight", gg_weight), ("gg_bias", gg_bias), ("weight", weight)):
        per_column(op, name, value, s, columns)
    statistics(op, stats, s, columns)


def has_rows(op: str, name: str, x: Tensor, columns: int) -> None:
    """A floating-point tensor whose last dimensions have `columns` elements together."""
    check_tensor(op, name, x)
    product = 1
    for size in reversed(x.shape):
        if product >= columns:
            break
        product *= size
    if columns < 0 or (x.numel() and (product != columns or not columns)):
        raise ValueError(
            f"{op}: the last dimensions of {name} must have {columns} elements together, "
            f"got shape {tuple(x.shape)}"
        )


def alike(op: str, name: str, value: Tensor | None, x: Tensor, of: str = "input") -> None:
    """The shape and dtype of x."""
    if value is None:
        return
    check_tensor(op, name, value)
    if value.shape != x.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {of}, {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    check_same(op, name, value, x, of)


def per_column(op: str, name: str, value: Tensor | None, x: Tensor, columns: int) -> None:
    """[columns], in x's dtype or, beside a half type, in float32."""
    if value is None:
        return
    check_tensor(op, name, value)
    check_device(op, name, value, x, of="the input")
    if value.shape != (columns,):
        raise ValueError(f"{op}: {name} must have shape ({columns},), got {tuple(value.shape)}")
    if value.dtype != x.dtype and not (x.dtype in _HALF and value.dtype == torch.float32):
        raise TypeError(f"{op}: {name} must be {x.dtype} as the input, got {value.dtype}")


def statistics(op: str, stats: Tensor, x: Tensor, columns: int) -> None:
    """[2, rows] or, for RMS normalization, [1, rows]."""
    check_tensor(op, "stats", stats)
    rows = x.numel() // columns if columns else 0
    dtype = torch.float32 if x.dtype in _HALF else x.dtype
    if stats.dim() != 2 or stats.shape[0] not in (1, 2) or stats.shape[1] != rows:
        raise ValueError(
            f"{op}: stats must have shape (2, {rows}) or (1, {rows}), got {tuple(stats.shape)}"
        )
    if stats.dtype != dtype or not stats.is_contiguous():
        raise TypeError(f"{op}: stats must be contiguous {dtype}, got {stats.dtype}")


def normalized_size(op: str, input: Tensor, normalized_shape: Any) -> tuple[int, ...]:
    """`normalized_shape` as a tuple, which must be the end of the input's shape."""
    check_tensor(op, "input", input)
    if not isinstance(normalized_shape, Sequence) or not all(
        hasattr(n, "__index__") or isinstance(n, torch.SymInt) for n in normalized_shape
    ):
        raise TypeError(
            f"{op}: normalized_shape must be a sequence of ints, got {normalized_shape!r}"
        )
    size = tuple(normalized_shape)
    if not size:
        raise ValueError(f"{op}: normalized_shape must have at least one dimension, got ()")
    if len(size) > input.dim() or tuple(input.shape[-len(size) :]) != size:
        raise ValueError(
            f"{op}: the last dimensions of input must be normalized_shape {size}, "
            f"got shape {tuple(input.shape)}"
        )
    return size


def flat(op: str, name: str, value: Tensor | None, size: tuple[int, ...]) -> Tensor | None:
    """A parameter of the shape `size` as [columns]."""
    if value is None:
        return None
    check_tensor(op, name, value)
    if tuple(value.shape) != size:
        raise ValueError(f"{op}: {name} must have shape {size}, got {tuple(value.shape)}")
    return value.reshape(math.prod(size))


def numbers(op: str, eps: Any, dropout_p: Any) -> None:
    """Real numbers; a probability."""
    for name, value in (("eps", eps), ("dropout_p", dropout_p)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p must be between 0 and 1, got {dropout_p}")
