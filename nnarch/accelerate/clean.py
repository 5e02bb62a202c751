"""Nodes that do nothing in inference."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from nnarch.accelerate.graph import argument, first_input, layer_of
from nnarch.nn.inspection import is_customized

_NO_OP_LAYERS = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
# Position of the `training` argument, by function.
_DROPOUT_FUNCTIONS = {
    F.dropout: 2,
    F.dropout1d: 2,
    F.dropout2d: 2,
    F.dropout3d: 2,
    F.alpha_dropout: 2,
    F.feature_alpha_dropout: 2,
    torch.dropout: 2,
}


def drop_inference_no_ops(graph_module: GraphModule) -> None:
    """Remove dropout and identity: their users read their input instead."""
    for node in list(graph_module.graph.nodes):
        if _is_no_op(graph_module, node) and isinstance(first_input(node), Node):
            node.replace_all_uses_with(first_input(node))
            graph_module.graph.erase_node(node)


def _is_no_op(graph_module: GraphModule, node: Node) -> bool:
    layer = layer_of(graph_module, node)
    if layer is not None:
        return type(layer) in _NO_OP_LAYERS and not is_customized(layer)
    if node.op != "call_function":
        return False
    if node.target in _DROPOUT_FUNCTIONS:  # F.dropout(x) alone drops, in eval mode too
        return argument(node, _DROPOUT_FUNCTIONS[node.target], "training", True) is False
    if getattr(node.target, "__name__", "") == "stochastic_depth":  # torchvision.ops
        return argument(node, 3, "training", True) is False
    return False
