"""The forward pass of a model as a graph whose leaves are layers."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Tracer

from nnarch import functional

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
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
        # Every attempt has a copy of its own: a failed one may have left proxies in attributes.
        module = frozen_copy(model)
        if is_layer(module):
            module = nn.Sequential(module)
        tracer = LayerTracer(module, untraced)
        try:
            graph = tracer.trace(module, _fixed_arguments(module))
        except Exception as error:  # the model's own code, run on proxies, can raise anything
            untraced[tracer.culprit] = f"{type(error).__name__}: {_first_sentence(error)}"
        else:
            _restore_argument_names(module, graph)
            graph._tracer_cls = None  # unpickling traces the generated code again, with torch's own
            return TracedModel(module, GraphModule(module, graph, type(module).__name__), untraced)
    return TracedModel(frozen_copy(model), None, untraced)


class LayerTracer(Tracer):
    """Traces through user code down to the layers of torch.nn and nnarch.nn.

    Args:
        root: the module to be traced.
        untraced: qualified names of modules that are leaves although they are no layers.

    Attributes:
        culprit: after a failed trace, the name of the innermost module whose forward pass failed.
    """

    def __init__(self, root: nn.Module, untraced: dict[str, str]) -> None:
        super().__init__((math,), _NNARCH_FUNCTIONS)
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
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            name = self.path_of_module(m)
            if not self.culprit and not self.is_leaf_module(m, name):
                self.culprit = name
            raise


def is_layer(module: nn.Module) -> bool:
    """Whether `module` is one of torch.nn's or nnarch.nn's own layers, or accelerated already."""
    if isinstance(module, nn.Sequential):
        return False
    return type(module).__module__.startswith(
        ("torch.nn.", "torch.ao.nn.", "nnarch.nn.", "nnarch.accelerate.")
    )


def is_customized(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class says.

    Hooks do (those of pruning, weight_norm or a profiler), and a forward method of its own.
    """
    return "forward" in vars(module) or any(getattr(module, hooks, None) for hooks in _HOOKS)


def _customized_containers(model: nn.Module) -> dict[str, str]:
    """Modules that are no layers and that tracing would misread, running their hooks on proxies."""
    return {
        name: "it has hooks or a forward method of its own"
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
    """Whether a call of `module` needs more than one argument."""
    parameters = inspect.signature(module.forward).parameters.values()
    needed = (p for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD and p.default is p.empty)
    return len(list(needed)) > 1


def _fixed_arguments(module: nn.Module) -> dict[str, Any]:
    """Optional arguments of forward that the graph fixes at their defaults."""
    parameters = inspect.signature(type(module).forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, _FIXED_DEFAULTS)}


def _restore_argument_names(module: nn.Module, graph: Graph) -> None:
    """Give fixed arguments their own names back (torch.fx numbers them), for calls by keyword."""
    names = list(_fixed_arguments(module))
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target).rpartition("_")[0] in names:
            node.target = str(node.target).rpartition("_")[0]


def _first_sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else "no message"
