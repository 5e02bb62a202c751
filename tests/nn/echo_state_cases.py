"""A series, and a small echo-state network that learns it."""

from __future__ import annotations

import numpy as np
import torch

from nnarch import nn


def sine(steps: int, features: int = 1) -> np.ndarray:
    t = np.arange(steps)[:, None] * (0.2 + 0.05 * np.arange(features))
    return np.sin(t) * np.cos(0.31 * t)


def network(**options) -> nn.EchoStateNetwork:
    defaults = dict(washout=50, seed=3, connectivity=0.1, leak=0.5, ridge=1e-8)
    return nn.EchoStateNetwork(1, 60, 1, **(defaults | {"dtype": torch.float64} | options))
