"""The epilogue that convolutions and linear share: y = act(scale·(acc + bias) + shift + residual).

Its definition, its checks, and its gradients, once for all operations that have it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nnarch.kernels.activation import kinds
from nnarch.kernels.activation.op import activation_grad
from nnarch.kernels.activation.reference import activation as reference_activation
from nnarch.kernels.normalization.op import affine, channel_sum
from nnarch.library import check_device, check_same, check_tensor


def per_channel(vector: Tensor, like: Tensor, dim: int = 1) -> Tensor:
    """A vector of channels, shaped to broadcast along `dim` of `like`."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return vector.reshape(shape)


def reference_epilogue(
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: int,
    alpha: float,
    dim: int = 1,
) -> Tensor:
    """The definition, for channels along `dim`; the bias is already in `y`."""
    if scale is not None:
        y = y * per_channel(scale, y, dim)
    if shift is not None:
        y = y + per_channel(shift, y, dim)
    if residual is not None:
        y = y + residual
    return reference_activation(y, activation, alpha) if activation else y


def check_epilogue(
    op: str,
    like: Tensor,
    output_size: tuple[int, ...],
    channels: int,
    residual: Tensor | None,
    **vectors: Tensor | None,
) -> None:
    """Raise for a bias, scale, shift or residual that does not fit the output."""
    for name, vector in vectors.items():
        if vector is None:
            continue
        check_tensor(op, name, vector)
        if tuple(vector.shape) != (channels,):
            raise ValueError(
                f"{op}: {name} must have shape ({channels},), one value an output channel, "
                f"got {tuple(vector.shape)}"
            )
        check_same(op, name, vector, like)
    if residual is not None:
        check_tensor(op, "residual", residual)
        if tuple(residual.shape) != tuple(output_size):
            raise ValueError(
                f"{op}: residual must have the shape of the output, {tuple(output_size)}, "
                f"got {tuple(residual.shape)}"
            )
        check_same(op, "residual", residual, like)


def check_packed(op: str, packed: Tensor | None, like: Tensor) -> None:
    """Raise unless `packed` is a tensor beside x; the native code looks at its size."""
    if packed is None:
        return
    check_tensor(op, "packed", packed)
    check_device(op, "packed", packed, like)


# ------------------------------------------------------------------------------------- gradients


def must_split(
    code: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
) -> bool:
    """Whether a gradient needs a value that the fused kernel does not keep.

    The derivative of a kind that is not invertible needs its input; the gradient of `scale` needs
    what it multiplies. The epilogue then runs as an operation of its own.
    """
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        return True
    return kinds.needs_split(code, x, weight, bias, scale, shift, residual)


def refuse_gradient(op: str, code: int = kinds.NONE, scale_wanted: bool = False) -> None:
    """Raise NotImplementedError where :func:`must_split` should have kept a call from this op."""
    why = ""
    if code not in kinds.INVERTIBLE:
        why = f"{kinds.NAMES[code]} fused: its input is not kept"
    elif scale_wanted:
        why = "a gradient for scale: what it multiplies is not kept"
    if why:
        raise NotImplementedError(
            f"nnarch::{op} is not differentiable with {why}. nnarch.functional runs such an "
            "epilogue as an operation of its own"
        )


class EpilogueGradients(NamedTuple):
    """Gradients of the epilogue's inputs; `accumulator` is the gradient of acc."""

    accumulator: Tensor
    bias: Tensor | None
    shift: Tensor | None
    residual: Tensor | None


def epilogue_backward(
    grad: Tensor,
    y: Tensor | None,
    scale: Tensor | None,
    activation: int,
    alpha: float,
    needs: tuple[bool, bool, bool],
) -> EpilogueGradients:
    """Back through a fused epilogue whose activation is invertible.

    Args:
        grad: gradient of the output, channels in dimension 1.
        y: the output; None without activation.
        scale: [channels] or None.
        activation, alpha: as the operation got them.
        needs: whether bias, shift and residual want a gradient.
    """
    need_bias, need_shift, need_residual = needs
    gz = activation_grad(grad, y, activation, alpha) if activation else grad
    acc = affine(gz, scale, None, None, 0, 0.0) if scale is not None else gz
    shift_grad = channel_sum(gz) if need_shift or (need_bias and scale is None) else None
    bias_grad = None
    if need_bias:
        bias_grad = channel_sum(acc) if scale is not None else shift_grad
    return EpilogueGradients(
        acc, bias_grad, shift_grad if need_shift else None, gz if need_residual else None
    )
