"""The definitions of the embedding operations, in plain torch: any dtype, any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nnarch.kernels.dropout.reference import dropout


def embedding(
    tokens: Tensor, weight: Tensor, padding_idx: int, sparse: bool, scale_grad_by_freq: bool
) -> Tensor:
    """y[…, c] = weight[tokens[…], c]; the other arguments are about the gradient."""
    padding = padding_idx if padding_idx >= 0 else None
    return F.embedding(tokens, weight, padding, scale_grad_by_freq=scale_grad_by_freq)


def embedding_grad(
    grad: Tensor, tokens: Tensor, rows: int, padding_idx: int, scale: float, by_frequency: bool
) -> Tensor:
    """dw[v] = scale · Σ grad where tokens are v; 0 at padding_idx; over their number if asked."""
    flat, columns = tokens.reshape(-1).long(), grad.shape[-1]
    g = grad.reshape(len(flat), columns) * scale
    if by_frequency:
        g = g / torch.bincount(flat, minlength=rows)[flat][:, None].to(g.dtype)
    g = torch.where((flat == padding_idx)[:, None], torch.zeros_like(g), g)
    return g.new_zeros(rows, columns).index_add_(0, flat, g)


def _sum(
    tokens: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    positions: Tensor | None,
    segment_weight: Tensor | None,
    segments: Tensor | None,
    scale: float,
    offset: int,
    padding_idx: int = -1,
) -> Tensor:
    padding = padding_idx if padding_idx >= 0 else None
    x = F.embedding(tokens, weight, padding) * scale
    if position_weight is not None:
        if positions is None:
            length = tokens.shape[-1] if tokens.dim() else 1
            row = torch.arange(offset, offset + length, device=tokens.device)
            positions = row.expand(tokens.shape) if tokens.dim() else row[0]
        x = x + position_weight[positions.long()]
    if segment_weight is not None and segments is not None:
        x = x + segment_weight[segments.long()]
    return x


def _statistic(x: Tensor) -> Tensor:
    """Half types keep their statistics in float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def embedding_sum(
    tokens: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    positions: Tensor | None,
    segment_weight: Tensor | None,
    segments: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    offset: int,
    padding_idx: int,
    normalize: bool,
    eps: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x = scale·weight[tokens] + position + segment; LayerNorm(x) if asked; dropout.

    Returns:
        The result; mean and 1/√(var + eps) of the rows, empty without normalization and without
        gradients of their own.
    """
    tables = (tokens, weight, position_weight, positions, segment_weight, segments)
    x = _sum(*tables, scale, offset, padding_idx)
    mean = invstd = _statistic(x).new_empty(0)
    if normalize:
        wide = _statistic(x)
        mean = wide.mean(-1, keepdim=True)
        invstd = torch.rsqrt(wide.var(-1, unbiased=False, keepdim=True) + eps)
        x = ((wide - mean) * invstd).to(x.dtype)
        x = x if norm_weight is None else x * norm_weight
        x = x if norm_bias is None else x + norm_bias
        mean, invstd = mean.reshape(-1), invstd.reshape(-1)
    if seed is not None and dropout_p > 0:
        x = dropout(x, seed, dropout_p)
    return x, mean.detach(), invstd.detach().clone()


def embedding_sum_backward(
    grad: Tensor,
    tokens: Tensor,
    weight: Tensor,
    position_weight: Tensor | None,
    positions: Tensor | None,
    segment_weight: Tensor | None,
    segments: Tensor | None,
    norm_weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    seed: Tensor | None,
    scale: float,
    offset: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum, of norm_weight and of norm_bias, behind a normalization."""
    x = _statistic(
        _sum(tokens, weight, position_weight, positions, segment_weight, segments, scale, offset)
    )
    g = _statistic(grad if seed is None or dropout_p == 0 else dropout(grad, seed, dropout_p))
    shape = (*x.shape[:-1], 1)
    x = (x - mean.reshape(shape)) * invstd.reshape(shape)
    over = tuple(range(x.dim() - 1))
    d_weight, d_bias = ((g * x).sum(over), g.sum(over)) if over else (g * x, g.clone())
    g = g if norm_weight is None else g * norm_weight
    along = (g * x).mean(-1, keepdim=True)
    dx = (g - g.mean(-1, keepdim=True) - x * along) * invstd.reshape(shape)
    return dx.to(grad.dtype), d_weight.to(grad.dtype), d_bias.to(grad.dtype)
