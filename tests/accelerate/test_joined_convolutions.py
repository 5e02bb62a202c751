"""Depthwise convolutions joined with the 1×1 convolutions around them."""

from __future__ import annotations

import pytest
import torch
from accelerate_helpers import calls
from torch import nn

import nnarch


def block(wide=24, **depthwise):
    return nn.Sequential(
        nn.Conv2d(8, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6(),
        nn.Conv2d(wide, wide, 3, padding=1, groups=wide, **depthwise), nn.BatchNorm2d(wide),
        nn.ReLU6(), nn.Conv2d(wide, 8, 1), nn.BatchNorm2d(8),
    ).eval()  # fmt: skip


class Residual(nn.Module):
    def __init__(self, body, add):
        super().__init__()
        self.body, self.add = body, add

    def forward(self, x):
        return self.add(x, self.body(x))


def agree(model, x):
    accelerated = nnarch.accelerate(model)
    with torch.no_grad():
        for _ in range(2):  # the graph, then its program
            torch.testing.assert_close(accelerated(x), model(x), rtol=1e-4, atol=1e-4)
    return accelerated


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_inverted_residual_is_one_operation(memory_format):
    model = Residual(block(), lambda x, y: x + y)
    x = torch.randn(2, 8, 11, 12).contiguous(memory_format=memory_format)
    accelerated = agree(model, x)
    assert calls(accelerated) == {"SeparableConv2d": 1}
    with nnarch.trace() as trace, torch.no_grad():
        accelerated(x)
    assert trace.ops == ["inverted_residual"]


def test_without_an_expansion():
    accelerated = agree(block()[3:], torch.randn(2, 24, 11, 12))
    with nnarch.trace() as trace, torch.no_grad():
        accelerated(torch.randn(2, 24, 11, 12))
    assert trace.ops == ["depthwise_separable_conv2d"]


def test_what_others_read_stays():
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            z = self.a(x)
            return self.b(z), z.mean()

    model = Tapped().eval()
    accelerated = nnarch.accelerate(model)
    assert "SeparableConv2d" not in calls(accelerated)
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(accelerated(x), model(x))


@pytest.mark.parametrize(
    "options", [{"padding_mode": "reflect"}, {"dilation": 2}, {"stride": 2}], ids=str
)
def test_options_of_the_depthwise_convolution(options):
    accelerated = agree(block(**options), torch.randn(1, 8, 13, 13))
    assert ("SeparableConv2d" in calls(accelerated)) == ("padding_mode" not in options)


def test_a_residual_that_broadcasts():
    agree(Residual(block(), lambda x, y: y + x.mean((2, 3), keepdim=True)), torch.randn(2, 8, 9, 9))


def test_gradients_of_inputs():
    model = block()
    x = torch.randn(1, 8, 9, 9, requires_grad=True)
    (ours,) = torch.autograd.grad(nnarch.accelerate(model)(x).sum(), x)
    (theirs,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_changed_weight_is_noticed():
    accelerated = nnarch.accelerate(block())
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        before = [accelerated(x) for _ in range(2)][-1]
        (layer,) = [m for m in accelerated.modules() if type(m).__name__ == "SeparableConv2d"]
        layer.depthwise.weight.mul_(-2)
        after = accelerated(x)
    assert not torch.allclose(before, after)
    with nnarch.use_backend("reference"), torch.no_grad():
        torch.testing.assert_close(accelerated(x), after, rtol=1e-4, atol=1e-4)


def test_replaced_data_is_noticed():
    """A parameter's data exchanged without a trace in its version."""
    accelerated = nnarch.accelerate(block())
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        before = [accelerated(x) for _ in range(2)][-1]
        (layer,) = [m for m in accelerated.modules() if type(m).__name__ == "SeparableConv2d"]
        layer.project.weight.data = layer.project.weight.detach() * 2
        assert not torch.allclose(accelerated(x), before)
