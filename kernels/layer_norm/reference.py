"""The definitions of layer and RMS normalization in plain torch.

Statistics and gradients are computed in at least float32, whatever the input's dtype. `columns` is
how many numbers at the end of the input are normalized together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnarch.kernels.dropout.reference import factors


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    columns: int,
    eps: float,
    rms: bool,
) -> Tensor:
    """(s - mean)/√(variance + eps)·weight + bias of s = x + residual, or s/√(E[s²] + eps)·weight"""
    return layer_norm_train(x, weight, bias, residual, None, columns, eps, 0.0, rms)[0]


def layer_norm_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    columns: int,
    eps: float,
    dropout_p: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of s = dropout(x) + residual, with s and the statistics.

    s is empty where it is x; the statistics are [mean; 1/√(…)], for rms without the mean.
    """
    s = _rows(x, columns)
    if seed is not None:
        s = s * factors(seed, 1, *s.shape, dropout_p, s)[0]
    if residual is not None:
        s = s + _rows(residual, columns)
    s = _wide(s.to(x.dtype))  # y is that of the sum that backward and the caller see
    mean = s.new_zeros(len(s), 1) if rms else s.mean(1, keepdim=True)
    invstd = 1 / torch.sqrt((s - mean).square().mean(1, keepdim=True) + eps)
    y = (s - mean) * invstd
    if weight is not None:
        y = y * _wide(weight)
    if bias is not None:
        y = y + _wide(bias)
    total = x.new_empty(0) if residual is None and seed is None else s.view(x.shape).to(x.dtype)
    stats = torch.stack([invstd[:, 0]] if rms else [mean[:, 0], invstd[:, 0]])
    return y.view(x.shape).to(x.dtype), total, stats


def layer_norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    columns: int,
    wanted: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y and s for s, weight and bias; empty where `wanted` lacks its bit."""
    g, (normalized, invstd, rms) = _rows(grad, columns), _normalized(s, stats, columns)
    ds, dweight = s.new_empty(0), stats.new_empty(0)
    dbias = dweight.clone()
    if wanted & 1:
        wide = invstd * _project(_times(g, weight), normalized, rms)
        if grad_sum is not None:
            wide = wide + _rows(grad_sum, columns)
        ds = wide.view(s.shape).to(s.dtype)
    if wanted & 6:
        dweight, dbias = (g * normalized).sum(0), g.sum(0)
    return ds, dweight, dbias


def layer_norm_backward_backward(
    gg_ds: Tensor,
    gg_weight: Tensor | None,
    gg_bias: Tensor | None,
    grad: Tensor,
    s: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of <gg_ds, ds> + <gg_weight, dweight> + <gg_bias, dbias> for grad, s, weight.

    The statistics count as functions of s.
    """
    a, g = _rows(gg_ds, columns), _rows(grad, columns)
    normalized, invstd, rms = _normalized(s, stats, columns)
    u, q = _times(g, weight), torch.zeros_like(g) if gg_weight is None else _times(g, gg_weight)
    pa, pu, pq = (_project(v, normalized, rms) for v in (a, u, q))
    ax, ux = ((v * normalized).mean(1, keepdim=True) for v in (a, u))
    apu = (a * pu).mean(1, keepdim=True)

    d_grad = invstd * _times(pa, weight)
    if gg_weight is not None:
        d_grad = d_grad + _times(normalized, gg_weight)
    if gg_bias is not None:
        d_grad = d_grad + _wide(gg_bias)
    d_s = invstd * (pq - invstd * (ux * pa + ax * pu + normalized * apu))
    d_weight = (invstd * g * pa).sum(0)
    return d_grad.view(s.shape).to(s.dtype), d_s.view(s.shape).to(s.dtype), d_weight


def row_dropout(x: Tensor, seed: Tensor, columns: int, dropout_p: float) -> Tensor:
    """x with each row's elements dropped, or multiplied by 1/(1 - p)."""
    rows = _rows(x, columns)
    count, width = rows.shape
    kept = rows * factors(seed, 1, count, width, dropout_p, rows)[0]
    return kept.view(x.shape).to(x.dtype)


def _project(v: Tensor, normalized: Tensor, rms: bool) -> Tensor:
    """v - E[v] - x̂·E[v·x̂], or v - x̂·E[v·x̂]"""
    centred = v if rms else v - v.mean(1, keepdim=True)
    return centred - normalized * (v * normalized).mean(1, keepdim=True)


def _normalized(s: Tensor, stats: Tensor, columns: int) -> tuple[Tensor, Tensor, bool]:
    rms = len(stats) == 1
    invstd = stats[-1][:, None]
    rows = _rows(s, columns)
    return (rows if rms else rows - stats[0][:, None]) * invstd, invstd, rms


def _times(v: Tensor, weight: Tensor | None) -> Tensor:
    return v if weight is None else v * _wide(weight)


def _rows(x: Tensor, columns: int) -> Tensor:
    return _wide(x).reshape(x.numel() // columns if columns else 0, columns)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
