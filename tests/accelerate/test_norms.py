"""Layer and RMS normalization in accelerated models: layers and functions are exchanged."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as TF

import nnarch


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.RMSNorm(24, 1e-5))
        self.scale = nn.Parameter(torch.rand(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = TF.layer_norm(x + self.norms(x), (24,), weight=self.scale, eps=1e-3)
        return torch.rms_norm(y, (24,), self.scale) + TF.rms_norm(y, (24,))


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
def test_layers_and_functions_are_exchanged(shape):
    net = _Net().eval()
    x = torch.randn(shape)
    accelerated = nnarch.accelerate(net)
    with torch.no_grad():
        expected = net(x)
        with nnarch.trace() as trace:
            actual = accelerated(x)
        torch.testing.assert_close(actual, expected)
    assert [entry.op for entry in trace].count("layer_norm") == 5
    assert type(net.norms[0]) is nn.LayerNorm  # the model that was given stays as it was
