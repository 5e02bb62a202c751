"""Epilogue fusion: every spelling of activation and add, and what must stay unfused."""

from __future__ import annotations

import operator

import pytest
import torch
from accelerate_helpers import calls, in_float64
from torch import nn
from torch.nn import functional as F

import nnarch


class Net(nn.Module):
    """A convolution (or linear layer) and a function of its output and the input."""

    def __init__(self, tail, linear=False):
        super().__init__()
        self.layer = nn.Linear(4, 4) if linear else nn.Conv2d(4, 4, 3, padding=1)
        self.tail = tail

    def forward(self, x):
        return self.tail(self.layer(x), x)


def check(model, *args):
    """Outputs as the model's; returns what the graph calls."""
    accelerated = nnarch.accelerate(model.eval())
    x = args or (torch.randn(2, 4, 5, 6),)
    expected = in_float64(model, *x)
    torch.testing.assert_close(accelerated(*x).double(), expected, rtol=1e-5, atol=1e-5)
    return calls(accelerated)


ACTIVATIONS = {
    "F.relu": F.relu,
    "F.relu inplace": lambda y: F.relu(y, inplace=True),
    "torch.relu_": torch.relu_,
    "relu_": lambda y: y.relu_(),
    "F.relu6": F.relu6,
    "F.hardswish": F.hardswish,
    "F.hardsigmoid": F.hardsigmoid,
    "F.silu": F.silu,
    "F.gelu": F.gelu,
    "F.gelu tanh": lambda y: F.gelu(y, approximate="tanh"),
    "F.leaky_relu": lambda y: F.leaky_relu(y, 0.3),
    "F.leaky_relu default": F.leaky_relu,
    "torch.tanh": torch.tanh,
    "tanh": lambda y: y.tanh(),
    "sigmoid": lambda y: y.sigmoid(),
    "F.sigmoid": F.sigmoid,
    "nnarch silu": lambda y: nnarch.functional.activation(y, "silu"),
    "nnarch leaky_relu": lambda y: nnarch.functional.activation(y, "leaky_relu", alpha=0.2),
}


@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_functions(name, linear):
    activation = ACTIVATIONS[name]
    model = Net(lambda y, x: activation(y), linear)
    x = torch.randn(2, 3, 4) if linear else torch.randn(2, 4, 5, 6)
    assert check(model, x) == {"FusedLinear" if linear else "FusedConv2d": 1}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ReLU", {}),
        ("ReLU", {"inplace": True}),
        ("ReLU6", {}),
        ("Hardswish", {}),
        ("Hardsigmoid", {}),
        ("SiLU", {}),
        ("GELU", {}),
        ("GELU", {"approximate": "tanh"}),
        ("LeakyReLU", {"negative_slope": 0.2}),
        ("Tanh", {}),
        ("Sigmoid", {}),
    ],
)
@pytest.mark.parametrize("namespace", [torch.nn, nnarch.nn], ids=["torch.nn", "nnarch.nn"])
def test_activation_layers(name, options, namespace):
    model = nn.Sequential(namespace.Conv2d(4, 4, 3), getattr(namespace, name)(**options))
    assert check(model) == {"FusedConv2d": 1}


ADDS = {
    "y + x": lambda y, x: y + x,
    "x + y": lambda y, x: x + y,
    "iadd": operator.iadd,
    "torch.add": torch.add,
    "torch.add(x, y)": lambda y, x: torch.add(x, y),
    "other=": lambda y, x: torch.add(y, other=x),
    "add": lambda y, x: y.add(x),
    "add_": lambda y, x: y.add_(x),
}


@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
@pytest.mark.parametrize("name", ADDS)
def test_residual_adds(name, linear):
    model = Net(lambda y, x: torch.relu(ADDS[name](y, x)), linear)
    x = torch.randn(2, 3, 4) if linear else torch.randn(2, 4, 5, 6)
    assert check(model, x) == {"ResidualLinear" if linear else "ResidualConv2d": 1}


@pytest.mark.parametrize(
    "tail",
    [
        lambda y, x: torch.add(y, x, alpha=2),
        lambda y, x: y + 1,
        lambda y, x: y + y,
        lambda y, x: (y + x) * y,
        lambda y, x: (x * 1).add_(y) + x,
        lambda y, x: F.leaky_relu(y, -0.5) + x,
        lambda y, x: torch.relu(y) * y,
    ],
    ids=[
        "alpha",
        "number",
        "itself",
        "read again",
        "into the input",
        "negative slope",
        "two users",
    ],
)
def test_stays_unfused(tail):
    counts = check(Net(tail))
    assert counts["Conv2d"] == 1
    assert not {"ResidualConv2d", "FusedConv2d"} & set(counts)


def test_activation_before_the_add():
    assert check(Net(lambda y, x: torch.relu(y) + x)) == {"FusedConv2d": 1, "add": 1}


@pytest.mark.parametrize(
    "residual",
    [
        lambda x: x.mean((2, 3), keepdim=True),
        lambda x: x[:1],
        lambda x: x.unsqueeze(0),
        lambda x: x.double(),
        lambda x: x.shape[0],
    ],
    ids=["spatial", "batch", "more dimensions", "dtype", "a number"],
)
@pytest.mark.parametrize("linear", [False, True], ids=["conv", "linear"])
def test_addends_that_no_kernel_takes(residual, linear):
    model = Net(lambda y, x: torch.relu(y + residual(x)), linear).eval()
    x = torch.randn(2, 4, 4, 4)
    accelerated = nnarch.accelerate(model)
    got, expected = accelerated(x), model(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_bad_input_is_reported_as_such():
    accelerated = nnarch.accelerate(Net(lambda y, x: y + x))
    with pytest.raises((ValueError, TypeError), match="conv2d"):
        accelerated(torch.randn(2, 5, 6, 6))


class TwoBranches(nn.Module):
    """The ResNet block: the add is far from its first branch."""

    def __init__(self, writes):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.second = nn.Conv2d(4, 4, 1)
        self.writes = writes

    def forward(self, x):
        x = x * 1
        y = self.first(x)
        z = x.mul_(2) if self.writes else x * 2
        return y + torch.relu(self.second(z)) + z


@pytest.mark.parametrize("writes", [False, True])
def test_a_layer_does_not_move_past_a_write(writes):
    counts = check(TwoBranches(writes).eval())
    assert counts["ResidualConv2d"] == (0 if writes else 1)


class BothBranches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.first(x)
        y += self.second(x)
        return y.relu_()


def test_two_convolutions_added():
    assert check(BothBranches()) == {"ResidualConv2d": 1, "Conv2d": 1}


class SharedLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.relu(self.conv(x)) * 2) + self.conv.weight.mean()


def test_a_shared_layer_keeps_its_other_uses():
    model = SharedLayer()
    counts = check(model)
    assert counts["FusedConv2d"] == 1 and counts["Conv2d"] == 1
    layers = [m for m in nnarch.accelerate(model).modules() if isinstance(m, nn.Conv2d)]
    assert len(layers) == 2 and layers[0].weight is layers[1].weight


def test_batch_norm_takes_an_activation():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 1))
    assert check(model) == {"FusedBatchNorm2d": 1, "Conv2d": 1}
