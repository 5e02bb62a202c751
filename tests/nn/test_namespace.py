"""`import nnarch.nn as nn` is enough to write a network."""

from __future__ import annotations

import torch

import nnarch
import nnarch.nn as nn


def test_every_public_name_of_torch_nn_is_there():
    missing = [
        name
        for name, value in vars(torch.nn).items()
        if isinstance(value, type) and not name.startswith("_") and not hasattr(nn, name)
    ]
    assert missing == []


def test_modules_with_kernels_replace_their_twins():
    names = """Conv1d Conv2d ConvTranspose1d ConvTranspose2d Linear BatchNorm1d BatchNorm2d
        BatchNorm3d MaxPool2d AvgPool2d AdaptiveAvgPool2d AdaptiveMaxPool2d LocalResponseNorm
        LayerNorm RMSNorm Sigmoid Tanh ReLU ReLU6 LeakyReLU Hardswish Hardsigmoid SiLU GELU Upsample
        UpsamplingNearest2d UpsamplingBilinear2d MaxUnpool2d RNN LSTM GRU RNNCell LSTMCell
        GRUCell MultiheadAttention TransformerEncoderLayer TransformerDecoderLayer
        TransformerEncoder TransformerDecoder Transformer"""
    for name in names.split():
        ours, twin = getattr(nn, name), getattr(torch.nn, name)
        assert issubclass(ours, twin)
        assert ours.__module__.startswith("nnarch.nn."), name


def test_functional_is_torchs_with_our_functions_in_place():
    names = """conv1d conv2d conv_transpose1d conv_transpose2d linear batch_norm max_pool2d
        avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d local_response_norm layer_norm rms_norm
        interpolate upsample max_unpool2d"""
    for name in names.split():
        assert getattr(nn.functional, name) is getattr(nnarch.functional, name)
        assert getattr(torch.nn.functional, name) is not getattr(nnarch.functional, name)
    assert nn.functional.cross_entropy is torch.nn.functional.cross_entropy
    assert nn.functional.dropout is torch.nn.functional.dropout


def test_a_network_trains():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.body = nn.ModuleList([nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2)])
            self.head = nn.Sequential(
                nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 2)
            )
            nn.init.zeros_(self.head[-1].weight)

        def forward(self, x):
            for layer in self.body:
                x = layer(x)
            return self.scale * self.head(nn.functional.relu(x))

    # Two classes told apart by which half of the picture is brighter.
    x = torch.randn(64, 1, 8, 8)
    y = (x[..., :4].mean((1, 2, 3)) > x[..., 4:].mean((1, 2, 3))).long()
    net, loss = Net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    first = loss(net(x), y).item()
    for _ in range(30):
        optimizer.zero_grad()
        error = loss(net(x), y)
        error.backward()
        optimizer.step()
    assert error.item() < 0.3 * first
