"""BatchNorm folded into the weights of the layer before it.

In inference ``BN(y) = scale * y + shift`` with constants per channel, so for a linear layer before
it ``BN(W x + b) = (scale W) x + (scale b + shift)``. The folded weights are computed in float64 and
rounded once.

Source: Jacob et al., 2018, Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference, section 3.2.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.nn import Parameter
from torch.nn import functional as F

from nnarch import functional
from nnarch import nn as layers
from nnarch.accelerate.activations import activation_of
from nnarch.accelerate.graph import argument, attribute, first_input, layer_of, only_user, place
from nnarch.nn.inspection import is_customized

# The BatchNorm layers whose channels are those of a layer's output.
_NORMS_OF_RANK = {
    "1d": (nn.BatchNorm1d, layers.BatchNorm1d),
    "2d": (nn.BatchNorm2d, layers.BatchNorm2d),
    "3d": (nn.BatchNorm3d, layers.BatchNorm3d),
}
_NORMS = {
    getattr(namespace, kind + rank): norms
    for namespace in (nn, layers)
    for kind in ("Conv", "ConvTranspose")
    for rank, norms in _NORMS_OF_RANK.items()
}
_NORMS |= {nn.Linear: _NORMS_OF_RANK["1d"], layers.Linear: _NORMS_OF_RANK["1d"]}


@dataclass
class Norm:
    """The constants of a BatchNorm, all ``[C]``, that the graph calls as a function."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def fold_batch_norms(graph_module: GraphModule) -> None:
    """Fold every BatchNorm whose input is a convolution or linear layer that nobody else reads."""
    for node in list(graph_module.graph.nodes):
        producer = first_input(node)
        layer = layer_of(graph_module, producer)
        if type(layer) not in _NORMS or is_customized(layer):
            continue
        norm = _norm_of(graph_module, node, type(layer))
        if norm is None or not _can_fold(graph_module, layer, producer, norm, node):
            continue
        place(graph_module, producer, folded(layer, norm))
        node.replace_all_uses_with(producer)
        graph_module.graph.erase_node(node)


def folded(layer: Any, norm: Any) -> Any:
    """A layer that computes ``norm(layer(x))``.

    Args:
        layer: convolution or linear layer.
        norm: BatchNorm layer or :class:`Norm` over K channels, with running statistics.

    Returns:
        A layer of the class and dtype of `layer`, with parameters of its own.
    """
    scale, shift = scale_and_shift(norm)
    weight = layer.weight.double()
    bias = shift if layer.bias is None else scale * layer.bias.double() + shift
    result = copy.copy(layer)
    result.__dict__["_parameters"] = {
        "weight": _frozen(weight * _per_output(layer, scale), layer.weight),
        "bias": _frozen(bias, layer.weight),
    }
    return result


def _per_output(layer: Any, scale: Tensor) -> Tensor:
    """``scale [K]`` in the shape that multiplies the weight of `layer`."""
    weight = layer.weight
    if not getattr(layer, "transposed", False):  # [K, ...]
        return scale.view(-1, *[1] * (weight.dim() - 1))
    groups, inputs = layer.groups, weight.shape[0]  # [C, K / groups, ...]
    rows = scale.view(groups, -1).repeat_interleave(inputs // groups, 0)
    return rows.view(*weight.shape[:2], *[1] * (weight.dim() - 2))


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """What BatchNorm multiplies by and adds in inference, per channel, in float64."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift


def _frozen(values: Tensor, like: Tensor) -> Parameter:
    return Parameter(values.to(like.dtype), requires_grad=False)


def _norm_of(graph_module: GraphModule, node: Node, layer_type: type) -> Any:
    """The BatchNorm that `node` applies by constants to the output of a `layer_type`, or None."""
    norm = layer_of(graph_module, node)
    if norm is None:
        norm = _norm_of_function(graph_module, node)
    elif type(norm) not in _NORMS[layer_type] or is_customized(norm):
        return None
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return None  # without statistics it uses the batch's
    return norm


def _norm_of_function(graph_module: GraphModule, node: Node) -> Norm | None:
    if node.op != "call_function" or node.target not in (F.batch_norm, functional.batch_norm):
        return None
    names = ("running_mean", "running_var", "weight", "bias")
    nodes = [argument(node, i, name, None) for i, name in enumerate(names, start=1)]
    epilogue = {"residual", "activation"} & set(node.kwargs)
    if epilogue or argument(node, 5, "training", False) is not False:
        return None
    if any(isinstance(n, Node) and n.op != "get_attr" for n in nodes):
        return None
    values: list[Any] = [attribute(graph_module, str(n.target)) if n else None for n in nodes]
    return Norm(*values, eps=argument(node, 7, "eps", 1e-5))


def _can_fold(graph_module: GraphModule, layer: Any, producer: Node, norm: Any, node: Node) -> bool:
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if norm.running_mean.numel() != outputs or not layer.weight.is_floating_point():
        return False
    if isinstance(layer, nn.Linear) and not _is_matrix(graph_module, first_input(producer)):
        return False  # of [N, C, L] BatchNorm1d takes C as channels and Linear takes L
    return only_user(producer) is node


def _is_matrix(graph_module: GraphModule, node: object) -> bool:
    """Whether the graph shows that `node` is ``[N, features]``."""
    while isinstance(node, Node):
        if _flattens(graph_module, node):
            return True
        layer = layer_of(graph_module, node)
        keeps_rank = isinstance(layer, (nn.Linear, nn.BatchNorm1d)) or activation_of(
            graph_module, node
        )
        if not keeps_rank:
            return False
        node = first_input(node)
    return False


def _flattens(graph_module: GraphModule, node: Node) -> bool:
    layer = layer_of(graph_module, node)
    if layer is not None:
        return type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)
    if node.target in (torch.flatten, "flatten"):
        dims = argument(node, 1, "start_dim", 0), argument(node, 2, "end_dim", -1)
        return dims == (1, -1)
    if node.op == "call_method" and node.target in ("view", "reshape"):
        sizes = node.args[1:] or tuple(node.kwargs.values())
        shape = sizes[0] if sizes and isinstance(sizes[0], (tuple, list)) else sizes
        return len(shape) == 2
    return False
