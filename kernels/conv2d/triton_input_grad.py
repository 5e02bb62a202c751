"""The gradient of the convolution by its input on the GPU: a transposed convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnarch import library
from nnarch.kernels.conv_transpose2d.triton_phases import by_phases
from nnarch.kernels.gpu.launch import check_dtype


def conv2d_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """nnarch::conv2d_input_grad on a GPU by the direct product."""
    check_dtype("conv2d_input_grad", grad, weight)
    dx = library.new_output(grad, input_size)
    if dx.numel() == 0:
        return dx
    if grad.numel() == 0:
        return dx.zero_()
    by_phases(grad, weight, dx, stride, padding, dilation, groups)
    return dx
