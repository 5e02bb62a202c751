"""What the tests of `accelerate` share: trained-looking models, and counting what a graph calls."""

from __future__ import annotations

import copy
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


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
