"""What a layer is: which activation, and whether calling it does more than its class says."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn import Module

from nnarch.nn import activation as ours

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
