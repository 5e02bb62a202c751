"""Attention on the GPU: the launchers, and the cases that are compiled ahead of time."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nnarch.kernels.gpu.launch import check_dtype, device_guard
from nnarch.kernels.gpu.static import StaticCase

from . import reference, triton_backward, triton_forward, triton_weights
from .op import UNBOUNDED
from .triton_call import Call
from .triton_tables import DEEPEST

__all__ = [
    "STATIC_CASES",
    "attention",
    "attention_backward",
    "attention_weights",
    "attention_weights_backward",
]


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
    call = Call(query, key, value, mask, key_lengths, seed, dropout_p, scale, low, high)
    with device_guard(query):
        return triton_forward.forward(call, value)


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
    call = Call(query, key, value, mask, key_lengths, seed, dropout_p, scale, low, high)
    with device_guard(query):
        return triton_backward.backward(call, value, grad, grad_lse, out, lse, wanted)


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    dropout_p: float,
    scale: float,
    low: int,
    high: int,
    averaged: bool,
) -> Tensor:
    """nnarch::attention_weights on a GPU."""
    _check("attention_weights", query, key)
    if 0 in query.shape or key.shape[2] == 0:
        heads = 1 if averaged else query.shape[1]
        inputs = (query, key, mask, key_lengths, seed, lse, dropout_p, scale, low, high, averaged)
        if query.shape[3] == 0 and heads:
            return reference.attention_weights(*inputs)
        return query.new_zeros((query.shape[0], heads, query.shape[2], key.shape[2]))
    call = Call(query, key, None, mask, key_lengths, seed, dropout_p, scale, low, high)
    with device_guard(query):
        return triton_weights.weights(call, lse.contiguous(), averaged)


def attention_weights_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    dropout_p: float,
    scale: float,
    low: int,
    high: int,
    averaged: bool,
    mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nnarch::attention_weights_backward on a GPU."""
    _check("attention_weights_backward", query, key, grad)
    wanted = mask is not None and mask_gradient
    if 0 in query.shape or key.shape[2] == 0:
        d_mask = mask.new_zeros(mask.shape) if wanted else query.new_empty(0)
        dq, dk = (reference.new_output(t, t).zero_() for t in (query, key))
        return dq, dk, torch.zeros_like(lse), d_mask
    call = Call(query, key, None, mask, key_lengths, seed, dropout_p, scale, low, high)
    with device_guard(query):
        return triton_weights.weights_backward(call, grad, lse.contiguous(), averaged, wanted)


# ------------------------------------------------------------------------- ahead-of-time cases

ADDED, BOOLEAN = "added", "boolean"


def _inputs(dtype: torch.dtype, b: int, h: int, g: int, n: int, s: int, d: int) -> list[Tensor]:
    return [
        torch.empty(b, x, m, d, dtype=dtype, device="meta") for x, m in ((h, n), (g, s), (g, s))
    ]


def _call(
    dtype: torch.dtype, sizes: tuple[int, ...], causal: bool = False, extras: str = ""
) -> tuple[Call, Tensor]:
    """A call of (batch, heads, key heads, queries, keys, width) and its values.

    `extras`, the kind of a mask, adds all that costs registers beside the products: the mask
    (ADDED or BOOLEAN), dropout, key lengths and a window.
    """
    q, k, v = _inputs(dtype, *sizes)
    batch, h, _, n, s, d = sizes
    mask, lengths, seed, p, low = None, None, None, 0.0, -UNBOUNDED
    if extras:
        kind = torch.bool if extras == BOOLEAN else dtype
        mask = torch.empty(1, h, n, s, dtype=kind, device="meta")
        lengths = torch.empty(batch, dtype=torch.int64, device="meta")
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        p, low = 0.1, -s // 2
    high = s - n if causal else UNBOUNDED
    return Call(q, k, v, mask, lengths, seed, p, d**-0.5, low, high), v


def _words(causal: bool, extras: str) -> str:
    return "causal " * causal + f"{extras} mask dropout lengths window " * bool(extras)


