"""The geometry of 2-D convolutions: sizes, paddings, and the checks of both."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnarch.kernels.epilogue import check_same, check_tensor

_INT = (int, torch.SymInt)
_LIMIT = 2**31  # of strides, paddings and dilations: their products with sizes fit int64


def output_size(
    x_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """[N, K, H', W'] of a convolution; sizes may be symbolic."""
    top, left, bottom, right = padding
    n, _, h, w = x_size
    k, _, r, s = weight_size
    rows = (h + top + bottom - dilation[0] * (r - 1) - 1) // stride[0] + 1
    columns = (w + left + right - dilation[1] * (s - 1) - 1) // stride[1] + 1
    return (n, k, rows, columns)


def two(value: Any) -> Any:
    """A number, or a sequence of one, twice; anything else as it is: the checks explain it."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, Sequence):
        return tuple(value) * 2 if len(value) == 1 else value
    try:
        number = operator.index(value)  # also NumPy's integers
    except TypeError:
        return value
    return number, number


def padding_of(
    padding: Any, weight: Tensor, stride: Sequence[int], dilation: Sequence[int], op: str = "conv2d"
) -> tuple[int, ...]:
    """(top, left, bottom, right) of any padding argument.

    "same" puts the odd pixel at the bottom and right, as torch does.
    """
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0, 0, 0)
        if padding != "same":
            raise ValueError(f"{op}: padding must be 'same', 'valid' or numbers, got {padding!r}")
        if tuple(stride) != (1, 1):
            raise ValueError(f"{op}: padding 'same' needs stride 1, got {tuple(stride)}")
        total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
        before = [t // 2 for t in total]
        return (*before, total[0] - before[0], total[1] - before[1])
    if type(padding) is int:
        return padding, padding, padding, padding
    pads = two(padding)
    if not isinstance(pads, Sequence):
        raise TypeError(f"{op}: padding must be a string, a number or numbers, got {padding!r}")
    if len(pads) not in (1, 2, 4):
        raise ValueError(f"{op}: padding must be 1, 2 or 4 numbers, got {padding!r}")
    return tuple(pads) * (4 // len(pads))


def check_conv(
    op: str,
    x: Any,
    weight: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """Raise for arguments that make no convolution; return the size of the output."""
    for name, tensor in (("x", x), ("weight", weight)):
        check_tensor(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must be 4-D, got shape {tuple(tensor.shape)}")
    check_same(op, "weight", weight, x)
    check_numbers(op, {"stride": stride, "dilation": dilation}, least=1)
    check_numbers(op, {"padding": padding}, least=0, count=4)
    if not isinstance(groups, _INT):
        raise TypeError(f"{op}: groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"{op}: groups must be positive, got {groups}")
    channels, (k, per_group, r, s) = x.shape[1], weight.shape
    if channels % groups or k % groups:
        raise ValueError(
            f"{op}: groups={groups} must divide the input channels ({channels}) and the output "
            f"channels ({k})"
        )
    if per_group != channels // groups:
        raise ValueError(
            f"{op}: weight has {per_group} input channels a group, but x has {channels} channels "
            f"in {groups} group(s): expected {channels // groups}"
        )
    if k < 1:
        raise ValueError(f"{op}: weight of shape {tuple(weight.shape)} has no output channels")
    if r < 1 or s < 1:
        raise ValueError(f"{op}: the kernel size must be positive, got {(r, s)}")
    size = output_size(x.shape, weight.shape, stride, padding, dilation)
    if size[2] < 1 or size[3] < 1:
        raise ValueError(
            f"{op}: the kernel of {r}×{s} (dilation {tuple(dilation)}) is larger than the padded "
            f"input of {tuple(x.shape[2:])} with padding {tuple(padding)}"
        )
    return size


def check_numbers(
    op: str, arguments: dict[str, Sequence[int]], *, least: int, count: int = 2
) -> None:
    """Raise unless each argument is `count` ints, none below `least`; they may be symbolic."""
    for name, values in arguments.items():
        if not isinstance(values, Sequence) or not all(isinstance(v, _INT) for v in values):
            raise TypeError(f"{op}: {name} must be an int or ints, got {values!r}")
        if len(values) != count:
            raise ValueError(f"{op}: {name} must be {count} numbers, got {tuple(values)}")
        if any(value < least or value >= _LIMIT for value in values):
            raise ValueError(
                f"{op}: {name} must be at least {least} and below 2**31, got {tuple(values)}"
            )
