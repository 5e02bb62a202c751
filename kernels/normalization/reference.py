"""The definitions of the normalization operations in plain torch.

Statistics and gradients are computed in at least float32, whatever the input's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnarch.kernels.activation.reference import activation as activate
from nnarch.kernels.activation.reference import activation_grad


def affine(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: int,
    alpha: float,
) -> Tensor:
    """act(x·scale + shift + residual)"""
    z = _wide(x)
    if scale is not None:
        z = z * _per_channel(scale, x)
    if shift is not None:
        z = z + _per_channel(shift, x)
    if residual is not None:
        z = z + _wide(residual)
    return _like(activate(z, activation, alpha), x)


def fold(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The scale and shift that normalizing by given statistics amounts to."""
    scale = torch.rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    if bias is None:
        return scale, mean * -scale
    return scale, torch.addcmul(bias, mean, scale, value=-1)


def batch_norm_eval(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    alpha: float,
) -> Tensor:
    """act((x - mean)/√(var + eps)·weight + bias + residual)"""
    weight, bias = (None if t is None else _wide(t) for t in (weight, bias))
    scale, shift = fold(_wide(mean), _wide(var), weight, bias, eps)
    return affine(x, scale, shift, residual, activation, alpha)


def channel_sum(x: Tensor) -> Tensor:
    """The sum over all dimensions but 1."""
    return _wide(x).sum(_all_but_channels(x)).to(x.dtype)


def channel_dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a·b over all dimensions but 1."""
    return (_wide(a) * _wide(b)).sum(_all_but_channels(a)).to(a.dtype)


def batch_norm_train(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """act((x - mean)·invstd·weight + bias + residual), mean, invstd"""
    z = _wide(x)
    variance, mean = torch.var_mean(z, _all_but_channels(x), correction=0)
    invstd = 1 / torch.sqrt(variance + eps)
    z = (z - _per_channel(mean, x)) * _per_channel(invstd, x)
    return affine(z, weight, bias, residual, activation, alpha).to(x.dtype), mean, invstd


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    y: Tensor | None,
    activation: int,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of batch_norm_train's y for x, weight and bias."""
    g = _wide(grad)
    if y is not None:
        g = activation_grad(g, _wide(y), activation, alpha)
    normalized = _normalize(x, mean, invstd)
    dims = _all_but_channels(x)
    dweight, dbias = (g * normalized).sum(dims), g.sum(dims)
    dx = _slope(weight, invstd, x) * _project(g, normalized)
    return _like(dx, x), dweight, dbias


def batch_norm_backward_backward(
    gg_x: Tensor,
    gg_weight: Tensor,
    gg_bias: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of <gg_x, dx> + <gg_weight, dweight> + <gg_bias, dbias> for grad, x, weight.

    mean and invstd count as functions of x.
    """
    a, g, normalized = _wide(gg_x), _wide(grad), _normalize(x, mean, invstd)
    dims = _all_but_channels(x)
    sigma, slope = _per_channel(invstd, x), _slope(weight, invstd, x)
    ggw, ggb = _per_channel(gg_weight, x), _per_channel(gg_bias, x)
    pa, pg = _project(a, normalized), _project(g, normalized)
    ax, gx = ((v * normalized).mean(dims, keepdim=True) for v in (a, g))
    apg = (a * pg).mean(dims, keepdim=True)

    d_grad = slope * pa + ggw * normalized + ggb
    d_x = sigma * (ggw * pg - slope * (gx * pa + ax * pg + normalized * apg))
    return _like(d_grad, x), _like(d_x, x), invstd * (a * pg).sum(dims)


def _project(v: Tensor, normalized: Tensor) -> Tensor:
    """v - E[v] - x̂·E[v·x̂]"""
    dims = _all_but_channels(v)
    return v - v.mean(dims, keepdim=True) - normalized * (v * normalized).mean(dims, keepdim=True)


def _normalize(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (_wide(x) - _per_channel(mean, x)) * _per_channel(invstd, x)


def _slope(weight: Tensor | None, invstd: Tensor, x: Tensor) -> Tensor:
    return _per_channel(invstd if weight is None else weight.to(invstd.dtype) * invstd, x)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _like(result: Tensor, x: Tensor) -> Tensor:
    return result.to(x.dtype)


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return _wide(v).reshape(1, -1, *[1] * (x.dim() - 2))


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]
