"""Activations as models write them (layer, function, method; in place or not) and their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from nnarch import functional
from nnarch import nn as layers
from nnarch.accelerate.graph import argument, layer_of
from nnarch.accelerate.trace import is_customized

Activation = tuple[str, float]  # name in nnarch.functional, alpha

_LAYERS = {
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
_LAYER_NAMES: dict[type, str] = {
    getattr(namespace, layer): name for namespace in (nn, layers) for layer, name in _LAYERS.items()
}
_FUNCTION_NAMES: dict[Callable[..., Any], str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.hardswish: "hardswish",
    F.hardsigmoid: "hardsigmoid",
    F.silu: "silu",
    F.gelu: "gelu",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
}
_METHOD_NAMES = {
    "relu": "relu",
    "relu_": "relu",
    "tanh": "tanh",
    "tanh_": "tanh",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
}
_LEAKY_RELU_SLOPE = 0.01


def activation_of(graph_module: GraphModule, node: Node) -> Activation | None:
    """The activation that `node` applies to its first input, or None."""
    layer = layer_of(graph_module, node)
    if layer is not None:
        return _of_layer(layer)
    if "out" in node.kwargs:
        return None
    if node.op == "call_function":
        return _of_function(node)
    if node.op == "call_method" and node.target in _METHOD_NAMES:
        return _METHOD_NAMES[str(node.target)], 0.0
    return None


def _of_layer(layer: nn.Module) -> Activation | None:
    name = _LAYER_NAMES.get(type(layer))
    if name is None or is_customized(layer):
        return None
    if name == "leaky_relu":
        return _leaky_relu(layer.negative_slope)
    if name == "gelu":
        return _gelu(layer.approximate)
    return name, 0.0


def _of_function(node: Node) -> Activation | None:
    if node.target is functional.activation:
        name, slope = argument(node, 1, "kind", None), node.kwargs.get("alpha")
        if name == "leaky_relu":
            return _leaky_relu(_LEAKY_RELU_SLOPE if slope is None else slope)
        return (name, 0.0) if isinstance(name, str) else None
    name = _FUNCTION_NAMES.get(node.target)  # type: ignore[arg-type]
    if name == "leaky_relu":
        return _leaky_relu(argument(node, 1, "negative_slope", _LEAKY_RELU_SLOPE))
    if name == "gelu":
        return _gelu(argument(node, 1, "approximate", "none"))
    return None if name is None else (name, 0.0)


def _leaky_relu(slope: Any) -> Activation | None:
    # A slope may be a value of the graph; a negative one has no fused form.
    return ("leaky_relu", slope) if isinstance(slope, (int, float)) and slope >= 0 else None


def _gelu(approximate: Any) -> Activation | None:
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return None if name is None else (name, 0.0)
