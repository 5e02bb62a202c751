"""First and second derivatives of layer and RMS normalization."""

from __future__ import annotations

import itertools

import pytest
import torch
from layer_norm_cases import EPS, ours
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch.kernels.layer_norm import op as ops


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("rows, columns", [(5, 7), (2, 19), (1, 40), (4, 1), (5, 2), (3, 3)])
def test_gradcheck_and_gradgradcheck(rows, columns, rms, dropout_p):
    """Of the native code, in float64, the gradient that arrives for the sum included."""
    seed = torch.tensor([5]) if dropout_p else None
    x, residual = (torch.randn(rows, columns, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(columns, dtype=torch.float64) + 0.5
    bias = None if rms else torch.randn(columns, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias) if t is not None]

    def run(x, residual, weight, bias=None):
        return ops.layer_norm_train(x, weight, bias, residual, seed, columns, EPS, dropout_p, rms)[
            :2
        ]

    with nnarch.trace() as trace:
        assert gradcheck(run, leaves)
        assert gradgradcheck(run, leaves)
    assert {entry.backend for entry in trace} == {"cpu"}
    assert "layer_norm_backward_backward" in {entry.op for entry in trace}


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_gradcheck_of_the_public_functions(rms):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    run = ours(rms, (6,))
    assert gradcheck(run, (x, weight))
    assert gradgradcheck(run, (x, weight))


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients(needed):
    x, weight, bias = (
        t.requires_grad_(need)
        for t, need in zip((torch.randn(5, 9), torch.rand(9), torch.randn(9)), needed, strict=True)
    )
    wanted = [t for t in (x, weight, bias) if t.requires_grad]
    y = F.layer_norm(x, (9,), weight, bias)
    assert y.requires_grad == any(needed)
    if wanted:
        expected = torch.autograd.grad(TF.layer_norm(x, (9,), weight, bias).sum(), wanted)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), wanted), expected)


def test_the_operation_without_statistics_has_a_gradient_too():
    """A graph that was captured without gradients may be differentiated."""
    x, residual = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9, requires_grad=True)
    y = ops.layer_norm_op(x, None, None, residual, 9, EPS, False)
    mine = torch.autograd.grad(y, (x, residual), x.detach())
    theirs = torch.autograd.grad(TF.layer_norm(x + residual, (9,)), (x, residual), x.detach())
    torch.testing.assert_close(mine, theirs)


def test_per_sample_gradients():
    x, weight = torch.randn(4, 3, 8), torch.rand(8)

    def loss(norm):
        return lambda w, row: norm(row, (8,), w).square().sum()

    mine, theirs = (
        torch.func.vmap(torch.func.grad(loss(norm)), (None, 0))(weight, x)
        for norm in (F.layer_norm, TF.layer_norm)
    )
    torch.testing.assert_close(mine, theirs)
