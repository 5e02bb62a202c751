"""The Triton launchers of the depthwise convolution, and the shapes they are meant for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnarch.kernels.depthwise.triton_backward import (
    depthwise_conv2d_input_grad,
    depthwise_conv2d_weight_grad,
)
from nnarch.kernels.depthwise.triton_forward import depthwise_conv2d
from nnarch.kernels.gpu.launch import check_dtype
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.normalization.triton_reduce import channel_sum

__all__ = [
    "STATIC_CASES",
    "depthwise_conv2d",
    "depthwise_conv2d_backward",
    "depthwise_conv2d_input_grad",
    "depthwise_conv2d_pack",
    "depthwise_conv2d_weight_grad",
]


def depthwise_conv2d_pack(weight: torch.Tensor) -> torch.Tensor:
    """An empty tensor: the GPU kernels read the weight as it is."""
    return weight.new_empty(0)


def depthwise_conv2d_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    wanted: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``nnarch::depthwise_conv2d_backward``: one kernel after the other."""
    check_dtype("depthwise_conv2d_backward", grad, x, weight)
    geometry, empty = (stride, padding, dilation), grad.new_empty(0)
    return (
        depthwise_conv2d_input_grad(grad, weight, x.shape, *geometry) if wanted & 1 else empty,
        depthwise_conv2d_weight_grad(grad, x, weight.shape, *geometry) if wanted & 2 else empty,
        channel_sum(grad) if wanted & 4 else empty,
    )


def _case(
    operation: str, n: int, c: int, h: int, r: int, stride: int, channels_last: bool = True
) -> StaticCase:
    """An operation of a square depthwise convolution with half padding."""
    out = (h + 2 * (r // 2) - r) // stride + 1

    def run(dtype: torch.dtype) -> torch.Tensor:
        x = meta(n, c, h, h, dtype=dtype, channels_last=channels_last)
        y = meta(n, c, out, out, dtype=dtype, channels_last=channels_last)
        weight, b = meta(c, 1, r, r, dtype=dtype), meta(c, dtype=dtype)
        rest = ([stride] * 2, [r // 2] * 4, [1, 1])
        if operation == "input_grad":
            return depthwise_conv2d_input_grad(y, weight, x.shape, *rest)
        if operation == "weight_grad":
            return depthwise_conv2d_weight_grad(y, x, weight.shape, *rest)
        return depthwise_conv2d(x, weight, b, b, b, None, None, *rest, 2, 0.0)

    layout = "" if channels_last else " NCHW"
    return StaticCase(
        f"depthwise {operation} {r}×{r} C{c} H{h} N{n} s{stride}{layout}",
        run,
        flops=2.0 * n * out * out * c * r * r,
        elements=n * c * h * h + c * r * r + n * c * out * out,
    )


STATIC_CASES = [
    _case(operation, *shape)
    for operation in ("forward", "input_grad", "weight_grad")
    for shape in (
        (32, 128, 56, 3, 1),
        (32, 96, 56, 7, 1),
        (32, 64, 112, 3, 2),
        (32, 128, 56, 3, 1, False),
    )
]
"""What bench/static_gpu.py compiles."""
