"""Attention in plain functions, what is compared with it, and the shapes and conditions."""

from __future__ import annotations

import math
from typing import Any

import torch
from kernel_cases import on_fresh_memory
from tolerances import assert_as_accurate
from torch import Tensor

from nnarch import functional as F


def inputs(b: int, h: int, g: int, n: int, s: int, d: int, dv: int) -> list[Tensor]:
    return [torch.randn(b, h, n, d), torch.randn(b, g, s, d), torch.randn(b, g, s, dv)]


ULPS = {torch.float32: 32.0, torch.float64: 64.0, torch.float16: 4.0, torch.bfloat16: 4.0}


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Attention in torch's plain functions, with zeros for a query that sees nothing."""
    each = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    n, s = q.shape[2], k.shape[2]
    position, key = torch.arange(n)[:, None] + query_offset, torch.arange(s)
    seen = torch.ones(n, s, dtype=torch.bool)
    if is_causal:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & (key >= position - window[0]) & (key <= position + window[1])
    if key_lengths is not None:
        seen = seen & (key < key_lengths[:, None, None, None])
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    scores = scores.masked_fill(~seen, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0) @ v


def check(tensors: list[Tensor], options: dict[str, Any], gradients: bool = True) -> Tensor:
    """Assert that output and gradients are as accurate as the dense definition in their dtype."""
    floats = {n: o for n, o in options.items() if isinstance(o, Tensor) and o.is_floating_point()}
    rest = {n: o for n, o in options.items() if n not in floats}
    shared = {"enable_gqa": True}
    dtype = tensors[0].dtype
    grad = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3], dtype=dtype)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(gradients)

        leaves = [leaf(t) for t in tensors]
        named = {n: leaf(t) for n, t in floats.items()}
        y = function(*leaves, **named, **rest, **shared)
        if not gradients:
            return [y]
        wanted = [*leaves, *named.values()]
        return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(dtype))]

    ours = on_fresh_memory(lambda: run(F.scaled_dot_product_attention, dtype))
    theirs, truth = run(dense, dtype), run(dense, torch.float64)
    for name, mine, their, true in zip(
        ["output", "dq", "dk", "dv", *floats], ours, theirs, truth, strict=False
    ):
        # Gradients of scores are differences: rounding stays where torch's softmax has exact zeros.
        assert_as_accurate(
            mine, their, true, what=name, ulps=None if name == "output" else ULPS[dtype]
        )
    return ours[0]


SHAPES = {  # batch, heads, key heads, queries, keys, depth, value depth
    "one": (1, 1, 1, 1, 1, 1, 1),
    "small": (2, 3, 3, 7, 11, 8, 8),
    "tiles": (2, 2, 2, 64, 96, 64, 64),
    "primes": (1, 2, 2, 67, 101, 61, 61),
    "grouped": (2, 6, 2, 19, 35, 32, 32),
    "one key head": (1, 8, 1, 33, 47, 16, 16),
    "values wider": (1, 2, 2, 21, 40, 24, 80),
    "values narrower": (1, 2, 1, 21, 40, 72, 5),
    "decode": (2, 4, 4, 1, 300, 64, 64),
    "few queries": (1, 8, 2, 3, 515, 128, 128),
    "deep": (1, 1, 1, 18, 50, 256, 256),
    "deeper than tiles": (1, 1, 1, 5, 9, 300, 270),
    "long": (1, 1, 1, 259, 523, 40, 40),
}


def conditions(b: int, h: int, n: int, s: int) -> dict[str, dict[str, Any]]:
    lengths = torch.tensor([s, s // 3, 0, 1][:b])
    rows = torch.rand(b, 1, n, s) > 0.4
    rows[0, 0, n // 2] = False  # a query that sees nothing
    return {
        "causal": {"is_causal": True},
        "causal with a cache": {"is_causal": True, "query_offset": s - n},
        "window": {"window": (9, 4)},
        "causal window": {"is_causal": True, "window": (5, 0), "query_offset": s - n},
        "band past the keys": {"window": (3, 0), "query_offset": s + 1},
        "bool mask": {"attn_mask": rows},
        "bool mask of keys": {"attn_mask": torch.rand(b, 1, 1, s) > 0.3},
        "additive mask": {"attn_mask": torch.randn(1, h, n, s)},
        "additive mask of keys": {"attn_mask": torch.randn(b, h, 1, s)},
        "additive mask with -inf": {
            "attn_mask": torch.randn(1, 1, n, s).masked_fill(torch.rand(n, s) > 0.6, -math.inf)
        },
        "lengths": {"key_lengths": lengths},
        "all": {"is_causal": True, "attn_mask": rows, "key_lengths": lengths, "window": (30, 0)},
    }
