"""The definition of attention and of its gradients in plain torch.

Everything is computed in at least float32, whatever the inputs' dtype. A query that may see no key
gives zeros, and a log-sum-exp of -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnarch.kernels.dropout.reference import factors


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
    """softmax(scale·q·kᵀ + mask)·v, and the log-sum-exp of the scores."""
    scores = _scores(query, key, mask, key_lengths, scale, low, high)
    lse = torch.logsumexp(scores, dim=-1)
    weights = _softmax(scores, lse)
    if seed is not None:
        weights = weights * _factors(weights, seed, dropout_p)
    out = weights @ _per_head(_wide(value), query)
    return new_output(query, value).copy_(out), lse


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
    """The gradients of query, key, value, and of an additive mask where it is asked for."""
    g, q, k, v = (_wide(t) for t in (grad, query, key, value))
    weights = _softmax(_scores(query, key, mask, key_lengths, scale, low, high), lse)
    d_weights = g @ _per_head(v, query).mT
    kept = weights
    if seed is not None:
        drop = _factors(weights, seed, dropout_p)
        kept, d_weights = weights * drop, d_weights * drop
    delta = (g * _wide(out)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    d_scores = weights * (d_weights - delta[..., None])
    dq = scale * d_scores @ _per_head(k, query)
    dk = _per_group(scale * d_scores.mT @ q, key)
    dv = _per_group(kept.mT @ g, value)
    if mask is not None and mask_gradient:
        d_mask = d_scores.sum_to_size(mask.shape).to(mask.dtype)
    else:
        d_mask = query.new_empty(0)
    dq, dk, dv = (new_output(t, t).copy_(d) for t, d in ((query, dq), (key, dk), (value, dv)))
    return dq, dk, dv, d_mask


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
    """exp(scale·q·kᵀ + mask - lse) after dropout: [B, H, L, S], or its mean [B, 1, L, S]."""
    weights = _weights(_scores(query, key, mask, key_lengths, scale, low, high), lse)
    if seed is not None:
        weights = weights * _factors(weights, seed, dropout_p)
    if averaged:
        weights = weights.sum(1, keepdim=True) / max(1, weights.shape[1])
    return weights.to(query.dtype)


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
    """The gradients of query, key, log-sum-exp, and of an additive mask where it is asked for."""
    d_scores = _weights(_scores(query, key, mask, key_lengths, scale, low, high), lse)
    if seed is not None:
        d_scores = d_scores * _factors(d_scores, seed, dropout_p)
    d_scores = d_scores * _wide(grad)
    if averaged:
        d_scores = d_scores / max(1, query.shape[1])
    dq = scale * d_scores @ _per_head(_wide(key), query)
    dk = _per_group(scale * d_scores.mT @ _wide(query), key)
    if mask is not None and mask_gradient:
        d_mask = d_scores.sum_to_size(mask.shape).to(mask.dtype)
    else:
        d_mask = query.new_empty(0)
    dq, dk = new_output(query, query).copy_(dq), new_output(key, key).copy_(dk)
    return dq, dk, -d_scores.sum(-1), d_mask


def visible(query: Tensor, key: Tensor, key_lengths: Tensor | None, low: int, high: int) -> Tensor:
    """[B or 1, 1, L, S]: whether query i sees key j, by low <= j - i <= high and j < length."""
    i = torch.arange(query.shape[2], device=query.device)[:, None]
    j = torch.arange(key.shape[2], device=query.device)
    seen = ((j - i >= low) & (j - i <= high))[None, None]
    if key_lengths is not None:
        seen = seen & (j < key_lengths[:, None, None, None])
    return seen


def new_output(query: Tensor, value: Tensor) -> Tensor:
    """Uninitialised [B, H, L, Dv]; heads and positions lie in memory in the order of `query`'s."""
    batch, heads, length, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty((batch, length, heads, value.shape[3])).transpose(1, 2)
    return query.new_empty((batch, heads, length, value.shape[3]))


def _scores(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    low: int,
    high: int,
) -> Tensor:
    scores = scale * (_wide(query) @ _per_head(_wide(key), query).mT)
    seen = visible(query, key, key_lengths, low, high)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    return scores.masked_fill(~seen, -torch.inf)


def _softmax(scores: Tensor, lse: Tensor) -> Tensor:
    """Zero where there is nothing. Not :func:`_weights`: of a row that a mask of -1e9 covers,
    rounding leaves its number of keys out of the log-sum-exp."""
    return scores.softmax(-1).masked_fill((lse == -torch.inf)[..., None], 0.0)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """By any log-sum-exp that is given; it has a gradient."""
    nothing = lse == -torch.inf
    return torch.exp(scores - lse.masked_fill(nothing, 0.0)[..., None])


def _factors(weights: Tensor, seed: Tensor, p: float) -> Tensor:
    batch, heads, length, keys = weights.shape
    return factors(seed, batch * heads, length, keys, p, weights).reshape(weights.shape)


def _per_head(grouped: Tensor, query: Tensor) -> Tensor:
    """[B, G, S, D] for each of the query's heads."""
    return grouped.repeat_interleave(query.shape[1] // max(1, grouped.shape[1]), dim=1)


def _per_group(per_head: Tensor, grouped: Tensor) -> Tensor:
    """The sum over the heads that share a key and value head."""
    batch, groups, keys, _ = grouped.shape
    heads_each = per_head.shape[1] // max(1, groups)
    return per_head.reshape(batch, groups, heads_each, keys, per_head.shape[3]).sum(2)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
