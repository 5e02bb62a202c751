"""BatchNorm and the activation behind it as one operation, in models of single layers.

Two passes over memory less forward and one less backward, while a model trains; for trained models
`nnarch.accelerate` does more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import _has_any_global_hook

from nnarch.kernels.activation import kinds
from nnarch.nn import activation as ours
from nnarch.nn.inspection import activation_of, is_customized
from nnarch.nn.normalization import BatchNorm1d, BatchNorm2d, BatchNorm3d

_BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


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
