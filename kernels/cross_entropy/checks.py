"""What the losses refuse: errors that name the operation, the argument, and what was expected."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnarch import library

from .reference import MEAN, NONE, SUM, WANT_BIAS, compute_dtype


def check_numbers(op: str, label_smoothing: float, z_loss: float, reduction: int) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must be from 0 to 1, got {label_smoothing}")
    if not -math.inf < z_loss < math.inf:  # a symbol under torch.compile has no isfinite
        raise ValueError(f"{op}: z_loss must be finite, got {z_loss}")
    if reduction not in (NONE, MEAN, SUM):
        raise ValueError(f"{op}: reduction must be 0 (none), 1 (mean) or 2 (sum), got {reduction}")


def check_wanted(op: str, wanted: int, reduction: int, most: int) -> None:
    if not 0 <= wanted <= most or (wanted and reduction == NONE):
        raise ValueError(f"{op}: wanted must be from 0 to {most}, and 0 with reduction 0 (none)")


def check_class_weight(op: str, class_weight: Any, x: Tensor, classes: int) -> None:
    if class_weight is None:
        return
    library.check_tensor(op, "class_weight", class_weight)
    library.check_device(op, "class_weight", class_weight, x)
    if class_weight.dtype != compute_dtype(x.dtype):
        wanted = compute_dtype(x.dtype)
        raise TypeError(f"{op}: class_weight must be {wanted}, got {class_weight.dtype}")
    if tuple(class_weight.shape) != (classes,):
        raise ValueError(
            f"{op}: class_weight must have the shape ({classes},), got {tuple(class_weight.shape)}"
        )


def check_indices(op: str, target: Any, x: Tensor, count: int) -> None:
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    library.check_device(op, "target", target, x)
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64, got {target.dtype}")
    if tuple(target.shape) != (count,):
        raise ValueError(f"{op}: target must have the shape ({count},), got {tuple(target.shape)}")


def check_linear(
    op: str, x: Tensor, weight: Tensor, bias: Any, target: Any, class_weight: Any
) -> None:
    library.check_tensor(op, "x", x)
    library.check_tensor(op, "weight", weight)
    library.check_same(op, "weight", weight, x)
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"{op}: x must be [samples, D] and weight [V, D], got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: the last size of x ({x.shape[1]}) must be the second of weight "
            f"({weight.shape[1]})"
        )
    classes = weight.shape[0]
    if classes == 0:
        raise ValueError(f"{op}: weight must have classes, got shape {tuple(weight.shape)}")
    if bias is not None:
        library.check_tensor(op, "bias", bias)
        library.check_same(op, "bias", bias, x)
        if tuple(bias.shape) != (classes,):
            raise ValueError(
                f"{op}: bias must have the shape ({classes},), got {tuple(bias.shape)}"
            )
    check_indices(op, target, x, x.shape[0])
    check_class_weight(op, class_weight, x, classes)


def check_linear_forward(x, weight, bias, target, class_weight, ignore, smoothing, z, r, wanted):  # type: ignore[no-untyped-def]
    op = "linear_cross_entropy"
    check_linear(op, x, weight, bias, target, class_weight)
    check_numbers(op, smoothing, z, r)
    check_wanted(op, wanted, r, 7)
    if wanted & WANT_BIAS and bias is None:
        raise ValueError(f"{op}: wanted asks for the gradient of bias, which is None")


def check_linear_backward(  # type: ignore[no-untyped-def]
    grad, x, weight, bias, target, class_weight, lse, ignore, smoothing, z, r, wanted
):
    op = "linear_cross_entropy_backward"
    check_linear(op, x, weight, bias, target, class_weight)
    check_numbers(op, smoothing, z, r)
    check_upstream(op, grad, lse, x.shape[0], compute_dtype(x.dtype), x, r)


def check_upstream(
    op: str, grad: Tensor, lse: Tensor, count: int, dtype: torch.dtype, x: Tensor, reduction: int
) -> None:
    library.check_tensor(op, "grad", grad)
    library.check_tensor(op, "lse", lse)
    wanted = (count,) if reduction == NONE else ()
    if tuple(grad.shape) != wanted or grad.dtype != dtype:
        raise ValueError(f"{op}: grad must be {dtype} of shape {wanted}, got {tuple(grad.shape)}")
    if tuple(lse.shape) != (count,) or lse.dtype != torch.float64:
        raise ValueError(f"{op}: lse must be float64 of shape ({count},), got {tuple(lse.shape)}")


def check_logits(op: str, x: Tensor, target: Any, class_weight: Any) -> None:
    library.check_tensor(op, "x", x)
    if x.dim() not in (2, 3) or x.shape[1] == 0:
        raise ValueError(f"{op}: x must be [N, C] or [N, C, L] with classes, got {tuple(x.shape)}")
    if isinstance(target, Tensor) and target.is_floating_point():
        library.check_same(op, "target", target, x)
        if target.shape != x.shape:
            raise ValueError(
                f"{op}: target probabilities must have the shape of x, {tuple(x.shape)}, got "
                f"{tuple(target.shape)}"
            )
    else:
        check_indices(op, target, x, x.numel() // x.shape[1])
    check_class_weight(op, class_weight, x, x.shape[1])


def check_forward(x, target, class_weight, ignore, smoothing, z, r, wanted):  # type: ignore[no-untyped-def]
    op = "cross_entropy"
    check_logits(op, x, target, class_weight)
    check_numbers(op, smoothing, z, r)
    check_wanted(op, wanted, r, 1)


def check_backward(grad, x, target, class_weight, lse, ignore, smoothing, z, r, wanted):  # type: ignore[no-untyped-def]
    op = "cross_entropy_backward"
    check_logits(op, x, target, class_weight)
    check_numbers(op, smoothing, z, r)
    check_upstream(op, grad, lse, x.numel() // x.shape[1], x.dtype, x, r)


def check_integers(op: str, target: Tensor) -> None:
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{op}: target must be integers, got {target.dtype}")
