"""What tests of `accelerate` share: models, their comparison, and counting what a graph calls."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import nnarch


def randomize(model: nn.Module) -> nn.Module:
    """Give BatchNorm statistics and parameters that folding cannot ignore; eval mode."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, _BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def in_float64(model: nn.Module, *args: Tensor) -> Tensor:
    """The output of `model` computed in float64."""
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(*(a.double() for a in args))


def calls(accelerated: nn.Module) -> Counter[str]:
    """How often the graph calls each class of layer, function and method."""
    counter: Counter[str] = Counter()
    for node in accelerated.body.graph.nodes:
        if node.op == "call_module":
            counter[type(accelerated.body.get_submodule(node.target)).__name__] += 1
        elif node.op in ("call_function", "call_method"):
            counter[getattr(node.target, "__name__", str(node.target))] += 1
    return counter


class Model(nn.Module):
    """Some layers, and a function of the model and its input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


class ModelOfTwo(Model):
    """The same of two inputs."""

    def forward(self, x, y):
        return self.function(self, x, y)


X = torch.linspace(-1, 1, 96).sin().view(2, 3, 4, 4)


def convolution():
    return nn.Conv2d(3, 3, 3, padding=1)


def assert_same(model, *inputs, warns=None):
    """Three calls, since from the second on a program may run; on copies: models write."""
    model = model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if warns is None:
            accelerated = nnarch.accelerate(model)
        else:
            with pytest.warns(UserWarning, match=warns):
                accelerated = nnarch.accelerate(model)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for _ in range(3):
            actual, expected = (f(*(t.clone() for t in inputs)) for f in (accelerated, model))
            torch.testing.assert_close(actual, expected)
