"""The definitions of the activation operations in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from . import kinds

_FORWARD = {
    kinds.NONE: lambda z, alpha: z.clone(),
    kinds.RELU: lambda z, alpha: F.relu(z),
    kinds.RELU6: lambda z, alpha: F.relu6(z),
    kinds.LEAKY_RELU: lambda z, alpha: F.leaky_relu(z, alpha),
    kinds.HARDSWISH: lambda z, alpha: F.hardswish(z),
    kinds.HARDSIGMOID: lambda z, alpha: F.hardsigmoid(z),
    kinds.SILU: lambda z, alpha: F.silu(z),
    kinds.GELU: lambda z, alpha: F.gelu(z),
    kinds.GELU_TANH: lambda z, alpha: F.gelu(z, approximate="tanh"),
    kinds.TANH: lambda z, alpha: torch.tanh(z),
    kinds.SIGMOID: lambda z, alpha: torch.sigmoid(z),
}


def activation(x: Tensor, activation: int, alpha: float) -> Tensor:
    """act(x)"""
    return _FORWARD[activation](x, alpha)


def activation_grad(grad: Tensor, saved: Tensor, activation: int, alpha: float) -> Tensor:
    """grad · act'. `saved` is act's output for the invertible kinds, its input for the others."""
    return grad * _derivative(saved, activation, alpha)


def activation_grad_grad(
    gradgrad: Tensor, grad: Tensor, saved: Tensor, activation: int, alpha: float
) -> Tensor:
    """gradgrad · grad · d(act')/d(saved)"""
    return gradgrad * grad * _second_derivative(saved, activation)


def _derivative(s: Tensor, code: int, alpha: float) -> Tensor:
    one, zero = torch.ones_like(s), torch.zeros_like(s)
    if code == kinds.RELU:
        return torch.where(s <= 0, zero, one)
    if code == kinds.RELU6:
        return torch.where((s <= 0) | (s >= 6), zero, one)
    if code == kinds.LEAKY_RELU:
        return torch.where(s > 0, one, alpha * one)
    if code == kinds.HARDSWISH:
        return torch.where(s <= -3, zero, torch.where(s < 3, s / 3 + 0.5, one))
    if code == kinds.HARDSIGMOID:
        return torch.where((s > 0) & (s < 1), one / 6, zero)
    if code == kinds.SILU:
        return torch.sigmoid(s) * (1 + s * torch.sigmoid(-s))
    if code == kinds.GELU:
        return torch.special.ndtr(s) + s * _density(s)
    if code == kinds.GELU_TANH:
        t, slope, _ = _gelu_tanh_parts(s)
        return 0.5 * (1 + t) + 0.5 * s * (1 - t * t) * slope
    if code == kinds.TANH:
        return 1 - s * s
    if code == kinds.SIGMOID:
        return s * (1 - s)
    return one


def _second_derivative(s: Tensor, code: int) -> Tensor:
    if code == kinds.HARDSWISH:
        return ((s > -3) & (s < 3)).to(s.dtype) / 3
    if code == kinds.SILU:
        p = torch.sigmoid(s)
        return p * (1 - p) * (2 + s * (1 - 2 * p))
    if code == kinds.GELU:
        return _density(s) * (2 - s * s)
    if code == kinds.GELU_TANH:
        t, slope, bend = _gelu_tanh_parts(s)
        return (1 - t * t) * (slope + 0.5 * s * bend - s * t * slope * slope)
    if code == kinds.TANH:
        return -2 * s
    if code == kinds.SIGMOID:
        return 1 - 2 * s
    return torch.zeros_like(s)


def _density(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _gelu_tanh_parts(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tanh(u) with u = √(2/π)(z + 0.044715 z³), du/dz and d²u/dz²."""
    k, cubic = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(k * (z + cubic * z * z * z))
    return t, k * (1 + 3 * cubic * z * z), k * 6 * cubic * z


def gate(gate: Tensor, value: Tensor, activation: int, alpha: float) -> Tensor:
    """act(gate) · value"""
    return _FORWARD[activation](gate, alpha) * value


def gate_grad(
    grad: Tensor, gate: Tensor, value: Tensor, activation: int, alpha: float
) -> tuple[Tensor, Tensor]:
    """grad · value · act'(gate), and grad · act(gate)"""
    opened = _FORWARD[activation](gate, alpha)
    saved = opened if activation in kinds.INVERTIBLE else gate
    return grad * value * _derivative(saved, activation, alpha), grad * opened
