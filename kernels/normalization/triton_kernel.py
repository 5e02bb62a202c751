"""The Triton launchers of the normalization operations, and the shapes they are compiled for in CI.

Reductions are in triton_reduce.py, the elementwise passes in triton_batch_norm.py; triton_layout.py
is what they share.
"""

from __future__ import annotations

from typing import Any

import torch

from nnarch.kernels.gpu.launch import (
    check_dtype,
    device_guard,
    launch,
    named_strides,
    needs_int64,
    vector,
)
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.normalization.triton_batch_norm import (
    affine_kernel,
    batch_norm_bwd_bwd_kernel,
    batch_norm_bwd_bwd_sums_kernel,
    batch_norm_bwd_dx_kernel,
    batch_norm_bwd_sums_kernel,
)
from nnarch.kernels.normalization.triton_layout import (
    as_ncl,
    blocks,
    elementwise_grid,
    output_like,
    statistic,
)
from nnarch.kernels.normalization.triton_reduce import (
    channel_dot,
    channel_sum,
    first_stage,
    merge_sums,
    statistics,
)
from nnarch.kernels.normalization.triton_running import update

__all__ = [
    "STATIC_CASES",
    "affine",
    "batch_norm_backward",
    "batch_norm_backward_backward",
    "batch_norm_eval",
    "batch_norm_train",
    "channel_dot",
    "channel_sum",
]


