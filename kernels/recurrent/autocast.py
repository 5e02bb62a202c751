"""What torch.autocast makes of recurrent operations: all tensors in one dtype, torch's result's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import library

from . import kinds

is_on = torch._C._is_any_autocast_enabled

CELLS = (kinds.LSTM, kinds.GRU)
"""Cells that come out in the dtype of their state on the CPU: torch casts their products alone."""
LAYERS = (kinds.GRU,)
"""Layers likewise. The others come out in autocast's dtype, and so do all on a GPU."""


def cast(
    kind: int, keeps_state: tuple[int, ...], x: Tensor, h: Tensor | None, *others: Tensor | None
) -> tuple[Any, ...]:
    """The input, the state (None is zeros like the input) and the other tensors, as they compute.

    Args:
        kind: of the cell or layer.
        keeps_state: those whose result has the dtype of their state on the CPU.
        x, h, others: what may be cast; float64 is not.
    """
    tensors = (x, h, *others)
    device = x.device.type
    if not library.autocasts(device) or x.dtype == torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and kind in keeps_state:
        dtype = (x if h is None else h).dtype
    return tuple(None if t is None else t.to(dtype) for t in tensors)
