"""The seed of a call that drops elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def draw_seed(like: Tensor) -> Tensor:
    """A fresh seed from torch's generator (torch.manual_seed decides it): int64, one element.

    A tensor and not a number, so that torch.compile and CUDA graphs draw anew at every call.
    """
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=like.device)


def check_dropout(op: str, seed: Any, p: float, like: Tensor) -> None:
    """Raise for a probability outside [0, 1], or a seed that is none."""
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: dropout_p must be between 0 and 1, got {p}")
    if seed is None:
        if p > 0:
            raise ValueError(f"{op}: seed must be given where dropout_p is above 0")
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"{op}: seed must be an int64 tensor of one element, got {seed!r}")
    if seed.device != like.device:
        raise ValueError(f"{op}: seed must be on {like.device} as x, got {seed.device}")