def affine(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """``nnarch::affine``."""
    check_dtype("affine", x, scale, shift, residual)
    y = output_like(x)
    with device_guard(x):
        _affine(x, None, None, None, scale, shift, residual, activation, alpha, y)
    return y


def batch_norm_eval(
    x: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """``nnarch::batch_norm_eval``."""
    check_dtype("batch_norm_eval", x, mean, var, weight, bias, residual)
    y = output_like(x)
    with device_guard(x):
        _affine(x, vector(mean), vector(var), eps, weight, bias, residual, activation, alpha, y)
    return y


def batch_norm_train(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    activation: int,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``nnarch::batch_norm_train``."""
    check_dtype("batch_norm_train", x, weight, bias, residual)
    y = output_like(x)
    if x.numel() == 0:  # no channels: the check refuses an empty batch
        return y, statistic(x), statistic(x)
    with device_guard(x):
        mean, invstd = statistics(x, eps)
        _affine(x, mean, invstd, None, weight, bias, residual, activation, alpha, y)
    return y, mean, invstd


def _affine(
    x: torch.Tensor,
    mean: torch.Tensor | None,
    invstd: torch.Tensor | None,
    eps: float | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: int,
    alpha: float,
    y: torch.Tensor,
) -> None:
    """y = act((x - mean)·invstd·scale + shift + residual); with eps, `invstd` is the variance."""
    if x.numel() == 0:
        return
    x_view, residual_view, y_view = as_ncl(x, residual, y)
    arguments = {
        **{"x_ptr": x_view, "residual_ptr": residual_view, "y_ptr": y},
        **{"mean_ptr": mean, "invstd_ptr": invstd, "eps": eps},
        **{"scale_ptr": vector(scale), "shift_ptr": vector(shift)},
        **{"alpha": float(alpha), "ACTIVATION": activation},
        **named_strides("x", "ncl", x_view),
        **named_strides("r", "ncl", residual_view),
        **named_strides("y", "ncl", y_view),
    }
    _elementwise(affine_kernel, arguments, y_view, x_view, residual_view)


def _elementwise(
    kernel: Any, arguments: dict[str, Any], view: torch.Tensor, *others: torch.Tensor | None
) -> None:
    """Launch a kernel over the tiles of `view` [N, C, L]; `others` it addresses as well."""
    chosen = blocks(view)
    sizes = {"channels": view.shape[1], "length": view.shape[2]}
    arguments = arguments | sizes | {"INT64": needs_int64(view, *others)}
    launch(kernel, elementwise_grid(view, chosen), arguments, chosen)


def batch_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    y: torch.Tensor | None,
    activation: int,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``nnarch::batch_norm_backward``."""
    check_dtype("batch_norm_backward", grad, x, weight, mean, invstd, y)
    dx, dweight, dbias = output_like(x), statistic(x), statistic(x)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    grad_view, x_view, y_view, dx_view = as_ncl(grad, x, y, dx)
    others = (grad_view, x_view, y_view)
    tensors = {
        **{"grad_ptr": grad_view, "x_ptr": x_view, "y_ptr": y_view},
        **{"mean_ptr": vector(mean), "invstd_ptr": vector(invstd)},
        **{"alpha": float(alpha), "ACTIVATION": activation},
        **named_strides("g", "ncl", grad_view),
        **named_strides("x", "ncl", x_view),
        **named_strides("y", "ncl", y_view),
    }
    with device_guard(x):
        partial = first_stage(batch_norm_bwd_sums_kernel, tensors, x_view, 2, *others)
        merge_sums(partial[:, 0], dweight)
        merge_sums(partial[:, 1], dbias)
        arguments = {
            **tensors,
            **{"dx_ptr": dx, "weight_ptr": vector(weight)},
            **{"dweight_ptr": dweight, "dbias_ptr": dbias},
            "inverse_count": x.shape[1] / x.numel(),
            **named_strides("d", "ncl", dx_view),
        }
        _elementwise(batch_norm_bwd_dx_kernel, arguments, dx_view, *others)
    return dx, dweight, dbias


def batch_norm_backward_backward(
    gg_x: torch.Tensor,
    gg_weight: torch.Tensor,
    gg_bias: torch.Tensor,
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``nnarch::batch_norm_backward_backward``."""
    tensors = (gg_x, gg_weight, gg_bias, grad, x, weight, mean, invstd)
    check_dtype("batch_norm_backward_backward", *tensors)
    d_grad, d_x, d_weight = output_like(x), output_like(x), statistic(x)
    if x.numel() == 0:
        return d_grad, d_x, d_weight.zero_()
    a_view, grad_view, x_view, out_view = as_ncl(gg_x, grad, x, d_x)
    others = (a_view, grad_view, x_view)
    inputs = {
        **{"a_ptr": a_view, "grad_ptr": grad_view, "x_ptr": x_view},
        **{"mean_ptr": vector(mean), "invstd_ptr": vector(invstd)},
        **named_strides("a", "ncl", a_view),
        **named_strides("g", "ncl", grad_view),
        **named_strides("x", "ncl", x_view),
    }
    with device_guard(x):
        partial = first_stage(batch_norm_bwd_bwd_sums_kernel, inputs, x_view, 5, *others)
        sums = torch.empty_like(partial[0])
        merge_sums(partial, sums)
        arguments = {
            **inputs,
            **{"gg_weight_ptr": vector(gg_weight), "gg_bias_ptr": vector(gg_bias)},
            **{"weight_ptr": vector(weight), "sums_ptr": sums},
            **{"d_grad_ptr": d_grad, "d_x_ptr": d_x, "d_weight_ptr": d_weight},
            "inverse_count": x.shape[1] / x.numel(),
            **named_strides("d", "ncl", out_view),
        }
        _elementwise(batch_norm_bwd_bwd_kernel, arguments, out_view, *others)
    return d_grad, d_x, d_weight


# ------------------------------------------------------------------------------ static checks


def _case(name: str, size: tuple[int, ...], channels_last: bool, operation: str) -> StaticCase:
    """An operation at the size of an activation of ResNet-50."""
    layout = "" if channels_last else " NCHW"
    # Sums over all pixels end before the first output begins: those inputs are read twice.
    tensors = {
        "affine": 3,
        "channel_sum": 1,
        "channel_dot": 2,
        "batch_norm_train": 4,
        "batch_norm_backward": 7,
        "batch_norm_backward_backward": 8,
    }[operation]

    def run(dtype: torch.dtype) -> Any:
        x = meta(*size, dtype=dtype, channels_last=channels_last)
        v = meta(size[1], dtype=torch.float32)
        return {
            "affine": lambda: affine(x, v, v, x, 1, 0.0),
            "channel_sum": lambda: channel_sum(x),
            "channel_dot": lambda: channel_dot(x, x),
            "batch_norm_train": lambda: batch_norm_train(x, v, v, x, 1e-5, 1, 0.0),
            "batch_norm_backward": lambda: batch_norm_backward(x, x, v, v, v, x, 1, 0.0),
            "batch_norm_backward_backward": lambda: batch_norm_backward_backward(
                x, v, v, x, x, v, v, v
            ),
        }[operation]()

    elements = float(torch.Size(size).numel())
    return StaticCase(f"{operation} {name}{layout}", run, 4 * elements, tensors * elements)


def _running_case(channels: int) -> StaticCase:
    """What a training step adds for the running statistics, of enough channels to fill a GPU."""

    def run(dtype: torch.dtype) -> Any:
        v = meta(channels, dtype=torch.float32)
        return update(v, v, v, v, 0.1, 1e-5, 9)

    name = f"batch_norm_update C{channels}"
    return StaticCase(name, run, 8.0 * channels, 0.0, fixed_bytes=24.0 * channels)


STATIC_CASES = [
    _case(name, size, channels_last, operation)
    for operation in (
        "affine",
        "channel_sum",
        "channel_dot",
        "batch_norm_train",
        "batch_norm_backward",
        "batch_norm_backward_backward",
    )
    for name, size, channels_last in (
        ("C256 H56 N8", (8, 256, 56, 56), True),
        ("C256 H56 N8", (8, 256, 56, 56), False),
    )
] + [_running_case(1 << 18)]
