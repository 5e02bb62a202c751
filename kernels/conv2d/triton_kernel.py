"""The Triton launchers of the convolution, one for each operation of op.py.

Each asks triton_winograd_choice.py whether Winograd's algorithm is predicted to be faster, and runs
that or the direct product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnarch import library
from nnarch.kernels.conv2d import triton_forward, triton_input_grad, triton_weight_grad
from nnarch.kernels.conv2d.geometry import output_size
from nnarch.kernels.conv2d.triton_forward import epilogue_arguments
from nnarch.kernels.conv2d.triton_weight_grad import in_format
from nnarch.kernels.conv2d.triton_winograd import (
    winograd_forward,
    winograd_input_grad,
    winograd_weight_grad,
)
from nnarch.kernels.conv2d.triton_winograd_choice import (
    Work,
    choose_tile,
    choose_weight_grad,
    may_transform,
)
from nnarch.kernels.gpu.launch import check_dtype
from nnarch.kernels.gpu.static import StaticCase, meta

__all__ = ["STATIC_CASES", "conv2d", "conv2d_input_grad", "conv2d_pack", "conv2d_weight_grad"]


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    packed: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """nnarch::conv2d on a GPU; `packed` is a CPU matter and not read."""
    terms = bias, scale, shift, residual
    tile = 0
    if may_transform(x.dtype, weight.shape, stride, dilation):
        n, k, oh, ow = size = output_size(x.shape, weight.shape, stride, padding, dilation)
        tile = choose_tile(Work(n, oh, ow, weight.shape[1], k // groups, groups))
    library.ran.algorithm = _name(tile)
    if not tile:
        return triton_forward.conv2d(
            x, weight, *terms, packed, stride, padding, dilation, groups, activation, alpha
        )
    check_dtype("conv2d", x, weight, residual)
    y = library.new_output(x, size, weight)
    epilogue = epilogue_arguments(*terms, activation, alpha)
    winograd_forward(x, weight, y, padding, groups, epilogue, tile)
    return y


def conv2d_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> torch.Tensor:
    """nnarch::conv2d_input_grad on a GPU."""
    tile = 0
    if may_transform(grad.dtype, weight.shape, stride, dilation) and grad.numel():
        n, c, h, w = input_size
        tile = choose_tile(Work(n, h, w, weight.shape[0] // groups, c // groups, groups))
    library.ran.algorithm = _name(tile)
    if not tile:
        return triton_input_grad.conv2d_input_grad(
            grad, weight, input_size, stride, padding, dilation, groups
        )
    check_dtype("conv2d_input_grad", grad, weight)
    dx = library.new_output(grad, input_size)
    winograd_input_grad(grad, weight, dx, padding, groups, tile)
    return dx


def conv2d_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = False,
) -> torch.Tensor:
    """nnarch::conv2d_weight_grad on a GPU; the same bits in every run."""
    transforms = False
    if may_transform(x.dtype, weight_size, stride, dilation):
        n, k, oh, ow = grad.shape
        transforms = choose_weight_grad(Work(n, oh, ow, weight_size[1], k // groups, groups))
    library.ran.algorithm = "winograd_weight_grad" if transforms else "weight_grad_gemm"
    if not transforms:
        return triton_weight_grad.conv2d_weight_grad(
            grad, x, weight_size, stride, padding, dilation, groups, channels_last
        )
    check_dtype("conv2d_weight_grad", grad, x)
    dw = in_format(grad.new_empty(list(weight_size)), channels_last)
    winograd_weight_grad(grad, x, dw, padding, groups)
    return dw


def _name(tile: int) -> str:
    """What nnarch.trace() calls a convolution with this tile, as on the CPU."""
    return f"winograd_{tile}x{tile}" if tile else "implicit_gemm"


def conv2d_pack(weight: torch.Tensor, groups: int, tile: int) -> torch.Tensor:
    """An empty tensor: the GPU kernels read the weight as it is."""
    return weight.new_empty(0)


def _case(name, n, c, h, k, r, stride, operation) -> StaticCase:
    """An operation of a square convolution with half padding, by the direct product."""
    out = (h + 2 * (r // 2) - r) // stride + 1
    pads = [r // 2] * 4

    def run(dtype: torch.dtype) -> torch.Tensor:
        x, y = meta(n, c, h, h, dtype=dtype), meta(n, k, out, out, dtype=dtype)
        weight, b = meta(k, c, r, r, dtype=dtype), meta(k, dtype=dtype)
        rest = ([stride] * 2, pads, [1, 1], 1)
        if operation == "input_grad":
            return triton_input_grad.conv2d_input_grad(y, weight, x.shape, *rest)
        if operation == "weight_grad":
            return triton_weight_grad.conv2d_weight_grad(y, x, weight.shape, *rest)
        return triton_forward.conv2d(x, weight, b, b, b, y, None, *rest, 1, 0.0)

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


def _winograd_case(operation: str, tile: int, n: int, c: int, h: int) -> StaticCase:
    """A 3×3 convolution by Winograd's algorithm; its FLOPs are those of the transformed products.

    Whether an algorithm that multiplies less reaches the roofline is asked of what it multiplies.
    """

    def run(dtype: torch.dtype) -> None:
        x, y = meta(n, c, h, h, dtype=dtype), meta(n, c, h, h, dtype=dtype)
        weight, b = meta(c, c, 3, 3, dtype=dtype), meta(c, dtype=dtype)
        if operation == "weight_grad":
            winograd_weight_grad(y, x, weight, [1] * 4, 1)
        elif operation == "input_grad":
            winograd_input_grad(y, weight, x, [1] * 4, 1, tile)
        else:
            epilogue = epilogue_arguments(b, b, b, meta(n, c, h, h, dtype=dtype), 1, 0.0)
            winograd_forward(x, weight, y, [1] * 4, 1, epilogue, tile)

    tiles = n * (-(-h // tile)) ** 2
    return StaticCase(
        f"conv2d {operation} F({tile}×{tile}) C{c} H{h} K{c} N{n}",
        run,
        flops=2.0 * (tile + 2) ** 2 * tiles * c * c,
        elements=2 * n * c * h * h + 9 * c * c + (n * c * h * h if operation == "forward" else 0),
        matrix=True,
        main=1 if tile == 2 else 2,  # after the transforms
        only="ieee",
    )


STATIC_CASES = [
    _case(f"{r}×{r} C{c} H{h} K{k} N{n} s{stride}", n, c, h, k, r, stride, operation)
    for operation, few_channels in (
        ("forward", _STEM),
        ("input_grad", _TO_IMAGE),
        ("weight_grad", _STEM),
    )
    for n, c, h, k, r, stride in (*_SHAPES, few_channels)
] + [
    _winograd_case("forward", 2, 32, 64, 56),
    _winograd_case("input_grad", 2, 32, 128, 28),
    _winograd_case("forward", 2, 32, 159, 55),  # nothing divides
    _winograd_case("forward", 4, 16, 640, 64),
    _winograd_case("input_grad", 4, 16, 640, 64),
    _winograd_case("weight_grad", 4, 16, 640, 64),
]
"""What bench/static_gpu.py compiles."""
