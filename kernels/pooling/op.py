"""The public pooling functions; what they call is declared in maximum.py and average.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nnarch import arrays, library
from nnarch.calls import wants_gradient

from . import checks
from .average import adaptive_avg_pool2d_op, avg_pool2d_op
from .checks import Pair
from .maximum import adaptive_max_pool2d_op, max_pool2d_op, max_pool2d_taps_op

IntOrPair = int | Sequence[int]

_maxima = library.first_output(max_pool2d_taps_op)


@arrays.public
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The maximum over windows, as torch.nn.functional.max_pool2d.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        kernel_size: height and width of a window, in taps.
        stride: distance between windows, `kernel_size` where None.
        padding: rows and columns of -inf around the input, at most half of `kernel_size`.
        dilation: distance between the taps of a window.
        ceil_mode: whether a last window may reach past the input.
        return_indices: whether to return also where the maxima are.

    Returns:
        The maxima; with `return_indices` also their positions ``h * W + w``, int64, -1 for a
        window of padding alone. The first of equal values counts; a NaN is larger than anything.

    Raises:
        ValueError: sizes that do not fit.
        TypeError: arguments of the wrong type, `input` not floating point.
    """
    op = "max_pool2d"
    kernel = checks.pair(op, "kernel_size", kernel_size)
    steps = _stride(op, stride, kernel)
    arguments = (
        kernel,
        steps,
        checks.pair(op, "padding", padding),
        checks.pair(op, "dilation", dilation),
        ceil_mode,
    )
    if not return_indices and kernel[0] * kernel[1] <= checks.MOST_TAPS:
        x = _batched(op, input)
        if wants_gradient(x):
            # A byte for every maximum where an index takes eight.
            y = _maxima(x, *arguments)
            return y if x is input else y.squeeze(0)
    return _maximum(op, max_pool2d_op, input, arguments, return_indices)


@arrays.public
def adaptive_max_pool2d(
    input: Tensor,
    output_size: int | Sequence[int | None] | None,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The maximum over windows that divide the input evenly.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        output_size: height and width of the output; None keeps that of the input.
        return_indices: whether to return also where the maxima are.

    Returns:
        As :func:`max_pool2d`.

    Raises:
        ValueError: sizes that do not fit.
        TypeError: arguments of the wrong type, `input` not floating point.
    """
    op = "adaptive_max_pool2d"
    checks.tensor(op, input)
    size = _adaptive_size(op, output_size, input)
    return _maximum(op, adaptive_max_pool2d_op, input, (size,), return_indices)


@arrays.public
def avg_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The average over windows, as torch.nn.functional.avg_pool2d.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        kernel_size: height and width of a window.
        stride: distance between windows, `kernel_size` where None.
        padding: rows and columns of zeros around the input, at most half of `kernel_size`.
        ceil_mode: whether a last window may reach past the input.
        count_include_pad: whether the divisor counts padding.
        divisor_override: the divisor itself, instead of the window's size.

    Returns:
        The averages, in the dtype and memory format of `input`.

    Raises:
        ValueError: sizes that do not fit, or a divisor of 0.
        TypeError: arguments of the wrong type, `input` not floating point.
    """
    op = "avg_pool2d"
    kernel = checks.pair(op, "kernel_size", kernel_size)
    steps = _stride(op, stride, kernel)
    pads = checks.pair(op, "padding", padding)
    x = _batched(op, input)
    y = avg_pool2d_op(x, kernel, steps, pads, ceil_mode, count_include_pad, divisor_override)
    return y if x is input else y.squeeze(0)


@arrays.public
def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """The average over windows that divide the input evenly; output size 1 is global pooling.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        output_size: height and width of the output; None keeps that of the input.

    Returns:
        The averages, in the dtype and memory format of `input`.

    Raises:
        ValueError: sizes that do not fit.
        TypeError: arguments of the wrong type, `input` not floating point.
    """
    op = "adaptive_avg_pool2d"
    x = _batched(op, input)
    size = _adaptive_size(op, output_size, input)
    y = adaptive_avg_pool2d_op(x, size)
    return y if x is input else y.squeeze(0)


def _maximum(
    op: str,
    run: Callable[..., tuple[Tensor, Tensor]],
    input: Tensor,
    arguments: tuple[Any, ...],
    return_indices: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    x = _batched(op, input)
    # A gradient goes where the maxima were.
    wanted = return_indices or wants_gradient(x)
    y, indices = run(x, *arguments, wanted)
    if x is not input:
        y, indices = y.squeeze(0), indices.squeeze(0) if wanted else indices
    return (y, indices) if return_indices else y


def _batched(op: str, input: Tensor) -> Tensor:
    """`input` with a batch dimension: [C, H, W] becomes [1, C, H, W]."""
    checks.tensor(op, input)
    return input.unsqueeze(0) if input.dim() == 3 else input


def _stride(op: str, stride: IntOrPair | None, kernel: Pair) -> Pair:
    if stride is None or (not isinstance(stride, int) and len(stride) == 0):
        return kernel
    return checks.pair(op, "stride", stride)


def _adaptive_size(op: str, output_size: int | Sequence[int | None] | None, input: Tensor) -> Pair:
    if type(output_size) is int:
        return output_size, output_size
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if len(sizes) == 2 and None in sizes:
        sizes = tuple(i if o is None else o for i, o in zip(input.shape[-2:], sizes, strict=False))
    return checks.pair(op, "output_size", sizes)
