"""The epilogue of conv_transpose2d: its parts alone and together, and what is not finite."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import ACTIVATIONS, compare
from torch import Tensor
from transposed_cases import Transposed

# Sums of products only: Winograd has tests and tolerances of its own (test_winograd_phases.py).
pytestmark = pytest.mark.usefixtures("highest_precision")

EPILOGUE_CASES = [
    Transposed(2, 10, 3, 4, 19, (4, 4), 2, 1),
    Transposed(1, 12, 3, 3, 34, (2, 2), 2, 0, 0, 2),
    Transposed(3, 12, 1, 1, 34, (3, 2)),
    Transposed(2, 10, 3, 4, 3, (4, 4), 2, 1),
    Transposed(1, 6, 3, 4, 6, (3, 3), 2, 1, 0, 6),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("case", EPILOGUE_CASES, ids=str)
def test_epilogue(case, activation):
    """Every subset of bias, scale, shift and residual, with and without gradients."""
    t = case.tensors(torch.float32, torch.channels_last)
    like = case.theirs(**t)
    parts = {
        "bias": t.pop("bias"),
        "scale": torch.rand(case.k) + 0.5,
        "shift": torch.randn(case.k),
        "residual": torch.randn_like(like),
    }
    grad = torch.randn_like(like)

    def ours(**tensors: Any) -> Tensor:
        return case.ours(**tensors, activation=activation)

    def theirs(**tensors: Any) -> Tensor:
        return case.theirs(**tensors, activation=activation)

    for size in range(len(parts) + 1):
        for names in itertools.combinations(parts, size):
            chosen = t | {name: parts[name] for name in names}
            compare(ours, theirs, chosen, ulps=8)
            compare(ours, theirs, chosen, grad, ulps=16)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", EPILOGUE_CASES, ids=str)
def test_nan_and_infinity_propagate(case, value):
    t = case.tensors(torch.float32, torch.contiguous_format)
    residual = torch.randn_like(case.theirs(**t))
    t["x"][0, 1, -1, 0] = value
    t["bias"][2] = value
    residual[0, -1, 0, 1] = value
    ours = case.ours(**t, residual=residual, activation="relu")
    truth = case.theirs(**t, residual=residual, activation="relu")
    assert torch.equal(ours.isnan(), truth.isnan())
    assert torch.equal(ours.isinf(), truth.isinf())
