"""BatchNorm and the activation behind it as one operation, in models of single layers.

A pass over memory each way less, and no copy of the normalised values: what `nnarch.accelerate`
does for trained models, while a model trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module
from torch.nn.modules.module import _has_any_global_hook

from nnarch.kernels.activation import kinds
from nnarch.nn import activation as ours
from nnarch.nn.normalization import BatchNorm1d, BatchNorm2d, BatchNorm3d

_NAMES = {
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "Hardswish": "hardswish",
    "Hardsigmoid": "hardsigmoid",
    "SiLU": "silu",
    "GELU": "gelu",
    "Tanh": "tanh",
    "Sigmoid": "sigmoid",
}
_NAME_OF: dict[type, str] = {
    getattr(namespace, layer): name
    for namespace in (torch.nn, ours)
    for layer, name in _NAMES.items()
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


def is_customized(module: Module) -> bool:
    """Whether calling `module` does more than its class says.

    Hooks do (those of pruning, weight_norm or a profiler), a forward method of its own, and a class
    that says what a call is.
    """
    own = module.__dict__
    return bool(
        "forward" in own
        or own.get("_forward_hooks")
        or own.get("_forward_pre_hooks")
        or own.get("_backward_hooks")
        or own.get("_backward_pre_hooks")
        or (type(module).__call__ is not Module.__call__ and not isinstance(module, GraphModule))
    )


def activation_of(layer: Module) -> tuple[str, float] | None:
    """The activation that `layer` is, by its name in nnarch.functional and its alpha, or None."""
    name = _NAME_OF.get(type(layer))
    if name is None or is_customized(layer):
        return None
    if name == "leaky_relu":
        return leaky_relu(layer.negative_slope)
    if name == "gelu":
        return gelu(layer.approximate)
    return name, 0.0


def leaky_relu(slope: Any) -> tuple[str, float] | None:
    """Leaky ReLU. A slope may be a value of a traced graph; a negative one has no fused form."""
    return ("leaky_relu", slope) if isinstance(slope, (int, float)) and slope >= 0 else None


def gelu(approximate: Any) -> tuple[str, float] | None:
    """GELU by torch's name of its formula."""
    name = _GELUS.get(approximate)
    return None if name is None else (name, 0.0)


def joins(layer: Module, activation: Module, input: Any) -> kinds.Activation:
    """What `layer` takes as ``activation=`` to be ``activation(layer(input))``; None: it does not.

    Hooks see a layer's own output, and tracers and compilers write down single layers.
    """
    if type(layer) not in _BATCH_NORMS or not isinstance(input, Tensor):  # a proxy of torch.fx
        return None
    if torch.compiler.is_compiling() or _has_any_global_hook() or is_customized(layer):
        return None
    known = activation_of(activation)
    if known is None or kinds.CODES[known[0]] not in kinds.INVERTIBLE:
        return None
    return known if known[0] == "leaky_relu" else known[0]


def activated(
    layer: Module, activation: Module, input: Tensor, residual: Tensor | None = None
) -> Tensor:
    """``activation(layer(input) + residual)``, for models that take any layer namespace.

    Args:
        layer: one operation with what follows if it is one of nnarch's BatchNorms.
        activation: an activation layer.
        input: of `layer`.
        residual: added before the activation, shape of the output.
    """
    joined = joins(layer, activation, input)
    if joined is not None:
        return layer(input, residual=residual, activation=joined)
    y = layer(input)
    if residual is not None:
        y += residual
    return activation(y)


class Sequential(torch.nn.Sequential):
    """torch.nn.Sequential that runs a BatchNorm and the activation behind it as one operation.

    A subclass for the sake of speed alone: children, names, state_dict, slices, hooks and results
    are those of torch.nn.Sequential.
    """

    def forward(self, input: Any) -> Any:
        """The last layer's output, each layer's input being the output of the one before."""
        layers = iter(self._modules.values())
        layer = next(layers, None)
        while layer is not None:
            following = next(layers, None)
            joined = None if following is None else joins(layer, following, input)
            if joined is None:
                input, layer = layer(input), following
            else:
                input, layer = layer(input, activation=joined), next(layers, None)
        return input
