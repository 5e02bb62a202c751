"""The definition of local response normalization in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def local_response_norm(
    x: Tensor, size: int, scale: float, beta: float, k: float, relu: bool
) -> Tensor:
    """r / (k + scale · Σ r²)^beta over `size` neighbouring channels, where r is x or relu(x)."""
    r = x.relu() if relu else x
    return r / (k + scale * _window_sums(r * r, size // 2, (size - 1) // 2)).pow(beta)


def local_response_norm_grad(
    grad: Tensor, x: Tensor, size: int, scale: float, beta: float, k: float, relu: bool
) -> Tensor:
    """The gradient of x: every channel's response depends on its neighbours' too."""
    before, after = size // 2, (size - 1) // 2
    r = x.relu() if relu else x
    s = k + scale * _window_sums(r * r, before, after)
    p = s.pow(-beta)
    through = _window_sums(grad * r * p / s, after, before)  # the windows that hold a channel
    dx = grad * p - 2 * scale * beta * r * through
    return torch.where(x <= 0, torch.zeros_like(dx), dx) if relu else dx


def _window_sums(t: Tensor, before: int, after: int) -> Tensor:
    """Σ t[:, c - before : c + after + 1] for every channel c; channels outside count as 0."""
    channels = t.shape[1]
    sums = torch.zeros_like(t)
    for shift in range(-min(before, channels - 1), min(after, channels - 1) + 1):
        first, last = max(0, -shift), min(channels, channels - shift)
        sums[:, first:last] += t[:, first + shift : last + shift]
    return sums
