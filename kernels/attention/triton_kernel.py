"""Attention on the GPU: the launchers, and the cases that are compiled ahead of time."""

from __future__ import annotations

import torch
from torch import Tensor

from nnarch.kernels.gpu.launch import check_dtype, device_guard, needs_int64
from nnarch.kernels.gpu.static import StaticCase

from . import reference, triton_backward, triton_forward
from .op import UNBOUNDED
from .triton_tiles import DEEPEST

__all__ = ["STATIC_CASES", "attention", "attention_backward"]


def _check(op: str, *tensors: Tensor | None) -> None:
    check_dtype(op, *tensors)
    depth = max(t.shape[3] for t in tensors[:3] if t is not None)
    if depth > DEEPEST:
        raise NotImplementedError(
            f"backend 'triton' lacks nnarch::{op} for head_dim {depth}: at most {DEEPEST}"
        )


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    low: int,
    high: int,
) -> tuple[Tensor, Tensor]:
    """nnarch::attention on a GPU."""
    _check("attention", query, key, value)
    if 0 in query.shape[:3] or value.shape[3] == 0 or key.shape[2] == 0:
        out = reference.new_output(query, value).zero_()
        return out, out.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    int64 = needs_int64(query, key, value, mask)
    with device_guard(query):
        return triton_forward.forward(
            query, key, value, mask, key_lengths, seed, dropout_p, scale, low, high, int64
        )


def attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    scale: float,
    low: int,
    high: int,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nnarch::attention_backward on a GPU."""
    _check("attention_backward", query, key, value, grad)
    wanted = mask is not None and mask_gradient
    if 0 in query.shape[:3] or 0 in (value.shape[3], key.shape[2], query.shape[3]):
        d_mask = mask.new_zeros(mask.shape) if wanted else query.new_empty(0)
        return *(reference.new_output(t, t).zero_() for t in (query, key, value)), d_mask
    int64 = needs_int64(query, key, value, mask, grad)
    with device_guard(query):
        return triton_backward.backward(
            grad, grad_lse, query, key, value, mask, key_lengths, seed, out, lse, dropout_p, scale,
            low, high, wanted, int64,
        )  # fmt: skip


# ------------------------------------------------------------------------- ahead-of-time cases


def _inputs(dtype: torch.dtype, b: int, h: int, g: int, n: int, s: int, d: int) -> list[Tensor]:
    return [
        torch.empty(b, x, m, d, dtype=dtype, device="meta") for x, m in ((h, n), (g, s), (g, s))
    ]


def _forward_case(
    b: int, h: int, g: int, n: int, s: int, d: int, causal: bool = False
) -> StaticCase:
    def run(dtype: torch.dtype) -> None:
        high = s - n if causal else UNBOUNDED
        tensors = _inputs(dtype, b, h, g, n, s, d)
        attention(*tensors, None, None, None, 0.0, d**-0.5, -UNBOUNDED, high)

    kind = "causal " if causal else ""
    return StaticCase(
        f"attention {kind}B{b} H{h}:{g} L{n} S{s} D{d}",
        run,
        flops=4.0 * b * h * n * s * d,  # whole tiles: the prediction knows of no band
        elements=2.0 * b * (h * n + g * s) * d,
        matrix=n > 1,  # one query: the keys' bandwidth
    )


def _backward_case(part: str, b: int, h: int, n: int, d: int) -> StaticCase:
    products = {"keys and values": 4, "queries": 3}[part]

    def run(dtype: torch.dtype) -> None:
        q, k, v = _inputs(dtype, b, h, h, n, n, d)
        rows = q.new_empty(q.shape[:3], dtype=torch.float32)
        band = (0.0, d**-0.5, -UNBOUNDED, 0, False)
        call = triton_backward.prepare(q, q, k, v, None, None, None, rows, rows, *band)
        if part == "queries":
            triton_backward.query_gradient(call, q)
        else:
            triton_backward.key_value_gradients(call, k, v)

    return StaticCase(
        f"attention_backward, {part}, causal B{b} H{h} L{n} D{d}",
        run,
        flops=2.0 * products * b * h * n * n * d,
        elements=(4.0 + products - 2) * b * h * n * d,
        fixed_bytes=8.0 * b * h * n,
        matrix=True,
    )


STATIC_CASES = [
    _forward_case(8, 16, 16, 2048, 2048, 64, causal=True),
    _forward_case(8, 16, 16, 2048, 2048, 128, causal=True),
    _forward_case(32, 12, 12, 512, 512, 64),
    _forward_case(8, 8, 8, 2048, 2048, 256),
    _forward_case(64, 32, 8, 1, 8192, 128, causal=True),
    _forward_case(1, 32, 8, 1, 65536, 128, causal=True),
    _backward_case("keys and values", 8, 16, 2048, 64),
    _backward_case("keys and values", 8, 16, 2048, 128),
    _backward_case("queries", 8, 16, 2048, 64),
    _backward_case("queries", 8, 16, 2048, 128),
    _backward_case("keys and values", 8, 8, 2048, 256),
    _backward_case("queries", 8, 8, 2048, 256),
]
"""What bench/static_gpu.py compiles."""
