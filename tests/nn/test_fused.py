"""FusedConv2d and FusedLinear: epilogues in the kernel, parameters shared with their source."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

import nnarch.nn as nn

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.3),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


def make(kind, activation):
    """(fused module, its source, input)."""
    if kind == "conv":
        source = torch.nn.Conv2d(4, 6, 3, stride=2, padding=1)
        return nn.FusedConv2d(source, activation, 0.3), source, torch.randn(2, 4, 7, 8)
    source = torch.nn.Linear(7, 5, bias=False)
    return nn.FusedLinear(source, activation, 0.3), source, torch.randn(3, 7)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_outputs_and_gradients(kind, activation, with_residual):
    fused, source, x = make(kind, activation)
    residual = torch.randn_like(source(x)) if with_residual else None
    grad = torch.randn_like(source(x))
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))

    y = fused(x1, residual)
    y.backward(grad)
    gradient = source.weight.grad.clone()
    source.zero_grad()

    z = source(x2) if residual is None else source(x2) + residual
    expected = ACTIVATIONS[activation](z)
    expected.backward(grad)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, source.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_parameters_mode_and_options_are_the_sources(kind):
    for training in (True, False):
        _, source, x = make(kind, None)
        source.train(training)
        fused = (nn.FusedConv2d if kind == "conv" else nn.FusedLinear)(source, "relu")
        assert fused.training == training
        assert fused.weight is source.weight
        assert fused.bias is source.bias
        torch.testing.assert_close(fused(x), source(x).relu())
        assert "activation=relu" in repr(fused)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_copies(kind):
    fused, _, x = make(kind, "leaky_relu")
    fused.eval()
    with torch.no_grad():
        expected = fused(x)
        assert fused._packed is not None
        for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert clone._packed is None
            assert torch.equal(clone(x), expected)
            assert repr(clone) == repr(fused)


def test_non_zero_padding_modes():
    conv = torch.nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(nn.FusedConv2d(conv, "relu")(x), conv(x).relu())


def test_bad_arguments():
    with pytest.raises(TypeError, match="FusedConv2d: conv must be a Conv2d, got Linear"):
        nn.FusedConv2d(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="FusedLinear: linear must be a Linear, got Conv2d"):
        nn.FusedLinear(torch.nn.Conv2d(2, 2, 1))
    with pytest.raises(ValueError, match="FusedConv2d: activation must be one of 'relu'"):
        nn.FusedConv2d(torch.nn.Conv2d(2, 2, 1), "swish")
    with pytest.raises(ValueError, match="FusedLinear: alpha of leaky_relu must not be negative"):
        nn.FusedLinear(torch.nn.Linear(2, 2), "leaky_relu", -0.1)
