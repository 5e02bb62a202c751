"""accelerate() on whole models: same outputs, and nothing left for torch's kernels."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from accelerate_helpers import calls, in_float64, randomize
from tolerances import assert_as_accurate

import nnarch

torchvision_models = pytest.importorskip("torchvision.models")

# Folding and fusing round differently from torch at every layer, hence a factor above the usual 2.
FACTOR = 4.0
ULPS = 64.0

FUSED = (
    "FusedConv2d", "ResidualConv2d", "Conv2d", "SeparableConv2d",
    "FusedLinear", "ResidualLinear", "Linear",
)  # fmt: skip


def check(model, x, accelerated):
    """The accelerated model is as accurate as torch, against float64."""
    with torch.no_grad():
        assert_as_accurate(accelerated(x), model(x), in_float64(model, x), factor=FACTOR, ulps=ULPS)


def build(name):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return randomize(torchvision_models.get_model(name, weights=None, num_classes=10, **options))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", {"conv2d": 20, "max_pool2d": 1, "adaptive_avg_pool2d": 1, "linear": 1}),
        ("resnet50", {"conv2d": 53, "max_pool2d": 1, "adaptive_avg_pool2d": 1, "linear": 1}),
        (
            "mobilenet_v2",
            {
                "conv2d": 2,
                "depthwise_separable_conv2d": 1,
                "inverted_residual": 16,
                "adaptive_avg_pool2d": 1,
                "linear": 1,
            },
        ),
    ],
)
def test_runs_exactly_its_convolutions(name, layers):
    model = build(name)
    x = torch.randn(2, 3, 64, 64)
    accelerated = nnarch.accelerate(model)
    with nnarch.trace() as trace, torch.no_grad():
        accelerated(x)
    assert Counter(trace.ops) == layers
    with torch.profiler.profile() as profile, torch.no_grad():
        accelerated(x)
    by_torch = {event.key for event in profile.key_averages()}
    assert "nnarch::conv2d" in by_torch  # the profiler sees operations at all
    assert not [key for key in by_torch if "conv" in key and not key.startswith("nnarch::")]
    assert not by_torch & {"aten::batch_norm", "aten::relu_", "aten::hardtanh_", "aten::add_"}
    assert not by_torch & {"aten::relu", "aten::hardtanh", "aten::add", "aten::linear"}
    check(model, x, accelerated)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("squeezenet1_1", {"cat"}),
        ("mnasnet0_5", {"mean"}),
        ("mobilenet_v3_small", {"mul"}),
        ("regnet_y_400mf", {"mul"}),
        ("efficientnet_b0", {"mul"}),
        ("googlenet", {"cat"}),
        ("densenet121", {"cat", "FusedBatchNorm2d"}),
    ],
)
def test_other_architectures(name, left):
    model = build(name)
    accelerated = nnarch.accelerate(model)
    pools = {name for name in calls(accelerated) if "ool" in name}
    assert set(calls(accelerated)) <= left | pools | {*FUSED, "flatten"}
    check(model, torch.randn(2, 3, 64, 64), accelerated)


@pytest.mark.parametrize("name", ["alexnet", "vgg11_bn"])
def test_plain_stacks(name):
    model = build(name).features  # the classifier is 100 million parameters of Linear
    accelerated = nnarch.accelerate(model)
    assert set(calls(accelerated)) == {"FusedConv2d", "MaxPool2d"}
    check(model, torch.randn(2, 3, 64, 64), accelerated)


def test_channel_shuffles_return_to_channels_last():
    model = build("shufflenet_v2_x0_5")
    accelerated = nnarch.accelerate(model)
    # view needs the strides that its author saw; reshape does not.
    assert "view" not in calls(accelerated)
    assert calls(accelerated)["channels_last"] == 18
    check(model, torch.randn(2, 3, 64, 64), accelerated)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["convnext_tiny", "inception_v3", "swin_t", "maxvit_t"])
def test_large_architectures(name):
    model = build(name)
    size = 224 if name == "maxvit_t" else 80
    check(model, torch.randn(1, 3, size, size), nnarch.accelerate(model))


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18", "mobilenet_v2"])
def test_our_models(name):
    model = randomize(nnarch.create_model(name, num_classes=10))
    accelerated = nnarch.accelerate(model)
    assert not {"BatchNorm2d", "ReLU", "ReLU6", "add", "iadd"} & set(calls(accelerated))
    check(model, torch.randn(2, 3, 32, 32), accelerated)


def test_float64():
    model = build("resnet18").double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    check(model, x, nnarch.accelerate(model))


def test_example_input_is_verified():
    model = build("resnet18")
    accelerated = nnarch.accelerate(model, torch.randn(1, 3, 64, 64))
    assert calls(accelerated)["ResidualConv2d"] == 8
