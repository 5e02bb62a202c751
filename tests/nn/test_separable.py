"""DepthwiseSeparableConv2d: one kernel, the parameters of a pair of convolutions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn as torch_nn

import nnarch
import nnarch.nn as nn


def pair(**options) -> torch_nn.Sequential:
    return torch_nn.Sequential(
        torch_nn.Conv2d(8, 16, 3, 2, 1, groups=8, **options), torch_nn.Conv2d(16, 5, 1, **options)
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_computes_what_a_pair_computes_and_loads_its_parameters(bias, training):
    depthwise, pointwise = both = pair(bias=bias)
    ours = nn.DepthwiseSeparableConv2d(
        8, 5, 3, 2, 1, depth_multiplier=2, bias=bias, depthwise_activation="relu6",
        activation="silu",
    ).train(training)  # fmt: skip
    ours.depthwise.load_state_dict(depthwise.state_dict())
    ours.pointwise.load_state_dict(pointwise.state_dict())
    names = {"depthwise.weight", "pointwise.weight"}
    if bias:
        names |= {"depthwise.bias", "pointwise.bias"}
    assert set(ours.state_dict()) == names
    x = torch.randn(2, 8, 20, 21)
    with torch.no_grad(), nnarch.trace() as trace:
        y = ours(x)
    assert "depthwise_separable_conv2d" in trace.ops and "conv2d" not in trace.ops
    expected = torch.nn.functional.silu(pointwise(depthwise(x).clamp(0, 6)))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    ours(x).sum().backward()
    torch.nn.functional.silu(pointwise(depthwise(x).clamp(0, 6))).sum().backward()
    for mine, theirs in zip(ours.parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3)


def test_packs_in_eval_mode_and_notices_a_change():
    module = nn.DepthwiseSeparableConv2d(8, 4, 3, padding="same").eval()
    x = torch.randn(1, 8, 9, 9)
    with torch.no_grad():
        first = module(x)
        packed = module.depthwise._packed, module.pointwise._packed
        module(x)
    assert all(cache is not None and cache.packed for cache in packed)
    assert packed == (module.depthwise._packed, module.pointwise._packed)
    with torch.no_grad():
        module.pointwise.weight.mul_(2)
        module.pointwise.bias.mul_(2)
        torch.testing.assert_close(module(x), 2 * first)
    module.train()
    assert module.depthwise._packed is None


def test_residual_and_one_image():
    module = nn.DepthwiseSeparableConv2d(6, 6, 3, padding=1, activation="relu")
    x = torch.randn(2, 6, 7, 7)
    z = module.pointwise(module.depthwise(x))
    torch.testing.assert_close(module(x, x), (z + x).relu())
    torch.testing.assert_close(module(x[0], x[0]), module(x, x)[0])


def test_copies_and_repr():
    module = nn.DepthwiseSeparableConv2d(
        6, 4, (3, 5), dilation=2, activation=("leaky_relu", 0.1), dtype=torch.float64
    ).eval()
    x = torch.randn(1, 6, 20, 20, dtype=torch.float64)
    expected = module(x)
    for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(clone(x), expected)
    assert "activation=('leaky_relu', 0.1)" in repr(module)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"activation": "mish"}, ValueError),
        ({"depth_multiplier": 0}, ValueError),
        ({"stride": 2, "padding": "same"}, ValueError),
        ({"dtype": torch.int32}, (ValueError, RuntimeError, TypeError)),
    ],
)
def test_bad_arguments(options, error):
    with pytest.raises(error):
        nn.DepthwiseSeparableConv2d(6, 4, 3, **options)


def test_compiles_whole():
    module = nn.DepthwiseSeparableConv2d(6, 4, 3, activation="relu").eval()
    x = torch.randn(1, 6, 9, 9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
