"""The definitions of the pooling operations, by torch's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = Sequence[int]


def max_pool2d(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    return_indices: bool,
) -> tuple[Tensor, Tensor]:
    """The maximum of every window and, where asked for, its flat position in the plane."""
    geometry = (list(kernel), list(stride), list(padding), list(dilation), ceil_mode)
    y, indices = F.max_pool2d(x, *geometry, return_indices=True)
    if not return_indices:
        return y, indices.new_empty(0)
    # torch names a position outside the plane for a window of padding alone; ours is -1.
    padding_alone = F.max_pool2d(x.new_zeros(1, 1, *x.shape[2:]), *geometry) < 0
    return y, indices.masked_fill(padding_alone, -1)


def max_pool2d_taps(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """The maximum of every window and the number of its tap, 255 where the window is padding."""
    y, indices = max_pool2d(x, kernel, stride, padding, dilation, ceil_mode, True)
    row, column = indices // x.shape[3], indices % x.shape[3]
    first_row, first_column = _first_taps(indices, stride, padding)
    row = (row - first_row) // dilation[0]
    column = (column - first_column) // dilation[1]
    taps = (row * kernel[1] + column).masked_fill(indices < 0, 255)
    return y, taps.to(torch.uint8)


def max_pool2d_positions(
    taps: Tensor,
    input_size: Sequence[int],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """The taps of max_pool2d_taps as the positions of max_pool2d."""
    number = taps.to(torch.int64)
    first_row, first_column = _first_taps(taps, stride, padding)
    row = first_row + number // kernel[1] * dilation[0]
    column = first_column + number % kernel[1] * dilation[1]
    height, width = input_size[-2:]
    outside = (row < 0) | (row >= height) | (column < 0) | (column >= width)
    none = outside | (number >= kernel[0] * kernel[1])
    return (row * width + column).masked_fill(none, -1)


def _first_taps(outputs: Tensor, stride: Pair, padding: Pair) -> tuple[Tensor, Tensor]:
    """The row and the column of every window's first tap."""
    rows, columns = (torch.arange(n, device=outputs.device) for n in outputs.shape[2:])
    return (rows * stride[0] - padding[0])[:, None], columns * stride[1] - padding[1]


def max_pool2d_taps_grad(
    grad: Tensor,
    taps: Tensor,
    input_size: Sequence[int],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> Tensor:
    """Every gradient added where its maximum was."""
    positions = max_pool2d_positions(taps, input_size, kernel, stride, padding, dilation)
    return max_pool2d_input_grad(grad, positions, input_size)


def adaptive_max_pool2d(
    x: Tensor, output_size: Pair, return_indices: bool
) -> tuple[Tensor, Tensor]:
    """The maximum of windows that divide the plane evenly, and its position."""
    y, indices = F.adaptive_max_pool2d(x, list(output_size), True)
    return y, indices if return_indices else indices.new_empty(0)


def max_pool2d_input_grad(grad: Tensor, indices: Tensor, input_size: Sequence[int]) -> Tensor:
    """Every gradient added where its maximum was; index -1 drops it."""
    n, c, h, w = input_size
    flat = indices.flatten(2)
    values = grad.flatten(2).masked_fill(flat < 0, 0)
    dx = grad.new_zeros(n, c, h * w).scatter_add_(2, flat.clamp_min(0), values)
    return dx.view(n, c, h, w)


def max_pool2d_gather(x: Tensor, indices: Tensor) -> Tensor:
    """x at the indices; 0 at index -1."""
    flat = indices.flatten(2)
    y = x.flatten(2).gather(2, flat.clamp_min(0)).masked_fill(flat < 0, 0)
    return y.view(indices.shape)


def avg_pool2d(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """The sum of every window over its size."""
    return F.avg_pool2d(
        x,
        list(kernel),
        list(stride),
        list(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )


def avg_pool2d_input_grad(
    grad: Tensor,
    input_size: Sequence[int],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Every gradient over its window's size, added to the inputs of the window."""
    return torch.ops.aten.avg_pool2d_backward(
        grad.contiguous(),
        grad.new_empty(input_size),
        list(kernel),
        list(stride),
        list(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )


def adaptive_avg_pool2d(x: Tensor, output_size: Pair) -> Tensor:
    """The mean of windows that divide the plane evenly."""
    return F.adaptive_avg_pool2d(x, (output_size[0], output_size[1]))


def adaptive_avg_pool2d_input_grad(grad: Tensor, input_size: Sequence[int]) -> Tensor:
    """Every gradient over its window's size, added to the inputs of the window."""
    return torch.ops.aten._adaptive_avg_pool2d_backward(
        grad.contiguous(), grad.new_empty(input_size)
    )


def max_unpool2d(x: Tensor, indices: Tensor, output_size: Sequence[int]) -> Tensor:
    """0 but at the indices, where x is; of several equal indices the last counts."""
    n, c, h, w = x.shape
    flat = indices.flatten(2)
    # The last place that has the index of each output, or none.
    places = torch.arange(h * w, device=x.device).expand_as(flat)
    last = flat.new_full((n, c, output_size[0] * output_size[1]), -1)
    last = last.scatter_reduce(2, flat, places, "amax")
    y = x.flatten(2).gather(2, last.clamp_min(0)).masked_fill(last < 0, 0)
    return y.view(n, c, *output_size)
