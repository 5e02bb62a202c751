"""The steps that every Transformer layer is made of: sublayer, dropout, residual add, norm.

Where nothing is dropped the add runs in the epilogue of the sublayer's last product, else with
dropout in the pass of the LayerNorm behind it; the activation runs in the epilogue of the
feed-forward's first product.

Parts that are not what the constructor made (a linear layer replaced by an adapter, hooks, another
dropout) are called as modules, with the same outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.module import _has_any_global_hook

from nnarch import library
from nnarch.nn.activation import GELU, ReLU, SiLU
from nnarch.nn.attention import MultiheadAttention
from nnarch.nn.dropout import Dropout
from nnarch.nn.layer_norm import LayerNorm
from nnarch.nn.linear import Linear

_EPILOGUES: dict[Any, str] = {
    torch.nn.functional.relu: "relu",
    torch.relu: "relu",
    torch.nn.functional.gelu: "gelu",
    torch.nn.functional.silu: "silu",
    torch.nn.functional.relu6: "relu6",
    torch.nn.functional.hardswish: "hardswish",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
}
_EPILOGUE_LAYERS: dict[type, str] = {
    torch.nn.ReLU: "relu",
    ReLU: "relu",
    torch.nn.GELU: "gelu",
    GELU: "gelu",
    torch.nn.SiLU: "silu",
    SiLU: "silu",
}

Sublayer = Callable[[Tensor, Tensor | None], Tensor]
"""Takes x and what is added to its result (None: nothing)."""


def run(x: Tensor, norm_first: bool, *steps: tuple[Sublayer, Module, Module]) -> Tensor:
    """Sublayers with dropout, residual add and norm, one after another."""
    return _run_norm_first(x, steps) if norm_first else _run_norm_last(x, steps)


def _narrows(x: Tensor) -> bool:
    """Whether autocast would round a residual that a product adds."""
    return x.dtype == torch.float32 and library.autocasts(x.device.type)


def _run_norm_last(x: Tensor, steps: tuple[tuple[Sublayer, Module, Module], ...]) -> Tensor:
    for sublayer, dropout, norm in steps:
        p = _probability(dropout)
        if p == 0 and not _narrows(x):
            x = norm(sublayer(x, x))
        elif p is not None and _takes_residual(norm):
            x = norm.forward(sublayer(x, None), x, dropout_p=p)
        else:
            x = norm(x + dropout(sublayer(x, None)))
    return x


def _run_norm_first(x: Tensor, steps: tuple[tuple[Sublayer, Module, Module], ...]) -> Tensor:
    norms = [norm for _, _, norm in steps[1:]] + [None]
    normed = steps[0][2](x)
    for (sublayer, dropout, _), following in zip(steps, norms, strict=True):
        p = _probability(dropout)
        if p and following is not None and _takes_residual(following):
            y = sublayer(normed, None)
            normed, x = following.forward(y, x, dropout_p=p, return_sum=True)
            continue
        fuses = p == 0 and not _narrows(x)
        x = sublayer(normed, x) if fuses else x + dropout(sublayer(normed, None))
        if following is not None:
            normed = following(x)
    return x


def attention(
    module: Any, memory: Any, padding: Any, mask: Any, is_causal: bool, cache: Any
) -> Sublayer:
    """Attention of x to itself, or to the one tensor in `memory`."""

    def attend(x: Tensor, residual: Tensor | None) -> Tensor:
        keys = x if memory is None else memory[0]
        if x.dim() == 3 and type(module) is MultiheadAttention and _is_bare(module):
            return module._attend(
                x, keys, keys, padding, mask, is_causal, cache,
                batch_first=module.batch_first, residual=residual,
            )[0]  # fmt: skip
        further = {} if cache is None else {"cache": cache}
        y = module(
            x, keys, keys, key_padding_mask=padding, need_weights=False, attn_mask=mask,
            is_causal=is_causal, **further,
        )[0]  # fmt: skip
        return y if residual is None else y + residual

    return attend


def feed_forward(layer: Any) -> Sublayer:
    """The feed-forward network of `layer`."""

    def feed(x: Tensor, residual: Tensor | None) -> Tensor:
        parts = layer._modules
        first, dropout, second = parts["linear1"], parts["dropout"], parts["linear2"]
        activation = epilogue_of(layer.activation)
        if activation is not None and type(first) is Linear and _is_bare(first):
            x = first._multiply(x, activation=activation)
        else:
            x = layer.activation(first(x))
        if _probability(dropout) != 0:
            x = dropout(x)
        if type(second) is Linear and _is_bare(second):
            return second._multiply(x, residual)
        y = second(x)
        return y if residual is None else y + residual

    return feed


def epilogue_of(activation: Any) -> str | None:
    """The name of an activation that a product's epilogue computes, or None."""
    if isinstance(activation, Module):
        name = _EPILOGUE_LAYERS.get(type(activation))
        if name is None or not _is_bare(activation):
            return None
        approximate = name == "gelu" and getattr(activation, "approximate", "none") == "tanh"
        return "gelu_tanh" if approximate else name
    try:
        return _EPILOGUES.get(activation)
    except TypeError:  # a function object that cannot be hashed
        return None


def _probability(dropout: Any) -> float | None:
    """The probability at which `dropout` drops now, or None for a module that may do more."""
    if type(dropout) not in (Dropout, torch.nn.Dropout) or not _is_bare(dropout):
        return None
    return dropout.p if dropout.training else 0.0


def _takes_residual(norm: Any) -> bool:
    """Whether `norm` is one that drops and adds in the pass that normalizes."""
    return type(norm) is LayerNorm and _is_bare(norm)


def _is_bare(module: Module) -> bool:
    """Whether a call of `module` does what its class says: no hooks, no forward of its own."""
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or _has_any_global_hook()
    )
