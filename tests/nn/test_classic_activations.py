"""Activations that torch.nn does not have."""

from __future__ import annotations

import math

import pytest
import torch

import nnarch.nn as nn


def test_step_is_the_heaviside_function():
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-30, 3.0])
    assert nn.Step()(x).tolist() == [0, 0, 0, 1, 1]
    assert nn.Step(value_at_zero=0.5)(x).tolist() == [0, 0.5, 0.5, 1, 1]
    assert repr(nn.Step(1.0)) == "Step(value_at_zero=1.0)"


def test_step_lets_no_gradient_through():
    assert not nn.Step()(torch.randn(3, requires_grad=True)).requires_grad


def test_lecun_tanh():
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    expected = torch.tensor([1.7159 * math.tanh(2 * v / 3) for v in x.tolist()]).double()
    torch.testing.assert_close(nn.LeCunTanh()(x), expected, rtol=1e-6, atol=1e-6)
    # Its purpose: f(±1) = ±1, which the constants meet to five digits.
    assert abs(float(nn.LeCunTanh()(torch.ones(1))) - 1) < 1e-4


def test_maxout_takes_the_maximum_of_consecutive_features():
    x = torch.tensor([[1.0, 5.0, -2.0, -3.0, 0.0, 4.0]])
    assert nn.Maxout(2)(x).tolist() == [[5, -2, 4]]
    assert nn.Maxout(3)(x).tolist() == [[5, 4]]
    assert nn.Maxout(6, dim=-1)(x).tolist() == [[5]]
    assert nn.Maxout(1)(x).tolist() == x.tolist()


def test_maxout_over_feature_maps():
    x = torch.randn(2, 6, 3, 4)
    y = nn.Maxout(3)(x)
    assert y.shape == (2, 2, 3, 4)
    assert torch.equal(y[:, 1], x[:, 3:].max(1).values)


def test_maxout_sends_the_gradient_to_the_winner():
    x = torch.tensor([[1.0, 5.0, -2.0, -3.0]], requires_grad=True)
    nn.Maxout(2)(x).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 0]]


def test_maxout_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match=r"Maxout: pieces must be at least 1, got 0"):
        nn.Maxout(0)
    with pytest.raises(ValueError, match=r"multiple of pieces=4, got 6"):
        nn.Maxout(4)(torch.randn(1, 6))


@pytest.mark.parametrize("module", [nn.LeCunTanh(), nn.Maxout(2, dim=0)], ids=repr)
def test_gradcheck(module):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
