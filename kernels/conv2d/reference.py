"""The definition of conv2d and its gradients, in plain torch: any dtype, any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn import grad as transposed

from nnarch.kernels.epilogue import reference_epilogue


def conv2d(
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
    groups: int,
    activation: int,
    alpha: float,
) -> Tensor:
    """y[n,k,i,j] = Σ_{c,r,s} x[n,c, i·stride + r·dilation − top, …] · w[k,c,r,s], then epilogue."""
    y = F.conv2d(_pad(x, padding), weight, bias, tuple(stride), 0, tuple(dilation), groups)
    return reference_epilogue(y, scale, shift, residual, activation, alpha)


def conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The transpose of x → conv2d(x, weight), applied to `grad`."""
    n, c, h, w = input_size
    top, left, bottom, right = padding
    padded = (n, c, h + top + bottom, w + left + right)
    geometry: Any = (tuple(stride), 0, tuple(dilation), groups)
    dx = transposed.conv2d_input(padded, weight, grad, *geometry)
    return dx[:, :, top : top + h, left : left + w].clone()


def conv2d_weight_grad(
    grad: Tensor,
    x: Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = False,
) -> Tensor:
    """The transpose of weight → conv2d(x, weight), applied to `grad`."""
    geometry: Any = (tuple(stride), 0, tuple(dilation), groups)
    dw = transposed.conv2d_weight(_pad(x, padding), tuple(weight_size), grad, *geometry)
    return dw.contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def conv2d_pack(weight: Tensor, groups: int, tile: int) -> Tensor:
    """Nothing to pack: only the native kernels read packed weights."""
    return weight.new_empty(0)


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    top, left, bottom, right = padding
    return F.pad(x, (left, right, top, bottom)) if any(padding) else x