def _forward_case(*sizes: int, causal: bool = False, extras: str = "") -> StaticCase:
    b, h, g, n, s, d = sizes

    def run(dtype: torch.dtype) -> None:
        triton_forward.forward(*_call(dtype, sizes, causal, extras))

    return StaticCase(
        f"attention {_words(causal, extras)}B{b} H{h}:{g} L{n} S{s} D{d}",
        run,
        flops=4.0 * b * h * n * s * d,  # whole tiles: the prediction knows of no band
        elements=2.0 * b * (h * n + g * s) * d + h * n * s * bool(extras),
        matrix=n > 1,  # one query: the keys' bandwidth
    )


_PRODUCTS = {"keys and values": 4, "queries": 3, "mask": 2}


def _backward_case(part: str, b: int, h: int, n: int, d: int, extras: str = "") -> StaticCase:
    products = _PRODUCTS[part]

    def run(dtype: torch.dtype) -> None:
        call, v = _call(dtype, (b, h, h, n, n, d), causal=True, extras=extras)
        q, mask = call.query, call.mask
        rows = q.new_empty(q.shape[:3], dtype=torch.float32)
        work = triton_backward.prepare(call, q, rows, rows)
        if part == "queries":
            triton_backward.query_gradient(work)
        elif part == "mask" and mask is not None:
            triton_backward.mask_gradient(work, mask)
        else:
            triton_backward.key_value_gradients(work, v)

    masks = h * n * n * (1 + (part == "mask")) * bool(extras)
    return StaticCase(
        f"attention_backward, {part}, {_words(True, extras)}B{b} H{h} L{n} D{d}",
        run,
        flops=2.0 * products * b * h * n * n * d,
        elements=(4.0 + products - 2) * b * h * n * d + masks,
        fixed_bytes=8.0 * b * h * n,
        matrix=True,
    )


def _weights_case(part: str, b: int, h: int, n: int, d: int, extras: str = "") -> StaticCase:
    averaged = part != "each"
    products = 2 if part in ("queries", "keys") else 1

    def run(dtype: torch.dtype) -> None:
        call, _ = _call(dtype, (b, h, h, n, n, d), extras=extras)
        q = call.query
        call = dataclasses.replace(call, value=None)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        grad = q.new_empty((b, 1, n, n))
        if part == "queries":
            triton_weights.query_gradient(call, grad, lse, averaged)
        elif part == "keys":
            triton_weights.key_gradient(call, grad, lse, averaged)
        elif part == "mask" and call.mask is not None:
            triton_weights.mask_gradient(call, grad, lse, averaged, call.mask)
        else:
            triton_weights.weights(call, lse, averaged)

    masks = h * n * n * (1 + (part == "mask")) * bool(extras)
    return StaticCase(
        f"attention_weights, {part}, {_words(False, extras)}B{b} H{h} L{n} D{d}",
        run,
        flops=2.0 * products * b * h * n * n * d,
        elements=(1.0 + products) * b * h * n * d + b * n * n * (1 if averaged else h) + masks,
        fixed_bytes=4.0 * b * h * n,
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
    _weights_case("averaged", 8, 16, 2048, 64),
    _weights_case("each", 8, 16, 2048, 64),
    _weights_case("queries", 8, 16, 2048, 64),
    _weights_case("keys", 8, 16, 2048, 64),
]
for _d in (64, 128, 256):  # with everything that takes registers
    _sizes = (8, 16, 2048, _d)
    STATIC_CASES += [
        _forward_case(8, 16, 16, 2048, 2048, _d, causal=True, extras=ADDED),
        *(_backward_case(part, *_sizes, extras=ADDED) for part in _PRODUCTS),
        *(_weights_case(part, *_sizes, extras=ADDED) for part in ("queries", "keys", "mask")),
    ]
for _d in (64, 128):  # a kernel of its own, but hardly lighter
    STATIC_CASES += [
        _forward_case(8, 16, 16, 2048, 2048, _d, causal=True, extras=BOOLEAN),
        _backward_case("keys and values", 8, 16, 2048, _d, extras=BOOLEAN),
    ]
"""What bench/static_gpu.py compiles."""
