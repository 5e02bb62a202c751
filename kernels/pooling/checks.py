"""What the pooling operations require of their arguments, and the sizes that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnarch.library import check_tensor

Pair = tuple[int, int]

_LIMIT = 2**31  # of windows' arguments: products of two stay inside int64
MOST_TAPS = 254  # of a window whose maximum a byte tells
_MOST_WINDOWS = 2**26  # in one axis; no image has more, and tables of them would fill the memory


def pair(op: str, name: str, value: Any) -> Pair:
    """An int, or one or two of them, as (height, width)."""
    if type(value) is int:
        return value, value
    values = value if isinstance(value, Sequence) else (value,)
    if len(values) in (1, 2) and all(_is_int(v) for v in values):
        return values[0], values[-1]
    raise TypeError(f"{op}: {name} must be an int or a pair of ints, got {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def tensor(op: str, x: Any, name: str = "input") -> None:
    """A tensor at all."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")


def image(op: str, x: Tensor, name: str = "input") -> None:
    """A floating-point [N, C, H, W] of which only N may be 0."""
    check_tensor(op, name, x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"{op}: {name} must be [C, H, W] or [N, C, H, W], with no size but N being 0, "
            f"got shape {tuple(x.shape)}"
        )


def output_size(
    op: str,
    input_size: Sequence[int],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> Pair:
    """Height and width of the output, after all checks of the window's arguments."""
    for name, values, least in (
        ("kernel_size", kernel, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if len(values) != 2 or min(values) < least or max(values) >= _LIMIT:
            raise ValueError(
                f"{op}: {name} must be at least {least} and below 2**31 in both axes, "
                f"got {tuple(values)}"
            )
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"{op}: padding must be at most half of kernel_size {tuple(kernel)}, "
            f"got {tuple(padding)}"
        )
    axes = zip(input_size[-2:], kernel, stride, padding, dilation, strict=True)
    height, width = (_axis_size(*axis, ceil_mode) for axis in axes)
    if height < 1 or width < 1:
        raise ValueError(
            f"{op}: input of {tuple(input_size[-2:])} is too small for kernel_size "
            f"{tuple(kernel)} and dilation {tuple(dilation)}: the output would have size "
            f"{(height, width)}"
        )
    _few_windows(op, "output", (height, width))
    return height, width


def _few_windows(op: str, name: str, size: Sequence[int]) -> None:
    if max(size) > _MOST_WINDOWS:
        raise ValueError(
            f"{op}: {name} must have at most 2**26 rows and columns, got {tuple(size)}"
        )


def _axis_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    outputs = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    # The last window must begin inside the input or its left padding.
    if ceil_mode and (outputs - 1) * stride >= size + padding:
        outputs -= 1
    return outputs


def max_pool2d(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    return_indices: bool,
) -> None:
    """An image, and windows that fit it."""
    image("max_pool2d", x)
    output_size("max_pool2d", x.shape, kernel, stride, padding, dilation, ceil_mode)


def max_pool2d_taps(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> None:
    """As max_pool2d, with taps that a byte can tell apart."""
    op = "max_pool2d"  # whose training form it is
    image(op, x)
    output_size(op, x.shape, kernel, stride, padding, dilation, ceil_mode)
    _few_taps(op, kernel)


def max_pool2d_taps_grad(
    grad: Tensor,
    taps: Tensor,
    input_size: Sequence[int],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
) -> None:
    """A gradient of the size that the forward pass has, and its taps."""
    op = "max_pool2d_taps_grad"
    _gradient(op, grad, input_size)
    size = output_size(op, input_size, kernel, stride, padding, dilation, ceil_mode)
    if tuple(grad.shape[2:]) != size:
        raise ValueError(f"{op}: grad must have height and width {size}, got {tuple(grad.shape)}")
    if taps.dtype != torch.uint8:
        raise TypeError(f"{op}: taps must be torch.uint8, got {taps.dtype}")
    if taps.shape != grad.shape:
        raise ValueError(
            f"{op}: taps must have the shape of grad, {tuple(grad.shape)}, got {tuple(taps.shape)}"
        )
    _few_taps(op, kernel)


def _few_taps(op: str, kernel: Pair) -> None:
    if kernel[0] * kernel[1] > MOST_TAPS:
        raise ValueError(f"{op}: kernel_size must have at most {MOST_TAPS} taps, got {kernel}")


def avg_pool2d(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> None:
    """An image, windows that fit it, and a divisor other than 0."""
    image("avg_pool2d", x)
    output_size("avg_pool2d", x.shape, kernel, stride, padding, (1, 1), ceil_mode)
    _divisor("avg_pool2d", divisor_override)


def avg_pool2d_input_grad(
    grad: Tensor,
    input_size: Sequence[int],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> None:
    """A gradient of the size that the forward pass has."""
    op = "avg_pool2d_input_grad"
    _gradient(op, grad, input_size)
    _few_windows(op, "input_size", input_size[2:])
    size = output_size(op, input_size, kernel, stride, padding, (1, 1), ceil_mode)
    if tuple(grad.shape[2:]) != size:
        raise ValueError(f"{op}: grad must have height and width {size}, got {tuple(grad.shape)}")
    _divisor(op, divisor_override)


def adaptive_avg_pool2d(x: Tensor, output_size: Pair) -> None:
    """An image and a size of at least 0."""
    _adaptive("adaptive_avg_pool2d", x, output_size)


def adaptive_avg_pool2d_input_grad(grad: Tensor, input_size: Sequence[int]) -> None:
    """A gradient of some output of that input."""
    op = "adaptive_avg_pool2d_input_grad"
    _gradient(op, grad, input_size)
    _few_windows(op, "input_size", input_size[2:])
    _few_windows(op, "grad", grad.shape[2:])


def adaptive_max_pool2d(x: Tensor, output_size: Pair, return_indices: bool) -> None:
    """An image and a size of at least 0."""
    _adaptive("adaptive_max_pool2d", x, output_size)


def max_pool2d_input_grad(grad: Tensor, indices: Tensor, input_size: Sequence[int]) -> None:
    """Indices of grad's shape, inside the input."""
    op = "max_pool2d_input_grad"
    _gradient(op, grad, input_size)
    if grad.shape != indices.shape:
        raise ValueError(
            f"{op}: indices must have the shape of grad, {tuple(grad.shape)}, "
            f"got {tuple(indices.shape)}"
        )
    _indices(op, indices, input_size)


def max_pool2d_gather(x: Tensor, indices: Tensor) -> None:
    """Indices of the same N and C, inside the input."""
    op = "max_pool2d_gather"
    image(op, x, "x")
    if indices.dim() != 4 or indices.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"{op}: indices must be {tuple(x.shape[:2])} and two sizes, got {tuple(indices.shape)}"
        )
    _indices(op, indices, x.shape)


def _indices(op: str, indices: Tensor, input_size: Sequence[int]) -> None:
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: indices must be torch.int64, got {indices.dtype}")
    if indices.device.type != "cpu" or type(indices) is not Tensor or indices.numel() == 0:
        return  # looking at values would stall a GPU, and a fake tensor has none
    low, high = (int(v) for v in torch.aminmax(indices))
    if low < -1 or high >= input_size[-2] * input_size[-1]:
        raise ValueError(
            f"{op}: indices must lie in an input of {tuple(input_size[-2:])}, got {low} to {high}"
        )


def _gradient(op: str, grad: Tensor, input_size: Sequence[int]) -> None:
    check_tensor(op, "grad", grad)
    if len(input_size) != 4 or grad.dim() != 4 or tuple(input_size[:2]) != tuple(grad.shape[:2]):
        raise ValueError(
            f"{op}: input_size must be (N, C, H, W) with grad's N and C, {tuple(grad.shape)}, "
            f"got {tuple(input_size)}"
        )
    if min(input_size[1:]) < 1:
        raise ValueError(f"{op}: input_size must be positive, got {tuple(input_size)}")


def _adaptive(op: str, x: Tensor, output_size: Pair) -> None:
    image(op, x)
    if len(output_size) != 2 or min(output_size) < 0:
        raise ValueError(
            f"{op}: output_size must not be negative in either axis, got {tuple(output_size)}"
        )
    _few_windows(op, "output_size", output_size)


def _divisor(op: str, divisor_override: int | None) -> None:
    if divisor_override is not None and not _is_int(divisor_override):
        raise TypeError(f"{op}: divisor_override must be an int or None, got {divisor_override!r}")
    if divisor_override == 0:
        raise ValueError(f"{op}: divisor_override must not be 0, got 0")
