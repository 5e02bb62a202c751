"""Depthwise convolutions joined with the 1×1 convolutions around them.

What a MobileNet block computes between its expansion and its projection is six times as large as
its input and output. Joined, it stays in the second-level cache: see
kernels/depthwise_separable/README.md.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nnarch import nn as layers
from nnarch.accelerate.graph import first_input, layer_of, only_user, place, writes_between
from nnarch.accelerate.layers import ResidualConv2d
from nnarch.accelerate.swap import has_kernel_dtype
from nnarch.kernels.activation import kinds
from nnarch.kernels.depthwise_separable.op import inverted_residual_op, separable_op
from nnarch.nn.conv import tile_after
from nnarch.nn.inspection import is_customized

_CONVOLUTIONS = (nn.Conv2d, layers.Conv2d, layers.FusedConv2d, ResidualConv2d)


class SeparableConv2d(nn.Module):
    """``project(depthwise(expand(x))) + residual`` in one kernel, each layer with its activation.

    Args:
        expand: a 1×1 convolution, or None.
        depthwise: a convolution with one input channel a group.
        project: a 1×1 convolution.
    """

    def __init__(
        self, expand: layers.FusedConv2d | None, depthwise: layers.FusedConv2d, project: Any
    ) -> None:
        super().__init__()
        self.expand = expand
        self.depthwise = depthwise
        self.project = project
        pads = depthwise.padding
        self._geometry = (depthwise.stride, (*pads, *pads), depthwise.dilation)
        convolutions = [c for c in (expand, depthwise, project) if c is not None]
        self._codes = [v for c in convolutions for v in kinds.encode(c._epilogue)]

    def forward(self, input: Tensor, residual: Any = None) -> Tensor:
        """Convolve ``input [N, C, H, W]``, add `residual`, activate."""
        wanted = any(getattr(t, "requires_grad", False) for t in (input, residual))
        if torch.is_grad_enabled() and wanted:
            return self._apart(input, residual)  # also the derivative of the activations
        try:
            return self._joined(input, residual)
        except (TypeError, ValueError):  # a residual that broadcasts, an unbatched input; or apart
            # the layers say which of them refuses, and why
            return self._apart(input, residual)

    def _joined(self, x: Tensor, residual: Any) -> Tensor:
        depthwise, project, expand = self.depthwise, self.project, self.expand
        dw, pw = depthwise.weight, project.weight
        of_project = functools.partial(tile_after, depthwise)  # an expansion keeps the size
        packed = depthwise._packed_weight(dw, x), project._packed_weight(pw, x, of_project)
        if expand is None:
            return separable_op(
                x, dw, pw, None, depthwise.bias, None, project.bias, residual, *packed,
                *self._geometry, *self._codes,
            )  # fmt: skip
        ew = expand.weight
        return inverted_residual_op(
            x, ew, dw, pw, expand.bias, depthwise.bias, project.bias, residual,
            expand._packed_weight(ew, x, _plainly), *packed, *self._geometry, *self._codes,
        )  # fmt: skip

    def _apart(self, x: Tensor, residual: Any) -> Tensor:
        if self.expand is not None:
            x = self.expand(x)
        return self.project(self.depthwise(x), residual)


def _plainly(weight: Tensor, x: Any) -> int:
    """The layout of an expansion: its few input channels gain nothing from another."""
    return 0


def join_separable_convolutions(graph_module: GraphModule) -> None:
    """Join every depthwise convolution with the 1×1 convolution after it, and the one before."""
    for node in list(graph_module.graph.nodes):
        project = _convolution(graph_module, node)
        if project is None or not _is_pointwise(project):
            continue
        middle = _only_producer(graph_module, node)
        depthwise = _convolution(graph_module, middle)
        if depthwise is None or not _is_depthwise(depthwise) or len(middle.args) > 1:
            continue
        first = _only_producer(graph_module, middle)
        expand = _convolution(graph_module, first)
        if expand is None or not _is_pointwise(expand) or len(first.args) > 1:
            first = expand = None
        # The first of them moves to the last: nothing on the way may write what it reads.
        if writes_between(graph_module, first or middle, node):
            continue
        _join(graph_module, node, middle, first, (expand, depthwise, project))


def _join(graph_module: GraphModule, node: Node, middle: Node, first: Node | None, found) -> None:
    expand, depthwise, project = found
    source = first_input(middle if first is None else first)
    node.args = (source, *node.args[1:])
    expand = None if expand is None else _fused(expand, layers.FusedConv2d)
    joined = SeparableConv2d(
        expand, _fused(depthwise, layers.FusedConv2d), _fused(project, ResidualConv2d)
    )
    place(graph_module, node, joined.eval())
    graph_module.graph.erase_node(middle)
    if first is not None:
        graph_module.graph.erase_node(first)


def _fused(layer: Any, kind: Any) -> Any:
    if isinstance(layer, kind):
        return layer
    activation = getattr(layer, "activation", None)
    return kind(layer, activation, getattr(layer, "alpha", 0.0)).eval()


def _only_producer(graph_module: GraphModule, node: Any) -> Any:
    """The node whose values `node` reads and nobody else."""
    producer = first_input(node)
    if not isinstance(producer, Node) or only_user(producer) is not node:
        return None
    return producer if list(producer.users) == [node] else None


def _convolution(graph_module: GraphModule, node: Any) -> Any:
    layer = layer_of(graph_module, node)
    if type(layer) not in _CONVOLUTIONS or node.kwargs:
        return None
    plain = layer.padding_mode == "zeros" and isinstance(layer.padding, tuple)
    return layer if plain and not is_customized(layer) and has_kernel_dtype(layer) else None


def _is_pointwise(layer: Any) -> bool:
    return (
        layer.kernel_size == layer.stride == layer.dilation == (1, 1)
        and layer.padding == (0, 0)
        and layer.groups == 1
    )


def _is_depthwise(layer: Any) -> bool:
    return layer.groups == layer.in_channels > 1
