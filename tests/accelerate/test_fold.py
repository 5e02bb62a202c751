"""BatchNorm folding: exact where it may happen, left alone where it may not."""

from __future__ import annotations

import pytest
import torch
from accelerate_helpers import calls, in_float64, randomize
from torch import nn

import nnarch
from nnarch.accelerate.fold import folded


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("layer", "norm", "size"),
    [
        (lambda bias: nn.Conv1d(3, 4, 3, bias=bias), nn.BatchNorm1d, (2, 3, 9)),
        (lambda bias: nn.Conv2d(4, 8, 3, groups=2, bias=bias), nn.BatchNorm2d, (2, 4, 5, 6)),
        (lambda bias: nn.Conv2d(4, 8, 3, groups=4, bias=bias), nn.BatchNorm2d, (2, 4, 5, 6)),
        (lambda bias: nn.Conv3d(2, 3, 2, bias=bias), nn.BatchNorm3d, (1, 2, 4, 4, 4)),
        (lambda bias: nn.Linear(5, 4, bias=bias), nn.BatchNorm1d, (3, 5)),
    ],
    ids=["conv1d", "grouped", "depthwise", "conv3d", "linear"],
)
def test_folded_weights_are_exact(layer, norm, size, affine, bias):
    first = layer(bias).double()
    model = randomize(nn.Sequential(first, norm(first.weight.shape[0], affine=affine).double()))
    x = torch.randn(size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(folded(*model)(x), model(x), rtol=1e-12, atol=1e-12)


def test_folding_rounds_once():
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    conv, norm = model
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    expected = (conv.weight.double() * scale.view(-1, 1, 1, 1)).float()
    assert torch.equal(folded(conv, norm).weight, expected)
    assert folded(conv, norm).weight is not conv.weight


def count_norms(model):
    return calls(nnarch.accelerate(model)).get("BatchNorm2d", 0)


def test_folds_a_chain_of_norms():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU())
    accelerated = nnarch.accelerate(randomize(model))
    assert calls(accelerated) == {"FusedConv2d": 1}
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(accelerated(x).double(), in_float64(model, x), rtol=1e-5, atol=1e-5)


def test_keeps_norm_of_batch_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert count_norms(model) == 1
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(nnarch.accelerate(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_keeps_norm_behind_an_activation():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    assert count_norms(randomize(model)) == 1


class ReadsConvTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y.abs()


def test_keeps_norm_whose_input_others_read():
    model = randomize(ReadsConvTwice())
    accelerated = nnarch.accelerate(model)
    assert calls(accelerated)["BatchNorm2d"] == 1
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(accelerated(x).double(), in_float64(model, x), rtol=1e-5, atol=1e-5)


class ReadsShape(ReadsConvTwice):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y).reshape(y.shape[0], y.size(1), -1)


def test_reading_a_shape_is_no_second_user():
    model = randomize(ReadsShape())
    accelerated = nnarch.accelerate(model)
    assert "BatchNorm2d" not in calls(accelerated)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(accelerated(x).double(), in_float64(model, x), rtol=1e-5, atol=1e-5)


class NormByFunction(nn.BatchNorm2d):
    """As the normalization layers of timm, which check, call the function and activate."""

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected [N, C, H, W]")
        y = torch.nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            0.1,
            self.eps,
        )
        return torch.relu(y)


def test_folds_the_function_too():
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), NormByFunction(4, eps=0.1)))
    accelerated = nnarch.accelerate(model)
    assert calls(accelerated) == {"FusedConv2d": 1, "getattr": 1, "eq": 1, "_assert": 1}
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(accelerated(x).double(), in_float64(model, x), rtol=1e-5, atol=1e-5)


class OneConvTwoNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.first = nn.BatchNorm2d(3)
        self.second = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(self.second(self.conv(torch.relu(self.first(self.conv(x))))))


def test_a_shared_convolution_is_folded_for_each_caller():
    model = randomize(OneConvTwoNorms())
    accelerated = nnarch.accelerate(model)
    assert calls(accelerated) == {"FusedConv2d": 1, "Conv2d": 2}
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(accelerated(x).double(), in_float64(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("flat", [False, True], ids=["unknown rank", "flattened"])
def test_norm_behind_linear_needs_a_matrix(flat):
    layers = [nn.Linear(5, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5)]
    model = randomize(nn.Sequential(*([nn.Flatten()] if flat else []), *layers))
    accelerated = nnarch.accelerate(model)
    assert calls(accelerated)["BatchNorm1d"] == (0 if flat else 2)
    # With as many positions as features the two dimensions cannot be told apart by size.
    x = torch.randn(3, 5) if flat else torch.randn(3, 5, 5)
    torch.testing.assert_close(accelerated(x).double(), in_float64(model, x), rtol=1e-5, atol=1e-5)
