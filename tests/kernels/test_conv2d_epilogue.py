"""conv2d's epilogue: scale, shift, residual, activation; NaN and infinity through it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from conv_cases import Conv
from kernel_cases import (
    ACTIVATIONS,
    compare,
    needs_poison,
)
from torch import Tensor

# Sums of products only: Winograd has tests and tolerances of its own (test_winograd.py).
pytestmark = pytest.mark.usefixtures("highest_precision")

EPILOGUE_CASES = [
    Conv(2, 10, 5, 7, 19, padding=1),
    Conv(1, 21, 6, 5, 35, (1, 1)),
    Conv(1, 3, 9, 9, 10, padding=1, stride=2),
    Conv(1, 12, 5, 5, 18, padding=1, groups=2),
    Conv(1, 18, 7, 6, 18, padding=1, groups=18),
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
            compare(ours, theirs, chosen)
            compare(ours, theirs, chosen, grad, ulps=16)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_fused_equals_split(activation):
    """The gradient-free call fuses what a call with gradients may compute apart."""
    case = EPILOGUE_CASES[0]
    t = case.tensors(torch.float64, torch.contiguous_format)
    t |= {"scale": torch.randn(case.k).double(), "residual": torch.randn(2, 19, 5, 7).double()}
    fused = case.ours(**t, activation=activation)
    apart = case.ours(**{n: v.requires_grad_() for n, v in t.items()}, activation=activation)
    torch.testing.assert_close(fused, apart.detach(), rtol=1e-12, atol=1e-12)


PAST_THE_CACHES = [  # outputs of 9 MB, 1 MB an image
    Conv(9, 16, 64, 64, 64, (1, 1)),
    Conv(9, 3, 128, 128, 64, stride=2, padding=1),
    Conv(9, 8, 64, 64, 64, padding=1, groups=2),
    Conv(9, 12, 66, 66, 60, (1, 1)),  # rows that begin inside cache lines
]


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("case", PAST_THE_CACHES, ids=str)
def test_large_outputs(case, activation):
    """What is written past the caches is what smaller outputs get, bit for bit, and right."""
    t = case.tensors(torch.float32, torch.channels_last)
    residual = torch.randn_like(case.theirs(**t))

    def run(first: int, last: int) -> Tensor:
        images = {"x": t["x"][first:last], "residual": residual[first:last]}
        return case.ours(**(t | images), activation=activation)

    whole = run(0, case.n)
    for i in range(case.n):
        assert torch.equal(whole[i : i + 1], run(i, i + 1))
    wide = {name: v[:1].double() if name == "x" else v.double() for name, v in t.items()}
    truth = case.theirs(**wide, residual=residual[:1].double(), activation=activation)
    torch.testing.assert_close(whole[:1].double(), truth, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", EPILOGUE_CASES, ids=str)
def test_nan_and_infinity_propagate(case, value, activation):
    t = case.tensors(torch.float32, torch.contiguous_format)
    residual = torch.randn_like(case.theirs(**t))
    t["x"][0, 1, 2, 2] = value
    t["bias"][3] = value
    residual[0, -1, 0, 1] = value
    ours = case.ours(**t, residual=residual, activation=activation)
    wide = {name: v.double() for name, v in t.items()}
    truth = case.theirs(**wide, residual=residual.double(), activation=activation)
    assert not bool(torch.isfinite(case.theirs(**wide)).all())
    assert torch.equal(ours.isnan(), truth.isnan())
    assert torch.equal(ours.isinf(), truth.isinf())


@needs_poison
@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
def test_gradcheck_through_the_epilogue(activation):
    case = Conv(1, 3, 4, 4, 3, padding=1)
    t = case.tensors(torch.float64, torch.contiguous_format)
    names = [*t, "scale", "shift", "residual"]
    leaves = [
        *t.values(), torch.rand(3).double() + 0.5, torch.randn(3).double(),
        torch.randn(1, 3, 4, 4).double(),
    ]  # fmt: skip
    for leaf in leaves:
        leaf.requires_grad_()

    def function(*tensors: Tensor) -> Tensor:
        return case.ours(**dict(zip(names, tensors, strict=True)), activation=activation)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
