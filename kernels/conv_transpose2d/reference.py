"""The definition of conv_transpose2d, in plain torch: any dtype, any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from nnarch.kernels.epilogue import reference_epilogue


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    alpha: float,
) -> Tensor:
    """y[n,k, i·stride + r·dilation − padding, …] += x[n,c,i,j] · w[c,k,r,s], then the epilogue."""
    steps: Any = (tuple(stride), tuple(padding), tuple(output_padding), groups, tuple(dilation))
    y = F.conv_transpose2d(x, weight, bias, *steps)
    return reference_epilogue(y, scale, shift, residual, activation, alpha)


def conv_transpose2d_pack(
    weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int, layout: int
) -> Tensor:
    """Nothing to pack: only the native kernels read packed weights."""
    return weight.new_empty(0)
