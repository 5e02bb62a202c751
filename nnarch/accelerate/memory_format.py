"""Activations that stay channels_last from the entry of the graph to its end.

The kernels run fastest on channels_last and give their output the format of their input, so one
conversion at the entry serves the whole graph. What loses the format on the way (a permutation, a
slice of channels) is noticed here, and the next convolution gets its input converted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from nnarch import functional
from nnarch.accelerate.accelerated import channels_last
from nnarch.accelerate.activations import activation_of
from nnarch.accelerate.graph import first_input, layer_of, may_write
from nnarch.accelerate.layers import FusedBatchNorm2d, interpolate, max_pool2d_with_indices
from nnarch.accelerate.separable import SeparableConv2d
from nnarch.accelerate.trace import is_layer

# A graph that asks for strides gets the ones that its author saw.
_READS_STRIDES = {
    "stride",
    "as_strided",
    "is_contiguous",
    "storage_offset",
    "data_ptr",
    "view_as_complex",
    "view_as_real",
}
# A view in one format may be a copy in another; these are views in all.
_MAY_COPY = {
    "contiguous",
    "flatten",
    "ravel",
    "reshape",
    "reshape_as",
    "unflatten",
    "view",
    "view_as",
}
_VIEWS = {
    "chunk", "detach", "expand", "getitem", "narrow", "permute", "select", "split", "squeeze",
    "swapaxes", "t", "transpose", "unbind", "unsqueeze",
}  # fmt: skip
_KEEPING_FUNCTIONS = {
    operator.add,
    operator.iadd,
    operator.sub,
    operator.mul,
    operator.imul,
    operator.truediv,
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
    torch.cat,
    torch.concat,
}
_KEEPING_FUNCTIONS_OF_ONE = {  # besides it they read sizes, indices or statistics
    functional.max_pool2d,
    functional.avg_pool2d,
    functional.adaptive_avg_pool2d,
    functional.batch_norm,
    functional.local_response_norm,
    functional.max_unpool2d,
    max_pool2d_with_indices,
    interpolate,
}
_KEEPING_METHODS = {"add", "add_", "sub", "mul", "mul_", "div"}
_KEEPING_LAYERS = (
    FusedBatchNorm2d,
    nn.BatchNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.MaxUnpool2d,
    nn.LocalResponseNorm,
    nn.Upsample,
)
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d, SeparableConv2d)
_CONVOLUTION_FUNCTIONS = (functional.conv2d, functional.conv_transpose2d)


def keep_channels_last(graph_module: GraphModule) -> bool:
    """Make the graph right and fast for channels_last inputs.

    Returns:
        Whether inputs are to be converted; False for a graph that depends on strides, or writes
        into what is a view in one format and a copy in the other.
    """
    graph = graph_module.graph
    if any(_reads_strides(node) or _writes_by_format(graph_module, node) for node in graph.nodes):
        return False
    known: set[Node] = set()  # channels_last if they are 4-D
    for node in list(graph.nodes):
        if _is_view(graph_module, node):
            # A view of channels_last memory does not always exist.
            node.target = "reshape_as" if node.target == "view_as" else "reshape"
            node.kwargs = {"shape" if k == "size" else k: v for k, v in node.kwargs.items()}
        elif _is_opaque(graph_module, node):
            for source in node.all_input_nodes:
                _convert(node, source, contiguous)  # its code may ask for views
        elif _is_convolution(graph_module, node):
            if first_input(node) not in known:
                _convert(node, first_input(node), channels_last)
            known.add(node)
        elif _keeps_format(graph_module, node) and known.issuperset(_images(node)):
            known.add(node)
    return True


def contiguous(x: Any) -> Any:
    """A tensor in torch's default format, everything else as it is."""
    return x.contiguous() if isinstance(x, Tensor) else x


def _reads_strides(node: Node) -> bool:
    name = _name(node)
    if node.op == "call_method" and name == "view":  # as another dtype, by the last stride
        return any(isinstance(x, torch.dtype) for x in (*node.args, *node.kwargs.values()))
    return node.op in ("call_method", "call_function") and name in _READS_STRIDES


def _writes_by_format(graph_module: GraphModule, node: Node) -> bool:
    """Whether who reads what `node` writes depends on the format: ``y.flatten(1).mul_(2)`` changes
    y where that is contiguous."""
    if not may_write(graph_module, node):
        return False
    written = first_input(node)
    if isinstance(written, Node) and any(_may_copy(user) for user in _users_before(written, node)):
        return True
    while isinstance(written, Node) and (_may_copy(written) or _name(written) in _VIEWS):
        source = first_input(written)
        if _may_copy(written) and isinstance(source, Node) and len(source.users) > 1:
            return True
        written = source
    return False


def _users_before(source: Node, node: Node) -> list[Node]:
    before = source
    found = []
    while (before := before.next) is not node and before.op != "output":
        if before in source.users:
            found.append(before)
    return found


def _may_copy(node: Node) -> bool:
    return node.op in ("call_method", "call_function") and _name(node) in _MAY_COPY


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_view(graph_module: GraphModule, node: Node) -> bool:
    """Whether `node` is x.view(sizes), or x.view_as(y), that nobody writes through."""
    return (
        node.op == "call_method"
        and node.target in ("view", "view_as")
        and not any(may_write(graph_module, user) for user in node.users)
    )


def _is_opaque(graph_module: GraphModule, node: Node) -> bool:
    layer = layer_of(graph_module, node)
    return layer is not None and not is_layer(layer)


def _is_convolution(graph_module: GraphModule, node: Node) -> bool:
    layer = layer_of(graph_module, node)
    return isinstance(layer, _CONVOLUTIONS) or node.target in _CONVOLUTION_FUNCTIONS


def _keeps_format(graph_module: GraphModule, node: Node) -> bool:
    if node.op == "placeholder" or activation_of(graph_module, node) is not None:
        return True
    layer = layer_of(graph_module, node)
    if layer is not None:
        return isinstance(layer, _KEEPING_LAYERS)
    if node.op == "call_method":
        return node.target in _KEEPING_METHODS
    if node.target is operator.getitem:
        return _returns_indices(graph_module, node.args[0])
    return node.op == "call_function" and (
        node.target in _KEEPING_FUNCTIONS or node.target in _KEEPING_FUNCTIONS_OF_ONE
    )


def _images(node: Node) -> list[Any]:
    """The inputs that the format of the output follows."""
    one = node.op == "call_module" or node.target in _KEEPING_FUNCTIONS_OF_ONE
    return [first_input(node)] if one else node.all_input_nodes


def _returns_indices(graph_module: GraphModule, node: Any) -> bool:
    """Whether `node` is a pooling that returns a pair, both in the format of its input."""
    layer = layer_of(graph_module, node)
    if isinstance(layer, (nn.MaxPool2d, nn.AdaptiveMaxPool2d)):
        return bool(layer.return_indices)
    return getattr(node, "target", None) is max_pool2d_with_indices


def _convert(node: Node, source: Node, conversion: Callable[[Any], Any]) -> None:
    with node.graph.inserting_before(node):
        converted = node.graph.call_function(conversion, (source,))
    converted.meta["is_wrapped"] = True  # unpickling traces the code again, not into `conversion`
    node.replace_input_with(source, converted)
