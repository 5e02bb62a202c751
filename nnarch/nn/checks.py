"""Argument checks that several module families share."""

from __future__ import annotations

import torch

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_dtype(module: str, dtype: torch.dtype) -> None:
    """Raise ValueError at construction for parameters that no kernel takes."""
    if dtype not in _KERNEL_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _KERNEL_DTYPES)
        raise ValueError(f"{module}: dtype must be one of {names}, got {dtype}")
