"""The Triton launchers of the convolution, one for each operation of op.py."""

from __future__ import annotations

import torch

from nnarch.kernels.conv2d.triton_forward import conv2d
from nnarch.kernels.conv2d.triton_input_grad import conv2d_input_grad
from nnarch.kernels.conv2d.triton_weight_grad import conv2d_weight_grad
from nnarch.kernels.gpu.static import StaticCase, meta

__all__ = ["STATIC_CASES", "conv2d", "conv2d_input_grad", "conv2d_pack", "conv2d_weight_grad"]


def conv2d_pack(weight: torch.Tensor, groups: int, tile: int) -> torch.Tensor:
    """An empty tensor: the GPU kernels read the weight as it is."""
    return weight.new_empty(0)


def _case(name, n, c, h, k, r, stride, operation) -> StaticCase:
    """An operation of a square convolution with half padding."""
    out = (h + 2 * (r // 2) - r) // stride + 1
    pads = [r // 2] * 4

    def run(dtype: torch.dtype) -> torch.Tensor:
        x, y = meta(n, c, h, h, dtype=dtype), meta(n, k, out, out, dtype=dtype)
        weight, b = meta(k, c, r, r, dtype=dtype), meta(k, dtype=dtype)
        rest = ([stride] * 2, pads, [1, 1], 1)
        if operation == "input_grad":
            return conv2d_input_grad(y, weight, x.shape, *rest)
        if operation == "weight_grad":
            return conv2d_weight_grad(y, x, weight.shape, *rest)
        return conv2d(x, weight, b, b, b, y, None, *rest, 1, 0.0)

    residual = n * k * out * out if operation == "forward" else 0
    return StaticCase(
        f"conv2d {operation} {name}",
        run,
        flops=2.0 * n * out * out * k * c * r * r,
        elements=n * c * h * h + k * c * r * r + n * k * out * out + residual,
        matrix=True,
    )


_SHAPES = (
    (32, 256, 56, 256, 3, 1),
    (32, 256, 56, 64, 1, 1),
    (32, 128, 56, 128, 3, 2),
    (32, 512, 7, 512, 3, 1),  # few pixels: the reduction is split
)
_STEM = (32, 3, 224, 64, 7, 2)
_TO_IMAGE = (32, 64, 56, 3, 3, 1)  # few output channels: the mirror image, for the input gradient

STATIC_CASES = [
    _case(f"{r}×{r} C{c} H{h} K{k} N{n} s{stride}", n, c, h, k, r, stride, operation)
    for operation, few_channels in (
        ("forward", _STEM),
        ("input_grad", _TO_IMAGE),
        ("weight_grad", _STEM),
    )
    for n, c, h, k, r, stride in (*_SHAPES, few_channels)
]
"""What bench/static_gpu.py compiles."""
