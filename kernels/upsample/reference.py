"""The definition of upsampling in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upsample2d(
    x: Tensor,
    output_size: Sequence[int],
    bilinear: bool,
    align_corners: bool,
    scale_h: float,
    scale_w: float,
) -> Tensor:
    """Both axes one after the other: an output is a weighted sum of two neighbours, or a copy."""
    for dim, size, scale in ((2, output_size[0], scale_h), (3, output_size[1], scale_w)):
        first, second, part = sources(x, dim, size, bilinear, align_corners, scale)
        x = (
            x.index_select(dim, first)
            if part is None
            else (x.index_select(dim, first) * (1 - part) + x.index_select(dim, second) * part)
        )
    return x


def upsample2d_input_grad(
    grad: Tensor,
    input_size: Sequence[int],
    bilinear: bool,
    align_corners: bool,
    scale_h: float,
    scale_w: float,
) -> Tensor:
    """Every input sums what became of it."""
    for dim, scale in ((2, scale_h), (3, scale_w)):
        shape = [*grad.shape]
        shape[dim] = input_size[dim]
        like = grad.new_empty(1).expand(shape)
        first, second, part = sources(like, dim, grad.shape[dim], bilinear, align_corners, scale)
        dx = grad.new_zeros(shape)
        if part is None:
            grad = dx.index_add(dim, first, grad)
        else:
            dx = dx.index_add(dim, first, grad * (1 - part))
            grad = dx.index_add(dim, second, grad * part)
    return grad


def sources(
    x: Tensor, dim: int, outputs: int, bilinear: bool, align_corners: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The two inputs along `dim` that every output lies between, and its part of the second.

    Args:
        x: the input.
        outputs: how many there are.
        scale: that the user gave; 0 where it follows from the sizes.

    Returns:
        Indices of the first and second inputs; the second's weight, shaped to multiply x, or None
        where outputs copy the first.
    """
    inputs = x.shape[dim]
    at = torch.arange(outputs, device=x.device)
    if not bilinear:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32  # as torch computes it
        step = torch.tensor(inputs, dtype=dtype, device=x.device) / outputs
        if scale > 0 and outputs not in (inputs, 2 * inputs):  # which torch copies or doubles
            step = torch.tensor(1 / scale, dtype=dtype, device=x.device)
        first = (at.to(dtype) * step).floor().long().clamp(max=inputs - 1)
        return first, first, None
    if inputs == outputs:
        source = at.double()
    elif align_corners:
        source = at.double() * ((inputs - 1) / (outputs - 1) if outputs > 1 else 0.0)
    else:
        source = (1 / scale if scale > 0 else inputs / outputs) * (at.double() + 0.5) - 0.5
        source = source.clamp(min=0.0)
    first = source.floor().long().clamp(max=inputs - 1)
    second = first if inputs == outputs else (first + 1).clamp(max=inputs - 1)
    shape = [1] * x.dim()
    shape[dim] = outputs
    return first, second, (source - first).clamp(0.0, 1.0).to(x.dtype).view(shape)
