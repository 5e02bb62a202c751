"""Convolutional capsules: the capsules of every window, routed with one weight.

A window's capsules are gathered into the rows of the dense routing. That copies every input capsule
once for each window that holds it, which is little next to its votes: one value of a capsule
against O · D_out of votes, which never leave the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library

from .op import capsule_routing

_Pair = tuple[int, int]


@arrays.public_lower_precision
def conv_capsule_routing2d(
    x: Tensor,
    weight: Tensor,
    stride: int | _Pair = 1,
    padding: int | _Pair = 0,
    iterations: int = 3,
    *,
    bias: Tensor | None = None,
    detach_routing: bool = False,
    packed: Tensor | None = None,
) -> Tensor:
    """Dynamic routing among the capsules of every window, with a weight that all positions share.

    Args:
        x: ``[N, C, D_in, H, W]``: C capsules of D_in values at every position.
        weight: ``[O, C, KH, KW, D_out, D_in]``.
        stride, padding: of the window; int or (height, width). Padded capsules are zero.
        iterations, bias, detach_routing: as :func:`capsule_routing` has them.
        packed: what :func:`pack_capsule_weight` made of ``weight.flatten(1, 3)``; or None.

    Returns:
        ``[N, O, D_out, H', W']``, a view of memory that is ordered N, H', W', O, D_out.

    Raises:
        ValueError: shapes that do not fit together, a window larger than the image.
        TypeError: dtypes that differ or are not floating point, arguments of the wrong type.
    """
    op = "conv_capsule_routing2d"
    library.check_tensor(op, "x", x)
    library.check_tensor(op, "weight", weight)
    if x.dim() != 5 or weight.dim() != 6:
        raise ValueError(
            f"{op}: x must be [N, C, D_in, H, W] and weight [O, C, KH, KW, D_out, D_in], got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.shape[1:3] != (weight.shape[1], weight.shape[5]):
        raise ValueError(
            f"{op}: x has {x.shape[1]} capsules of {x.shape[2]} values at a position, but weight "
            f"is for {weight.shape[1]} of {weight.shape[5]}"
        )
    kernel, stride, padding = capsule_window(tuple(weight.shape[2:4]), stride, padding)
    n, _, _, height, width = x.shape
    if height + 2 * padding[0] < kernel[0] or width + 2 * padding[1] < kernel[1]:
        raise ValueError(
            f"{op}: the window of {kernel[0]}×{kernel[1]} is larger than the padded image, "
            f"{height + 2 * padding[0]}×{width + 2 * padding[1]}"
        )
    rows, out_height, out_width = _gather(x, kernel, stride, padding)
    v = capsule_routing(
        rows, weight.flatten(1, 3), iterations, bias=bias, detach_routing=detach_routing,
        packed=packed,
    )  # fmt: skip
    images = v.unflatten(0, (n, out_height, out_width))
    return images.permute(0, 3, 4, 1, 2)


def _gather(x: Tensor, kernel: _Pair, stride: _Pair, padding: _Pair) -> tuple[Tensor, int, int]:
    """Every window's capsules ``[N·H'·W', C·KH·KW, D_in]``, and H' and W'."""
    x = x.permute(0, 3, 4, 1, 2)  # capsules side by side: copies then move D_in values at a time
    if any(padding):
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = x.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])
    n, out_height, out_width, c, d, kh, kw = windows.shape
    rows = windows.permute(0, 1, 2, 3, 5, 6, 4).reshape(n * out_height * out_width, c * kh * kw, d)
    return rows, out_height, out_width


def capsule_window(kernel_size: Any, stride: Any, padding: Any) -> tuple[_Pair, _Pair, _Pair]:
    """Kernel, stride and padding as pairs (height, width).

    Raises:
        TypeError, ValueError: one that is no window.
    """
    pairs = []
    for name, value, least in (
        ("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0)
    ):  # fmt: skip
        pair = (value, value) if isinstance(value, int) else value
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or not all(isinstance(v, int) and not isinstance(v, bool) for v in pair)
        ):
            raise TypeError(
                f"conv_capsule_routing2d: {name} must be an int or (height, width), got {value!r}"
            )
        if min(pair) < least:
            raise ValueError(
                f"conv_capsule_routing2d: {name} must be at least {least}, got {value!r}"
            )
        pairs.append((pair[0], pair[1]))
    return pairs[0], pairs[1], pairs[2]
