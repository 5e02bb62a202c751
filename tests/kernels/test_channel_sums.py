"""Affine maps and channel sums against torch in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import DTYPES, FORMATS, compare, name_of, torch_epilogue
from test_normalization import SHAPES, SMALL
from torch.autograd import gradcheck, gradgradcheck

from nnarch.kernels.activation import kinds
from nnarch.kernels.normalization import op as ops


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [*SMALL, (0, 3, 2, 2), (2, 0, 3), (2, 3, 0, 4)], ids=str)
def test_affine(shape, dtype, memory_format):
    """Every subset of scale, shift and residual."""
    x = torch.randn(shape).to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=memory_format)
    parts = {"scale": torch.randn(shape[1]), "shift": torch.randn(shape[1]), "residual": x + 1}
    parts = {name: t.to(dtype) for name, t in parts.items()}
    grad = torch.randn(shape).to(dtype)

    def mine(x, scale=None, shift=None, residual=None):
        return ops.affine(x, scale, shift, residual, kinds.LEAKY_RELU, 0.1)

    def truth(x, scale=None, shift=None, residual=None):
        return torch_epilogue(x, scale, shift, residual, ("leaky_relu", 0.1), dim=1)

    for count in range(len(parts) + 1):
        for names in itertools.combinations(parts, count):
            compare(mine, truth, {"x": x} | {n: parts[n] for n in names}, grad, ulps=32)


@pytest.mark.parametrize("code", kinds.NAMES, ids=lambda code: str(kinds.NAMES[code]))
def test_affine_gradcheck(code):
    """The formulas are closed: every derivative of affine is affine or a channel sum again."""
    alpha = 0.2 if code == kinds.LEAKY_RELU else 0.0
    x, residual = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)
    scale, shift = torch.randn(2, 3, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, scale, shift, residual)]

    def function(*tensors):
        return torch.ops.nnarch.affine(*tensors, code, alpha)

    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3), (3, 0), (2, 4, 0)], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_channel_sums(shape, dtype, memory_format):
    a, b = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    if len(shape) == 4:
        a = a.contiguous(memory_format=memory_format)
    dims = [d for d in range(len(shape)) if d != 1]
    grad = torch.randn(shape[1]).to(dtype)
    compare(lambda x: ops.channel_sum(x), lambda x: x.sum(dims), {"x": a}, grad)
    compare(
        lambda a, b: ops.channel_dot(a, b), lambda a, b: (a * b).sum(dims), {"a": a, "b": b}, grad
    )


def test_channel_sums_gradcheck():
    a, b = (torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert gradcheck(ops.channel_sum, a)
    assert gradcheck(ops.channel_dot, (a, b))
    assert gradgradcheck(ops.channel_dot, (a, b))
