"""Activations and residual adds moved into the epilogue of the layer that computes their input.

The epilogue computes ``activation(layer(x) + residual)``, so an add can follow a layer without
activation, and an activation can follow a layer or its add.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from nnarch import nn as layers
from nnarch.accelerate.activations import activation_of
from nnarch.accelerate.graph import (
    argument,
    first_input,
    layer_of,
    only_user,
    place,
    writes_between,
)
from nnarch.accelerate.layers import (
    FusedBatchNorm2d,
    ResidualConv1d,
    ResidualConv2d,
    ResidualConvTranspose2d,
    ResidualLinear,
)
from nnarch.accelerate.swap import has_kernel_dtype
from nnarch.nn.inspection import is_customized

# Layers by their name, with what they become when they take over an activation, and an add.
_EPILOGUES = (
    ("Conv1d", layers.FusedConv1d, ResidualConv1d),
    ("Conv2d", layers.FusedConv2d, ResidualConv2d),
    ("ConvTranspose1d", layers.FusedConvTranspose1d, None),
    ("ConvTranspose2d", layers.FusedConvTranspose2d, ResidualConvTranspose2d),
    ("Linear", layers.FusedLinear, ResidualLinear),
    ("BatchNorm2d", FusedBatchNorm2d, None),
)
_FUSED: dict[type, tuple[Any, Any]] = {}
for _name, _with_activation, _with_residual in _EPILOGUES:
    for _layer in (getattr(nn, _name), getattr(layers, _name), _with_activation):
        _FUSED[_layer] = (_with_activation, _with_residual)
    if _with_residual is not None:
        _FUSED[_with_residual] = (_with_residual, _with_residual)


def fuse_epilogues(graph_module: GraphModule) -> None:
    """Fuse activations, then adds, then the activations behind these adds."""
    _fuse_activations(graph_module)
    constants = _constants(graph_module)
    for node in list(graph_module.graph.nodes):
        _fuse_add(graph_module, node, constants)
    _fuse_activations(graph_module)


def _fuse_activations(graph_module: GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        activation = activation_of(graph_module, node)
        producer = first_input(node)
        if activation is None or not _has_free_epilogue(graph_module, producer):
            continue
        if only_user(producer) is not node:
            continue
        layer = layer_of(graph_module, producer)
        fused, _ = _FUSED[type(layer)]
        together = fused(layer, *activation).eval()
        if getattr(layer, "adds_in_place", False):
            together.adds_in_place = True
        place(graph_module, producer, together)
        node.replace_all_uses_with(producer)
        graph_module.graph.erase_node(node)


def _has_free_epilogue(graph_module: GraphModule, node: object) -> bool:
    """Whether `node` calls a layer that can take over an activation."""
    layer = layer_of(graph_module, node)
    return (
        layer is not None
        and type(layer) in _FUSED
        and getattr(layer, "activation", None) is None
        and not is_customized(layer)
        and has_kernel_dtype(layer)
        and getattr(layer, "running_mean", layer) is not None  # BatchNorm by the batch's statistics
    )


def _fuse_add(graph_module: GraphModule, node: Node, constants: set[Node]) -> None:
    producer, residual = _producer_and_residual(graph_module, node)
    if producer is None or not isinstance(residual, Node) or residual in constants:
        return  # the addend is a number, or made of parameters, and broadcasts
    layer, adds_in_place = layer_of(graph_module, producer), bool(_adds_in_place(node))
    _, with_residual = _FUSED[type(layer)]
    graph = graph_module.graph
    with graph.inserting_before(node):  # where both operands are known
        call = graph.call_module(str(producer.target), (first_input(producer), residual))
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    graph.erase_node(producer)
    together = with_residual(layer).eval()
    together.adds_in_place = adds_in_place
    place(graph_module, call, together)


def _producer_and_residual(
    graph_module: GraphModule, node: Node
) -> tuple[Node | None, Node | None]:
    """The operand of the add `node` whose layer can take it over, and the other operand."""
    inplace = _adds_in_place(node)
    if inplace is None or node.kwargs.get("alpha", 1) != 1 or "out" in node.kwargs:
        return None, None
    first, second = first_input(node), argument(node, 1, "other", None)
    if first is second:
        return None, None
    # An add in place writes into its first operand, which others may read: the layer behind the
    # second operand must not take it over.
    takes_second = not inplace and _can_take_add(graph_module, second, node)
    takes_first = _can_take_add(graph_module, first, node)
    if takes_first and takes_second:
        takes_first = not _comes_before(first, second)  # the later one has the shorter way
    if takes_first:
        return first, second
    return (second, first) if takes_second else (None, None)


def _adds_in_place(node: Node) -> bool | None:
    """Whether the add `node` writes into its first operand; None where it is no add."""
    if node.op == "call_function" and node.target in (torch.add, operator.add, operator.iadd):
        return node.target is operator.iadd
    if node.op == "call_method" and node.target in ("add", "__add__", "add_", "__iadd__"):
        return node.target in ("add_", "__iadd__")
    return None


def _constants(graph_module: GraphModule) -> set[Node]:
    """The nodes that depend on parameters only."""
    constants: set[Node] = set()
    for node in graph_module.graph.nodes:
        sources = node.all_input_nodes
        if constants.issuperset(sources) if sources else node.op == "get_attr":
            constants.add(node)
    return constants


def _comes_before(a: Node, b: Node) -> bool:
    while a is not b and a.op != "output":
        a = a.next
    return a is b


def _can_take_add(graph_module: GraphModule, producer: object, add: Node) -> bool:
    if not isinstance(producer, Node) or not _has_free_epilogue(graph_module, producer):
        return False
    _, with_residual = _FUSED[type(layer_of(graph_module, producer))]
    # A residual, or the size that a transposed convolution is to have.
    has_more = len(producer.args) > 1 or not {"input"}.issuperset(producer.kwargs)
    if with_residual is None or has_more or list(producer.users) != [add]:
        return False
    # The layer moves to the add: nothing on the way may write what it reads.
    return not writes_between(graph_module, producer, add)
