"""Winograd's convolution and its gradients on the GPU, from their parts.

F(2×2, 3×3) is one kernel (triton_winograd_fused.py). F(4×4, 3×3) goes by way of memory: transform
the image, multiply, transform back (triton_winograd_transforms.py, triton_winograd_products.py).
Either first transforms the weight. When each is used, triton_winograd_choice.py decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nnarch.kernels.conv2d.triton_winograd_fused import fused
from nnarch.kernels.conv2d.triton_winograd_points import TAPS, winograd
from nnarch.kernels.conv2d.triton_winograd_products import multiply, multiply_in_parts
from nnarch.kernels.conv2d.triton_winograd_transforms import (
    transformed_image,
    transformed_weight,
    write_outputs,
    write_weight_grad,
)
from nnarch.kernels.gpu.launch import cdiv, device_guard
from nnarch.kernels.gpu.matmul import channels_innermost
from nnarch.kernels.gpu.split import NO_EPILOGUE


def winograd_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    y: torch.Tensor,
    padding: Sequence[int],
    groups: int,
    epilogue: dict[str, Any],
    tile: int,
) -> None:
    """y = epilogue(conv2d(x, weight)), 3×3 with stride and dilation 1.

    Args:
        x: [N, C, H, W].
        weight: [K, C / groups, 3, 3].
        y: [N, K, OH, OW], written.
        padding: (top, left, bottom, right).
        groups: of the convolution.
        epilogue: the arguments bias_ptr, scale_ptr, shift_ptr, residual_ptr, alpha, ACTIVATION.
        tile: outputs on a side of a tile, 2 or 4.
    """
    _convolve(x, weight, y, padding[:2], groups, epilogue, tile, rotated=False)


def winograd_input_grad(
    grad: torch.Tensor,
    weight: torch.Tensor,
    dx: torch.Tensor,
    padding: Sequence[int],
    groups: int,
    tile: int,
) -> None:
    """dx = the convolution of `grad` with the rotated filters; arguments as the forward's."""
    pads = [TAPS - 1 - pad for pad in padding[:2]]
    _convolve(grad, weight, dx, pads, groups, NO_EPILOGUE, tile, rotated=True)


def _convolve(x, weight, y, pads, groups: int, epilogue, tile: int, rotated: bool) -> None:
    wino = winograd(tile)
    with device_guard(x):
        u = transformed_weight(weight, groups, rotated, wino)
        x = channels_innermost(x, x.shape[1] // groups)
        if tile == 2:
            fused(x, u, y, pads, groups, epilogue)
            return
        tiles_hw = cdiv(y.shape[2], tile), cdiv(y.shape[3], tile)
        v = transformed_image(x, groups, wino.input, tile, pads, tiles_hw)
        write_outputs(multiply(v, u), y, epilogue, wino, tiles_hw)


def winograd_weight_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    dw: torch.Tensor,
    padding: Sequence[int],
    groups: int,
) -> None:
    """dw = the gradient of the filters: F(3×3, 4×4), in which a tile of `grad` is the filter.

    Args:
        grad: [N, K, OH, OW].
        x: [N, C, H, W].
        dw: [K, C / groups, 3, 3], written.
        padding: (top, left, bottom, right).
        groups: of the convolution.
    """
    wino = winograd(4)
    tiles_hw = cdiv(grad.shape[2], 4), cdiv(grad.shape[3], 4)
    with device_guard(grad):
        grad = channels_innermost(grad, dw.shape[0] // groups)
        x = channels_innermost(x, dw.shape[1])
        g = transformed_image(grad, groups, wino.grad, 4, (0, 0), tiles_hw)
        v = transformed_image(x, groups, wino.input, 4, padding[:2], tiles_hw)
        write_weight_grad(multiply_in_parts(g.transpose(2, 3), v), dw, wino)
