"""What an echo-state network is given, as [T, B, features], and what it says, in that shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnarch import arrays

Array = Tensor | np.ndarray


def as_sequence(
    op: str, name: str, value: Array, width: int, *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Any accepted shape as [T, B, width].

    Raises:
        TypeError: complex values, or none that make a tensor.
        ValueError: another shape than [T, width] or [T, B, width]; [T] where `width` is 1.
    """
    if not isinstance(value, (Tensor, np.ndarray)):
        value = np.asarray(value)
    if not isinstance(value, Tensor) and not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    x = arrays.to_tensor(op, name, value)
    if x.is_complex():
        raise TypeError(f"{op}: {name} must be real, got {x.dtype}")
    x = x.to(device=device, dtype=dtype)
    if x.dim() == 1 and width == 1:
        x = x[:, None]
    if x.dim() == 2:
        x = x[:, None]
    if x.dim() != 3 or x.shape[2] != width:
        raise ValueError(
            f"{op}: {name} must be [T, {width}] or [T, B, {width}], got {tuple(np.shape(value))}"
        )
    return x


def like(given: Any, y: Tensor, flat: bool, batched: bool) -> Any:
    """`y`, [T, B, features], of the kind of what was given, without what that did not have.

    Args:
        flat: whether a single feature has no dimension.
        batched: whether the batch has one.
    """
    if not batched:
        y = y[:, 0]
    if flat and y.shape[-1] == 1:
        y = y[..., 0]
    return y if isinstance(given, Tensor) else y.detach().cpu().numpy()
