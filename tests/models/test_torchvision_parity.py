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


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_every_gradient_and_statistic(name, training):
    models = make_models(name)
    x = torch.randn(2, 3, 64, 64)
    target = torch.tensor([3, 7])
    for model in models:
        model.train(training)
        logits = model(x.to(next(model.parameters()).dtype))
        torch.nn.functional.cross_entropy(logits, target).backward()
    ours, theirs, exact = models
    for (what, mine), other, truth in zip(
        ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True
    ):
        # Where a ReLU's input is within rounding of zero, one summation order lets the gradient
        # through and another does not: single elements may differ by more than torch's own error.
        assert_as_accurate(mine.grad, other.grad, truth.grad, factor=4, ulps=256, what=what)
    for (what, mine), other, truth in zip(
        ours.named_buffers(), theirs.buffers(), exact.buffers(), strict=True
    ):
        if mine.is_floating_point():
            assert_as_accurate(mine, other, truth, ulps=64, what=what)
        else:
            assert torch.equal(mine, other), what
