"""What every pass asks of a graph: the layer behind a node, its input, its only user."""

from __future__ import annotations

import operator
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from nnarch.accelerate.trace import is_layer

# Reading these of a tensor says nothing about its values.
_METADATA_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
_METADATA_METHODS = {"size", "dim", "ndimension", "numel"}

_INPLACE_OPERATORS = {
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
    operator.setitem,
    operator.delitem,
}


def layer_of(graph_module: GraphModule, node: Any) -> Any:
    """The layer that `node` calls (an nn.Module), or None."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    return graph_module.get_submodule(str(node.target))


def attribute(graph_module: GraphModule, target: str) -> Any:
    """The parameter, buffer or other attribute with the qualified name `target`."""
    owner, _, name = target.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


def first_input(node: Node) -> Any:
    """What a layer, function or method is applied to."""
    return node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))


def argument(node: Node, position: int, name: str, default: Any) -> Any:
    """An argument that may be given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def only_user(node: Node) -> Node | None:
    """The one node that reads the values of `node`, or None when there are more or none.

    Nodes that read only its shape or dtype do not count: these stay the same under every rewrite
    that keeps `node` at its place.
    """
    users = [user for user in node.users if not reads_metadata(user)]
    return users[0] if len(users) == 1 else None


def reads_metadata(node: Node) -> bool:
    """Whether `node` reads the shape, dtype or device of its input and nothing else."""
    if node.op == "call_method":
        return node.target in _METADATA_METHODS
    return (
        node.op == "call_function"
        and node.target is getattr
        and node.args[1] in _METADATA_ATTRIBUTES
    )


def may_write(graph_module: GraphModule, node: Node) -> bool:
    """Whether `node` may overwrite one of its inputs."""
    if node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    if node.op == "call_module":
        layer = layer_of(graph_module, node)
        return not is_layer(layer) or bool(getattr(layer, "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        # Positional inplace=True, as in F.relu(x, True).
        return (
            node.target in _INPLACE_OPERATORS
            or name.endswith("_")
            or any(a is True for a in node.args)
        )
    return False


def writes_between(graph_module: GraphModule, first: Node, last: Node) -> bool:
    """Whether a node after `first` and before `last` may overwrite something."""
    between = first.next
    while between is not last:
        if may_write(graph_module, between):
            return True
        between = between.next
    return False


def place(graph_module: GraphModule, node: Node, layer: nn.Module) -> None:
    """Let `node` call `layer`, without a change for anyone else who uses its present layer."""
    target = str(node.target)
    if _has_other_users(graph_module, node, target):
        target = _free_name(graph_module, target.replace(".", "_"))
    graph_module.add_submodule(target, layer)
    node.target = target


def _has_other_users(graph_module: GraphModule, node: Node, target: str) -> bool:
    for other in graph_module.graph.nodes:
        if other is node or other.op not in ("call_module", "get_attr"):
            continue
        name = str(other.target)
        # Called twice, read as an attribute, or part of a module that is called as a whole.
        if name == target or name.startswith(target + ".") or target.startswith(name + "."):
            return True
    return False


def _free_name(graph_module: GraphModule, stem: str) -> str:
    index = 1
    while hasattr(graph_module, f"{stem}_{index}"):
        index += 1
    return f"{stem}_{index}"
