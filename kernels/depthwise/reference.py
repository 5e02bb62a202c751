"""The definition of depthwise convolution and its gradients, in plain torch: any dtype, any device.

It is conv2d with as many groups as input channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nnarch.kernels.conv2d import reference as conv2d_reference

BLOCK = 16  # channels of a block of packed weights


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: int,
    alpha: float,
) -> Tensor:
    """y[n,k,i,j] = Σ_{r,s} x[n, k // m, i·stride + r·dilation − top, …] · w[k,0,r,s], epilogue."""
    return conv2d_reference.conv2d(
        x, weight, bias, scale, shift, residual, None,
        stride, padding, dilation, x.shape[1], activation, alpha,
    )  # fmt: skip


def depthwise_conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The transpose of x → depthwise_conv2d(x, weight), applied to `grad`."""
    return conv2d_reference.conv2d_input_grad(
        grad, weight, input_size, stride, padding, dilation, input_size[1]
    )


def depthwise_conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The transpose of weight → depthwise_conv2d(x, weight), applied to `grad`."""
    return conv2d_reference.conv2d_weight_grad(
        grad, x, weight_size, stride, padding, dilation, x.shape[1]
    )


def depthwise_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x (bit 1), weight (2) and a bias (4); those not wanted are empty."""
    geometry, empty = (stride, padding, dilation), grad.new_empty(0)
    return (
        depthwise_conv2d_input_grad(grad, weight, x.shape, *geometry) if wanted & 1 else empty,
        depthwise_conv2d_weight_grad(grad, x, weight.shape, *geometry) if wanted & 2 else empty,
        grad.sum((0, 2, 3)) if wanted & 4 else empty,
    )


def depthwise_conv2d_pack(weight: Tensor) -> Tensor:
    """The weights as [ceil(K / 16)][R·S][16], zero beyond the last channel; half types as float."""
    k, _, r, s = weight.shape
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    rows = F.pad(weight.reshape(k, r * s), (0, 0, 0, -k % BLOCK))
    return rows.reshape(-1, BLOCK, r * s).transpose(1, 2).flatten()
