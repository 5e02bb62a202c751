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


def joined_activation(layer: Module, activation: Module, input: Any) -> kinds.Activation:
    """What `layer` takes as ``activation=`` to be ``activation(layer(input))``; None: stay apart.

    Hooks see a layer's own output, and tracers and compilers write down single layers.
    """
    if type(layer) not in _BATCH_NORMS or not isinstance(input, Tensor):  # a proxy of torch.fx
        return None
    if torch.compiler.is_compiling() or _has_any_global_hook() or is_customized(layer):
        return None
    known = activation_of(activation)
    if known is None or (torch.is_grad_enabled() and not _keeps_output(activation, known[0])):
        return None
    return known if known[0] == "leaky_relu" else known[0]


def _keeps_output(activation: Module, name: str) -> bool:
    """Whether `activation` alone would keep its output for its gradient, as the joined form does.

    The output of one that keeps its input may be written in place.
    """
    code = kinds.CODES[name]
    if code not in kinds.INVERTIBLE:
        return False
    torch_does = name in ("relu", "tanh", "sigmoid") or getattr(activation, "inplace", False)
    return torch_does or (
        code in kinds.KEEPS_OUTPUT and type(activation).__module__ == ours.__name__
    )


def activated(
    layer: Module, activation: Module, input: Tensor, residual: Tensor | None = None
) -> Tensor:
    """``activation(layer(input) + residual)``, for models that take any layer namespace.

    Args:
        layer: one operation with what follows if it is one of nnarch's BatchNorms.
        activation: an activation layer.
        input: of `layer`.
        residual: added before the activation; broadcast and converted as by ``+=``.
    """
    joined = joined_activation(layer, activation, input)
    fits = joined is not None and (
        residual is None or (residual.shape == input.shape and residual.dtype == input.dtype)
    )
    if fits:
        return layer(input, residual=residual, activation=joined)
    y = layer(input)
    if residual is not None:
        y += residual
    return activation(y)


class Sequential(torch.nn.Sequential):
    """torch.nn.Sequential that runs a BatchNorm and the activation behind it as one operation.

    A subclass for the sake of speed alone: children, names, state_dict, slices and hooks are those
    of torch.nn.Sequential. Where a gradient is wanted, an activation is joined that keeps its
    output: ReLU, Tanh, Sigmoid, our ReLU6 and Hardsigmoid, and whatever is in place.
    """

    # TorchScript would read annotations as the types that every layer takes.
    def forward(self, input):
        """The last layer's output, each layer's input being the output of the one before."""
        if torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
            for layer in self:
                input = layer(input)
            return input
        return self._joined(input)

    @torch.jit.unused
    def _joined(self, input: Any) -> Any:
        layers = list(self)
        at = 0
        while at < len(layers):
            layer, following = layers[at], layers[at + 1] if at + 1 < len(layers) else None
            joined = None if following is None else joined_activation(layer, following, input)
            if joined is None:
                input, at = layer(input), at + 1
            else:
                input, at = layer(input, activation=joined), at + 2
        return input

    def __add__(self, other: Any) -> Sequential:
        """The layers of both."""
        return Sequential(*super().__add__(other))

    def __mul__(self, other: int) -> Sequential:
        """The same layers so many times."""
        return Sequential(*super().__mul__(other))
