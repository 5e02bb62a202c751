"""summary(): counts, shapes, and that it changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nnarch
import nnarch.nn as nn


def small_net(nn=nn):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=8, bias=False),
        nn.ConvTranspose2d(16, 4, 4, stride=2, groups=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def test_flops_are_those_that_torch_counts():
    net = small_net(torch.nn).eval()
    x = torch.randn(3, 3, 17, 19)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    assert nnarch.summary(net, x).flops == counter.get_total_flops()
    assert nnarch.summary(small_net(), (3, 3, 17, 19)).flops == counter.get_total_flops()


def test_rows():
    rows = nnarch.summary(small_net(), (3, 3, 17, 19)).rows
    assert [row.name for row in rows] == [str(i) for i in range(8)]
    assert rows[0].kind == "Conv2d"
    assert rows[0].output_shape == (3, 8, 9, 10)
    assert rows[0].parameters == 8 * 27 + 8
    assert rows[0].macs == 3 * 8 * 9 * 10 * 27
    assert rows[2].macs == 0


@pytest.mark.parametrize("given", ["shape", "tensor"])
def test_the_model_does_not_change(given):
    net = small_net().train()
    net[1].eval()  # a mixture of modes must come back
    before = copy.deepcopy(net.state_dict())
    modes = [m.training for m in net.modules()]
    nnarch.summary(net, (3, 3, 17, 19) if given == "shape" else torch.randn(3, 3, 17, 19))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    assert net(torch.randn(3, 3, 17, 19)).requires_grad


def test_a_failing_model_is_left_as_it_was():
    net = small_net().train()
    with pytest.raises(Exception, match=r".+"):
        nnarch.summary(net, (3, 99, 17, 19))
    assert all(m.training and not m._forward_hooks for m in net.modules())


def test_several_inputs_and_shared_layers():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(4, 4, bias=False)

        def forward(self, a, b):
            return self.shared(a) + self.shared(b)

    table = nnarch.summary(Two(), (torch.randn(2, 4), torch.randn(3, 1, 4)))
    assert [row.output_shape for row in table.rows] == [(2, 4), (3, 1, 4)]
    assert table.parameters == 16
    assert table.macs == (2 + 3) * 16


def test_text():
    text = str(nnarch.summary(nnarch.create_model("cifar_resnet20"), (1, 3, 32, 32)))
    for words in ("CifarResNet", "layer3.2.conv2", "1×64×8×8", "36,864", "269,722", "81.1"):
        assert words in text


@pytest.mark.parametrize("bad", ["resnet", (), 3, (1, 2.5), None])
def test_bad_input(bad):
    with pytest.raises(TypeError, match="summary: input must be a shape"):
        nnarch.summary(small_net(), bad)


def test_a_module_under_two_names_keeps_its_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    net = Net()
    weight = net.first.weight
    assert nnarch.summary(net, (2, 4)).macs == 2 * 2 * 16
    assert net.first.weight is weight and not weight.is_meta


def test_capsules_are_counted():
    dense = nnarch.nn.DenseCapsules(6, 4, 3, 5, iterations=3)
    votes = 2 * 3 * 6 * 5  # of two samples
    assert nnarch.summary(dense, (2, 6, 4)).macs == votes * (4 + 3 + 2)
    windows = nnarch.nn.ConvCapsules2d(6, 4, 3, 5, 3, iterations=1)
    table = nnarch.summary(windows, (2, 6, 4, 7, 8))
    assert table.macs == 5 * 6 * votes * 3 * 3 * (4 + 1)


def test_attention_is_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    table = nnarch.summary(layer, (3, 5, 8))
    products = 3 * 5 * (4 * 8 * 8 + 2 * 8 * 16)
    assert table.macs == products + 2 * 3 * 5 * 5 * 8
    assert table.parameters == sum(row.parameters for row in table.rows)
    look = nn.MultiheadAttention(8, 2, kdim=3, vdim=4)
    inputs = [torch.randn(5, 3, 8), torch.randn(7, 3, 3), torch.randn(7, 3, 4)]
    expected = 2 * 15 * 64 + 21 * (3 + 4) * 8 + 2 * 15 * 7 * 8
    assert nnarch.summary(look, inputs).macs == expected
