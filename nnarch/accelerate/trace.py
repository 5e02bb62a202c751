"""The forward pass of a model as a graph whose leaves are layers."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy, Tracer
from torch.fx.proxy import TraceError

from nnarch import functional
from nnarch.accelerate.state import IN_PLACE, Watch, attributes, changed, changing_constants
from nnarch.nn.inspection import is_customized

# Defaults of forward's arguments that are there to be tested, so they are fixed before tracing.
_FIXED_DEFAULTS = (type(None), bool, str)
_NNARCH_FUNCTIONS = tuple(
    function
    for name, function in vars(functional).items()
    if isinstance(function, FunctionType) and not name.startswith("_")
)


@dataclass
class TracedModel:
    """A private copy of a model in eval mode and, where it can be traced, its graph.

    Attributes:
        module: the copy, frozen.
        graph_module: its graph on the same layers; None where the model's own forward pass stays.
        untraced: qualified name of every module that keeps its own forward pass though it is no
            layer ("" is the model), with the reason.
    """

    module: nn.Module
    graph_module: GraphModule | None
    untraced: dict[str, str] = field(default_factory=dict)


def trace_model(model: nn.Module) -> TracedModel:
    """Copy `model` and trace the copy; whatever resists tracing becomes a leaf of the graph."""
    if is_layer(model) and _takes_several(model):  # attention, a whole Transformer
        return TracedModel(frozen_copy(model), None)
    untraced = _customized_containers(model)
    while "" not in untraced:
        count = len(untraced)
        # Every attempt has a copy of its own: a failed one may have left proxies in attributes.
        module = frozen_copy(model)
        if is_layer(module):
            module = nn.Sequential(module)
        tracer, before = LayerTracer(module, untraced), attributes(module)
        try:
            with _TRACING, Watch(module, tracer):
                graph = tracer.trace(module, _fixed_arguments(module))
        except Exception as error:  # the model's own code, run on proxies, can raise anything
            untraced[tracer.culprit] = f"{type(error).__name__}: {_first_sentence(error)}"
            continue
        untraced |= changed(before, module) | changing_constants(graph)
        if len(untraced) == count:
            _restore_argument_names(module, graph)
            graph._tracer_cls = DictTracer  # unpickling traces the generated code again
            return TracedModel(module, GraphModule(module, graph, type(module).__name__), untraced)
    return TracedModel(frozen_copy(model), None, untraced)


class DictTracer(Tracer):
    """Keeps kinds of dicts: torch's own makes plain ones of all."""

    def create_arg(self, a: Any) -> Any:
        """What the graph holds for `a`."""
        if type(a) is OrderedDict:
            items = [(self.create_arg(k), self.create_arg(v)) for k, v in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, dict) and is_dataclass(a):  # outputs of transformers
            given = {str(k): self.create_arg(v) for k, v in a.items()}
            return self.create_node("call_function", type(a), (), given)
        return super().create_arg(a)


class LayerTracer(DictTracer):
    """Traces through user code down to the layers of torch.nn and nnarch.nn.

    Args:
        root: the module to be traced.
        untraced: qualified names of modules that are leaves although they are no layers.

    Attributes:
        culprit: after a failed trace, the name of the innermost module whose forward pass failed.
    """

    def __init__(self, root: nn.Module, untraced: dict[str, str]) -> None:
        super().__init__((math,), _NNARCH_FUNCTIONS)
        self._thread, self._autocasts = threading.get_ident(), _autocasts()
        self._autowrap_search.append(functional)  # its functions, read as attributes of the module
        self.culprit = ""
        self._opaque = {id(root.get_submodule(name)) for name in untraced}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the graph calls `m` as a whole."""
        return is_layer(m) or id(m) in self._opaque

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace through `m`, or record a call of it."""
        if threading.get_ident() != self._thread:  # torch.fx patches modules for all threads
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            name = self.path_of_module(m)
            if not self.culprit and not self.is_leaf_module(m, name):
                self.culprit = name
            raise

    def proxy(self, node: Node) -> Proxy:
        """What stands for the value of `node` in user code."""
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """Write down an operation; a graph has no place for the autocast around it."""
        if _autocasts() != self._autocasts:
            raise TraceError("it computes under an autocast of its own")
        return super().create_node(*args, **kwargs)


class _Proxy(Proxy):
    """Writes down ``x += y`` as it is: torch.fx has no such methods, so Python would take x + y."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[Proxy, Any], Proxy]:
    return lambda x, y: x.tracer.create_proxy("call_function", function, (x, y), {})


for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))

# torch.fx patches the class of all modules while it traces.
_TRACING = threading.RLock()


def _autocasts() -> tuple[bool, ...]:
    return tuple(map(torch.is_autocast_enabled, ("cpu", "cuda")))


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is one of torch.nn's or nnarch.nn's own layers, or accelerated already."""
    if isinstance(module, nn.Sequential):
        return False
    return type(module).__module__.startswith(
        ("torch.nn.", "torch.ao.nn.", "nnarch.nn.", "nnarch.accelerate.")
    )


def _customized_containers(model: nn.Module) -> dict[str, str]:
    """Modules that are no layers and that tracing would misread, running their hooks on proxies."""
    return {
        name: "it has hooks, or a forward or __call__ method of its own"
        for name, module in model.named_modules()
        if is_customized(module) and not is_layer(module)
    }


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, with parameters that want no gradient."""
    # Pruning and weight_norm keep a computed weight as an attribute, which deepcopy would refuse.
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        module = copy.deepcopy(model, computed)
    except Exception as error:
        raise TypeError(
            f"accelerate: model must be copyable, but copy.deepcopy({type(model).__name__}) raised "
            f"{type(error).__name__}: {error}"
        ) from error
    return module.eval().requires_grad_(False)


def _takes_several(module: nn.Module) -> bool:
    """Whether a call of `module` may have more than one argument."""
    parameters = inspect.signature(module.forward).parameters.values()
    return len([p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]) > 1


def _fixed_arguments(module: nn.Module) -> dict[str, Any]:
    """Optional arguments of forward that the graph fixes at their defaults."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, _FIXED_DEFAULTS)}


def _restore_argument_names(module: nn.Module, graph: Graph) -> None:
    """Give fixed arguments their own names back (torch.fx numbers them), for calls by keyword."""
    names = list(_fixed_arguments(module))
    for node in graph.nodes:
        name, _, number = str(node.target).rpartition("_")
        if node.op == "placeholder" and name in names and number.isdigit():
            node.target = name


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else "no message"
