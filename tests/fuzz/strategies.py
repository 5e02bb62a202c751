"""What the fuzz tests draw: sizes, strides, and tensors under odd views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from kernel_cases import VIEWS, small_integers
from torch import Tensor

# The same examples in every run, none kept on disk, none timed.
fuzz = settings(
    max_examples=200,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

dtypes = st.sampled_from([torch.float32, torch.float64])
views: st.SearchStrategy[Callable[[Tensor], Tensor]] = st.sampled_from(
    [lambda t: t, lambda t: _channels_last(t), *VIEWS.values()]
)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def pairs(low: int, high: int) -> st.SearchStrategy[int | tuple[int, int]]:
    """One number, or two."""
    number = st.integers(low, high)
    return number | st.tuples(number, number)


@st.composite
def integers_in(draw: Any, *size: int, dtype: torch.dtype, like_view: bool = True) -> Tensor:
    """Small integers, whose products torch and nnarch sum without rounding, under some view."""
    torch.manual_seed(draw(st.integers(0, 99)))
    t = small_integers(torch.empty(size, dtype=dtype))
    return draw(views)(t) if like_view else t


@st.composite
def reals_in(draw: Any, *size: int) -> Tensor:
    """Random float64 numbers under some view that keeps them apart."""
    torch.manual_seed(draw(st.integers(0, 99)))
    strange = draw(st.sampled_from(["none", "sliced", "misaligned", "transposed", "border"]))
    t = torch.randn(size, dtype=torch.float64)
    return VIEWS[strange](t) if strange != "none" else _channels_last(t)
