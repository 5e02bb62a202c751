"""Activations as models write them (layer, function, method; in place or not) and their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from nnarch import functional
from nnarch.accelerate.graph import argument, layer_of
from nnarch.nn.inspection import activation_of as activation_of_layer
from nnarch.nn.inspection import gelu, leaky_relu

Activation = tuple[str, float]  # name in nnarch.functional, alpha

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
        return activation_of_layer(layer)
    if "out" in node.kwargs:
        return None
    if node.op == "call_function":
        return _of_function(node)
    if node.op == "call_method" and node.target in _METHOD_NAMES:
        return _METHOD_NAMES[str(node.target)], 0.0
    return None


def _of_function(node: Node) -> Activation | None:
    if node.target is functional.activation:
        name, slope = argument(node, 1, "kind", None), node.kwargs.get("alpha")
        if name == "leaky_relu":
            return leaky_relu(_LEAKY_RELU_SLOPE if slope is None else slope)
        return (name, 0.0) if isinstance(name, str) else None
    name = _FUNCTION_NAMES.get(node.target)  # type: ignore[arg-type]
    if name == "leaky_relu":
        return leaky_relu(argument(node, 1, "negative_slope", _LEAKY_RELU_SLOPE))
    if name == "gelu":
        return gelu(argument(node, 1, "approximate", "none"))
    return None if name is None else (name, 0.0)
