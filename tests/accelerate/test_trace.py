"""What can be traced, what keeps its own forward pass, and what is refused."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from accelerate_helpers import calls, in_float64, randomize
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import nnarch


def block():
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())


class Branches(nn.Module):
    """Control flow that depends on data."""

    def __init__(self):
        super().__init__()
        self.body = block()

    def forward(self, x):
        y = self.body(x)
        return y.view(len(y), -1).sum(1) if y.sum() > 0 else y.flatten(1).sum(1) * 2


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.stem = block()
        self.inner = inner

    def forward(self, x):
        return self.inner(self.stem(x))


def check(accelerated, model, x):
    with torch.no_grad():
        got = accelerated(x)
    torch.testing.assert_close(got.double(), in_float64(model, x), rtol=1e-4, atol=1e-4)


def test_untraceable_model_keeps_its_forward():
    model = randomize(Branches())
    with pytest.warns(UserWarning, match="the model keeps its own forward pass.*TraceError"):
        accelerated = nnarch.accelerate(model)
    assert type(accelerated.body) is Branches
    assert type(accelerated.body.body[0]) is nnarch.nn.Conv2d
    check(accelerated, model, torch.randn(2, 3, 6, 6))


def test_untraceable_submodule_is_the_only_one_left():
    model = randomize(Wrapper(Branches()))
    with pytest.warns(UserWarning, match="submodule 'inner' keeps its own forward pass"):
        accelerated = nnarch.accelerate(model)
    # Its view would fail on channels_last memory.
    assert calls(accelerated) == {"FusedConv2d": 1, "Branches": 1, "contiguous": 1}
    check(accelerated, model, torch.randn(2, 3, 6, 6))


def test_hooks_on_a_container_still_run():
    model = randomize(Wrapper(block()))
    seen = []
    model.inner.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    with pytest.warns(UserWarning, match="submodule 'inner'.*hooks"):
        accelerated = nnarch.accelerate(model)
    assert not seen
    check(accelerated, model, torch.randn(2, 3, 6, 6))
    assert seen == [torch.Tensor, torch.Tensor]  # ours, and the float64 truth's


@pytest.mark.parametrize("index", [0, 1, 2])
def test_layers_with_hooks_are_left_alone(index):
    model = randomize(block())
    model[index].register_forward_hook(lambda module, args, output: output + 1)
    accelerated = nnarch.accelerate(model)
    left = {type(m) for m in accelerated.modules()}
    assert type(model[index]) in left
    check(accelerated, model, torch.randn(2, 3, 6, 6))


def test_parametrized_layers_are_left_alone():
    model = randomize(block())
    nn.utils.parametrizations.weight_norm(model[0])
    accelerated = nnarch.accelerate(model)
    assert calls(accelerated)["ParametrizedConv2d"] == 1
    check(accelerated, model, torch.randn(2, 3, 6, 6))


def test_pruned_layers_are_left_alone():
    model = randomize(block())
    prune.random_unstructured(model[0], "weight", 0.5)
    x = torch.randn(2, 3, 6, 6)
    accelerated = nnarch.accelerate(model, x)
    torch.testing.assert_close(accelerated(x), model(x), rtol=1e-4, atol=1e-5)
    accelerated.body.get_submodule("0").weight_mask.zero_()  # its hook still computes the weight
    assert not torch.equal(accelerated(x), model(x))


def test_replaced_forward_is_respected():
    model = randomize(block())
    model[0].forward = lambda x: x * 2
    check(nnarch.accelerate(model), model, torch.randn(2, 3, 6, 6))


class CustomConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight * 2, self.bias)


def test_custom_layer_calls_our_function():
    model = nn.Sequential(CustomConv(3, 4, 3), nn.ReLU()).eval()
    accelerated = nnarch.accelerate(model)
    x = torch.randn(2, 3, 6, 6)
    with nnarch.trace() as trace:
        check(accelerated, model, x)
    assert trace.ops.count("conv2d") == 1


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.Identity()], ids=str
)
def test_a_single_layer(layer):
    x = torch.randn(2, 3, 6, 6)
    check(nnarch.accelerate(layer), layer.eval(), x)


class OptionalArguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x, mask=None, scale=1.0, *, double=False):
        x = self.conv(x) * scale
        if mask is not None:
            x = x * mask
        return x + x if double else x


def test_optional_arguments_are_fixed_at_their_defaults():
    model = OptionalArguments()
    accelerated = nnarch.accelerate(model)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(accelerated(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        accelerated(x, mask=None, scale=3.0), model(x, scale=3.0), rtol=1e-5, atol=1e-5
    )
    with pytest.raises(AssertionError, match="mask has been specialized"):
        accelerated(x, mask=torch.ones(4))
    with pytest.raises(AssertionError, match="double has been specialized"):
        accelerated(x, double=True)


class ChecksType(nn.Module):
    """A trace that succeeds and is wrong: a proxy is no Tensor."""

    def forward(self, x):
        return x + 1 if isinstance(x, torch.Tensor) else x


def test_example_input_unmasks_a_wrong_trace():
    with pytest.raises(RuntimeError, match=r"output 0 for example_input differs .* relative"):
        nnarch.accelerate(ChecksType(), torch.randn(2, 3))


def test_no_warning_for_a_traceable_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nnarch.accelerate(randomize(block()), (torch.randn(1, 3, 4, 4),))


@pytest.mark.parametrize("bad", [None, torch.relu, nn.Conv2d, {"a": 1}], ids=range(4))
def test_refuses_what_is_no_module(bad):
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch\.nn\.Module, got"):
        nnarch.accelerate(bad)


def test_refuses_wrapped_and_uncopyable_models():
    with pytest.raises(TypeError, match="must not be wrapped in DataParallel"):
        nnarch.accelerate(nn.DataParallel(block()))
    model = block()
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match="must be copyable"):
        nnarch.accelerate(model)


def test_accelerating_twice():
    model = randomize(block())
    once = nnarch.accelerate(model)
    twice = nnarch.accelerate(once)
    x = torch.randn(2, 3, 6, 6)
    assert twice is not once and torch.equal(once(x), twice(x))
    nested = nnarch.accelerate(nn.Sequential(once, copy.deepcopy(model)))
    check(nested, nn.Sequential(model, model), x)
