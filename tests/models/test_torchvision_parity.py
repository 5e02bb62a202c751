"""Whole models with torchvision's weights: logits, every parameter gradient, running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from tolerances import assert_as_accurate

from nnarch import create_model

torchvision = pytest.importorskip("torchvision")

MODELS = ["resnet18", "resnet50", "mobilenet_v2"]


def make_models(name):
    """(ours, torchvision's, torchvision's in float64) with the same weights."""
    theirs = getattr(torchvision.models, name)(num_classes=10)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # a fresh one is the identity: hides errors
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, 0, 0.1)
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
        elif isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours = create_model(name, num_classes=10, **({"dropout": 0} if "mobile" in name else {}))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, copy.deepcopy(theirs).double()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits(name, layout):
    models = make_models(name)
    x = torch.randn(2, 3, 64, 64).to(memory_format=layout)
    with torch.inference_mode():
        mine, theirs, exact = (m.eval()(x.to(next(m.parameters()).dtype)) for m in models)
    assert_as_accurate(mine, theirs, exact, ulps=16, what="logits")


def step(model, x, training):
    """Loss gradients and, in training, new running statistics; by name, in float64."""
    model.train(training)
    logits = model(x.to(next(model.parameters()).dtype))
    torch.nn.functional.cross_entropy(logits, torch.tensor([3, 7])).backward()
    results = {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    return {name: value.double() for name, value in results.items()}


# Gradients jump where a ReLU's input is within rounding of zero: one summation order lets a
# gradient through that another one stops. In float64 that does not happen to any of the million
# inputs here, so agreement is close to rounding. In float32 it does, and each time moves gradients
# by some percent; torch's own stray from float64 as far (5e-2 was seen).
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 0.15)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow), "mobilenet_v2"]
)
def test_every_gradient_and_statistic(name, training, dtype, bound):
    ours, _, exact = make_models(name)
    x = torch.randn(2, 3, 64, 64)
    mine, truth = step(ours.to(dtype), x, training), step(exact, x, training)
    assert mine.keys() == truth.keys()
    # Some gradients are zero: what a bias adds, BatchNorm behind it takes away.
    negligible = 1e-3 * torch.stack([value.norm() for value in truth.values()]).median()
    for what in truth:
        error = (mine[what] - truth[what]).norm() / truth[what].norm().clamp_min(negligible)
        assert error <= bound, f"{what}: relative L2 error {error:.2e}"
