"""What the normalization operations require of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from nnarch.kernels.activation import kinds
from nnarch.library import check_device, check_same, check_tensor

_HALF = (torch.float16, torch.bfloat16)


def affine(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: int,
    alpha: float,
) -> None:
    """Per-channel scale and shift; a residual of x's shape; a known activation."""
    has_channels("affine", "x", x)
    per_channel("affine", "scale", scale, x)
    per_channel("affine", "shift", shift, x)
    alike("affine", "residual", residual, x)
    _known("affine", activation)


def channel_sum(x: Tensor) -> None:
    """At least two dimensions, floating point."""
    has_channels("channel_sum", "x", x)


def channel_dot(a: Tensor, b: Tensor) -> None:
    """The same shape and dtype."""
    has_channels("channel_dot", "a", a)
    alike("channel_dot", "b", b, a, of="a")


def batch_norm_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    alpha: float,
) -> None:
    """Per-channel weight and bias; a residual of x's shape; a known activation."""
    has_channels("batch_norm", "input", x)
    per_channel("batch_norm", "weight", weight, x)
    per_channel("batch_norm", "bias", bias, x)
    alike("batch_norm", "residual", residual, x, of="input")
    _known("batch_norm", activation)
    if x.numel() == 0 and x.shape[1] > 0:
        raise ValueError(f"batch_norm: input must not be empty in training, got {tuple(x.shape)}")


def batch_norm_eval(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    alpha: float,
) -> None:
    """Per-channel statistics, weight and bias; a residual of x's shape; a known activation."""
    running_statistics(x, mean, var)
    per_channel("batch_norm", "weight", weight, x)
    per_channel("batch_norm", "bias", bias, x)
    alike("batch_norm", "residual", residual, x, of="input")
    _known("batch_norm", activation)


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    y: Tensor | None,
    activation: int,
    alpha: float,
) -> None:
    """grad and y of x's shape; y where an activation is undone, which must be invertible."""
    op = "batch_norm_backward"
    has_channels(op, "x", x)
    alike(op, "grad", grad, x)
    alike(op, "y", y, x)
    for name, value in (("weight", weight), ("mean", mean), ("invstd", invstd)):
        per_channel(op, name, value, x)
    _known(op, activation)
    if activation != kinds.NONE and (y is None or activation not in kinds.INVERTIBLE):
        raise ValueError(
            f"{op}: activation {kinds.NAMES[activation]!r} needs "
            + ("its output y" if activation in kinds.INVERTIBLE else "its input: apply it apart")
        )


def batch_norm_backward_backward(
    gg_x: Tensor,
    gg_weight: Tensor,
    gg_bias: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
) -> None:
    """Gradients of the shapes of what they belong to."""
    op = "batch_norm_backward_backward"
    has_channels(op, "x", x)
    alike(op, "grad", grad, x)
    alike(op, "gg_x", gg_x, x)
    vectors = {"gg_weight": gg_weight, "gg_bias": gg_bias, "weight": weight, "mean": mean}
    for name, value in (*vectors.items(), ("invstd", invstd)):
        per_channel(op, name, value, x)


def has_channels(op: str, name: str, x: Tensor) -> None:
    """A floating-point tensor with a dimension 1."""
    check_tensor(op, name, x)
    if x.dim() < 2:
        raise ValueError(f"{op}: {name} must be [N, C, ...], got shape {tuple(x.shape)}")


def per_channel(op: str, name: str, value: Tensor | None, x: Tensor) -> None:
    """[C], in x's dtype or, beside a half type, in float32."""
    if value is None:
        return
    check_tensor(op, name, value)
    check_device(op, name, value, x, of="the input")
    if value.shape != x.shape[1:2]:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(x.shape[1:2])}, one number per channel, "
            f"got {tuple(value.shape)}"
        )
    if value.dtype != x.dtype and not (x.dtype in _HALF and value.dtype == torch.float32):
        raise TypeError(f"{op}: {name} must be {x.dtype} as the input, got {value.dtype}")


def alike(op: str, name: str, value: Tensor | None, x: Tensor, of: str = "x") -> None:
    """The shape and dtype of x."""
    if value is None:
        return
    check_tensor(op, name, value)
    if value.shape != x.shape:
        raise ValueError(
            f"{op}: {name} must have the shape of {of}, {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    check_same(op, name, value, x, of)


def enough_values(x: Tensor) -> None:
    """More than one value per channel: a single one has no variance."""
    has_channels("batch_norm", "input", x)
    if x.numel() == x.shape[1] > 0:
        raise ValueError(
            "batch_norm: expected more than 1 value per channel when training, "
            f"got input shape {tuple(x.shape)}"
        )


def running_statistics(x: Tensor, mean: Tensor | None, var: Tensor | None) -> None:
    """[C] each, where given."""
    has_channels("batch_norm", "input", x)
    per_channel("batch_norm", "running_mean", mean, x)
    per_channel("batch_norm", "running_var", var, x)


def numbers(momentum: float, eps: float, training: bool) -> None:
    """Real numbers, eps positive in training (as torch asks)."""
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, (int, float)):
            raise TypeError(f"batch_norm: {name} must be a number, got {value!r}")
    if training and not eps > 0:
        raise ValueError(f"batch_norm: eps must be positive in training, got {eps}")


def _known(op: str, code: int) -> None:
    if code not in kinds.NAMES:
        raise ValueError(f"{op}: activation must be a code from 0 to 10, got {code}")
