"""The module that accelerate() returns, and the model that it leaves untouched."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerate_helpers import calls, randomize
from torch import nn

import nnarch
from nnarch.accelerate.accelerated import weights_to_channels_last


class Net(nn.Module):
    """Every kind of node that a rewritten graph has."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(True))
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(4, 4, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.norm(self.conv(x)) + x)
        x = nn.functional.max_pool2d(x, 2)
        x = self.point(x.chunk(2, 1)[0])
        x = nn.functional.dropout(x, 0.5, self.training)
        return self.head(self.drop(nn.functional.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)))


@pytest.fixture
def model():
    return randomize(Net())


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


def test_the_graph(model):
    assert calls(nnarch.accelerate(model)) == {
        "FusedConv2d": 1,
        "ResidualConv2d": 1,
        "max_pool2d": 1,
        "chunk": 1,
        "getitem": 1,
        "channels_last": 1,
        "Conv2d": 1,
        "adaptive_avg_pool2d": 1,
        "size": 1,
        "reshape": 1,
        "Linear": 1,
    }


@pytest.mark.parametrize("training", [False, True])
def test_model_is_left_untouched(model, x, training):
    model.train(training)
    state = copy.deepcopy(model.state_dict())
    types = [type(m) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    accelerated = nnarch.accelerate(model, x)
    accelerated(x)
    assert [type(m) for m in model.modules()] == types
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in accelerated.parameters()}
    torch.testing.assert_close(accelerated(x), model.eval()(x), rtol=1e-4, atol=1e-5)


def test_train_is_refused(model):
    accelerated = nnarch.accelerate(model)
    with pytest.raises(RuntimeError, match="accelerated model is compiled for inference"):
        accelerated.train()
    with pytest.raises(RuntimeError, match="accelerated model is compiled for inference"):
        nn.Sequential(accelerated).train()
    assert accelerated.eval() is accelerated and accelerated.train(False) is accelerated
    assert not any(m.training for m in accelerated.modules())


def test_parameters_are_frozen_and_inputs_get_gradients(model, x):
    accelerated = nnarch.accelerate(model)
    assert not any(p.requires_grad for p in accelerated.parameters())
    assert not accelerated(x).requires_grad
    x1, x2 = (x.clone().requires_grad_() for _ in range(2))
    accelerated(x1).square().sum().backward()
    model(x2).square().sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad, rtol=1e-4, atol=1e-5)


def by_pickle(module):
    return pickle.loads(pickle.dumps(module))


def by_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
def test_copies_compute_the_same(model, x, duplicate):
    accelerated = nnarch.accelerate(model)
    expected = accelerated(x)
    twin = duplicate(duplicate(accelerated))
    assert calls(twin) == calls(accelerated)
    assert torch.equal(twin(x), expected)
    with pytest.raises(RuntimeError, match="compiled for inference"):
        twin.train()
    with torch.no_grad():
        twin.body.head.bias.add_(1)
    assert torch.equal(accelerated(x), expected)


def test_state_dict_round_trip(model, x):
    accelerated, other = nnarch.accelerate(model), nnarch.accelerate(randomize(Net()))
    assert not torch.equal(accelerated(x), other(x))
    other.load_state_dict(accelerated.state_dict())
    assert torch.equal(accelerated(x), other(x))


def test_moves_to_another_dtype(model, x):
    accelerated = nnarch.accelerate(model).double()
    expected = copy.deepcopy(model).double()(x.double())
    # The weights were rounded to float32 when BatchNorm was folded.
    torch.testing.assert_close(accelerated(x.double()), expected, rtol=1e-5, atol=1e-6)


def test_weights_are_packed_also_under_inference_mode(model, x):
    with torch.inference_mode():
        accelerated = nnarch.accelerate(model, x)
    layers = [m for m in accelerated.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 4
    assert all(layer._packed is not None for layer in layers)
    assert not any(p.is_inference() for p in accelerated.parameters())


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, images, other):
        y = self.conv(images)
        return {"features": y, "both": (y.relu(), other), "mean": y.mean()}


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_outputs_have_the_layout_of_the_model(format):
    model = Outputs()
    images = torch.randn(2, 3, 6, 6).contiguous(memory_format=format)
    other = torch.arange(3)
    got, expected = nnarch.accelerate(model)(images, other), model(images, other)
    assert list(got) == list(expected)
    assert got["both"][1] is other
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for mine in (got["features"], got["both"][0]):
        assert mine.is_contiguous(memory_format=format)
    assert images.is_contiguous(memory_format=format)


class ReadsStrides(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return y.as_strided((2, 4), (y.stride(0), y.stride(1)))


def test_a_graph_that_reads_strides_keeps_its_layout():
    model, x = ReadsStrides(), torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(nnarch.accelerate(model)(x), model(x), rtol=1e-5, atol=1e-5)


def test_unbatched_and_empty_inputs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    accelerated = nnarch.accelerate(nn.Sequential(model[0], model[2]))
    x = torch.randn(3, 6, 6)
    torch.testing.assert_close(accelerated(x), model[2](model[0](x)), rtol=1e-5, atol=1e-5)
    assert nnarch.accelerate(model)(torch.randn(0, 3, 6, 6)).shape == (0, 4, 4, 4)


def test_torch_compile(model, x):
    accelerated = nnarch.accelerate(model)
    compiled = torch.compile(accelerated, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), accelerated(x), rtol=1e-5, atol=1e-6)


def test_weights_of_convolutions_on_a_gpu_are_channels_last(model, x):
    """As its kernels read them: otherwise every call copies them. Here the CPU plays the GPU."""
    fast = nnarch.accelerate(model)
    expected = fast(x)
    convolutions = [layer for layer in fast.modules() if isinstance(layer, nn.Conv2d)]
    assert all(layer.weight.is_contiguous() for layer in convolutions)
    parameters = list(fast.parameters())
    weights_to_channels_last(fast.body, "cpu")
    for layer in convolutions:
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(mine is theirs for mine, theirs in zip(fast.parameters(), parameters, strict=True))
    torch.testing.assert_close(fast(x), expected)
