"""What a forward pass does besides computing: it keeps something, draws random numbers, writes.

A graph repeats what was done with proxies. What was done with a model's own tensors and attributes
while it was traced would have happened once, for all calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

# Python's operators that write into their first operand.
IN_PLACE = {
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
    "ilshift", "irshift",
}  # fmt: skip
_LOGICAL = {"and_", "or_", "not_", "is_"}  # other operators, whose names end like in-place methods
_MODULES_OWN = frozenset(vars(nn.Module()))
_RANDOM = {
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli,
    torch.multinomial, torch.rand_like, torch.randn_like, torch.randint_like,
}  # fmt: skip


class Watch(TorchFunctionMode):
    """Random numbers go into the graph; writes into parameters and buffers raise.

    Args:
        root: the model that is traced.
        tracer: what traces it.
    """

    def __init__(self, root: nn.Module, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer
        self._owned = {_address(t) for t in (*root.parameters(), *root.buffers())} - {0}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, Proxy) for leaf in _pytree.tree_leaves((args, kwargs))):
            if func in _RANDOM:
                return self._tracer.create_proxy("call_function", func, args, kwargs)
            written = args[0] if args and _writes(func) else kwargs.get("out")
            if isinstance(written, Tensor) and _address(written) in self._owned:
                raise TraceError("it changes a parameter or buffer")
        return func(*args, **kwargs)


def _writes(function: Any) -> bool:
    """Whether a function or method writes into its first argument, by its name."""
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    if name.strip("_") in IN_PLACE or name.strip("_") == "setitem":
        return True
    return name.endswith("_") and not name.endswith("__") and name not in _LOGICAL


def _address(t: Tensor) -> int:
    return 0 if t.is_meta else t.untyped_storage().data_ptr()


def attributes(root: nn.Module) -> dict[str, dict[str, Any]]:
    """What every module keeps: its own attributes and buffers."""
    return {
        name: {k: v for k, v in vars(module).items() if k not in _MODULES_OWN} | module._buffers
        for name, module in root.named_modules()
    }


def changed(before: dict[str, dict[str, Any]], root: nn.Module) -> dict[str, str]:
    """Modules that keep something from one call to the next, of which a graph knows nothing."""
    found = {}
    for name, now in attributes(root).items():
        then = before.get(name, now)
        for key in then.keys() | now.keys():
            if not key.startswith("_tensor_constant") and not _same(then, now, key):
                found[name] = f"it sets its attribute {key!r}"
    return found


def _same(then: dict[str, Any], now: dict[str, Any], key: str) -> bool:
    if key not in then or key not in now:
        return False
    a, b = then[key], now[key]
    return a is b or (type(a) is type(b) and _is_plain(b) and a == b)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float, str))


def changing_constants(graph: Graph) -> dict[str, str]:
    """The whole model, where it writes into a tensor that all of its calls have in common."""
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method") or not _writes(node.target):
            continue
        written = node.args[0] if node.args else None
        if isinstance(written, Node) and written.op == "get_attr":
            return {"": f"it writes into {written.target}, which all calls have in common"}
    return {}
