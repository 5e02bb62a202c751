"""Recurrent layers of torch in accelerated models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnarch
import nnarch.nn


class Detector(nn.Module):
    """As silero-vad: spectrum by convolution, convolutions, an LSTM cell, a probability."""

    def __init__(self):
        super().__init__()
        self.stft = nn.Conv1d(1, 18, 16, stride=8, bias=False)
        self.conv1 = nn.Conv1d(9, 12, 3, padding=1)
        self.conv2 = nn.Conv1d(12, 16, 3, stride=2, padding=1)
        self.cell = nn.LSTMCell(16, 16)
        self.last = nn.Conv1d(16, 1, 1)

    def forward(self, chunk, h, c):
        real, imaginary = self.stft(chunk[:, None]).chunk(2, 1)
        x = (real.square() + imaginary.square()).sqrt()
        x = self.conv2(self.conv1(x).relu()).relu().mean(2)
        h, c = self.cell(x, (h, c))
        return self.last(h.relu()[:, :, None]).sigmoid().flatten(), h, c


def test_a_detector_steps_through_chunks():
    model = Detector().eval()
    fast = nnarch.accelerate(model)
    assert isinstance(fast.body.get_submodule("cell"), nnarch.nn.LSTMCell)
    theirs = ours = (torch.zeros(2, 16),) * 2
    with torch.no_grad():
        for _ in range(4):
            chunk = torch.randn(2, 64)
            expected, *theirs = model(chunk, *theirs)
            got, *ours = fast(chunk, *ours)
            torch.testing.assert_close((got, *ours), (expected, *theirs), rtol=1e-4, atol=1e-5)
    assert list(fast.body.get_submodule("cell")._packed.packed) == [0]


class Tagger(nn.Module):
    """Convolution over pictures of lines, recurrent layers along them."""

    def __init__(self, layer, **options):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.rnn = layer(6 * 8, 10, 2, bidirectional=True, batch_first=True, dropout=0.5, **options)
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.head(self.rnn(x.flatten(1, 2).transpose(1, 2))[0])


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_are_exchanged_and_packed(layer):
    model = Tagger(layer)
    model(torch.randn(4, 1, 8, 12))  # statistics
    x = torch.randn(2, 1, 8, 12)
    fast = nnarch.accelerate(model, x)
    rnn = fast.body.get_submodule("rnn")
    assert type(rnn) is getattr(nnarch.nn, layer.__name__)
    assert len(rnn._packed.packed) == 4
    with torch.no_grad():
        expected = model.eval()(x)
        for _ in range(3):  # the second call runs the recorded program
            torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-5)
        rnn.weight_hh_l0.mul_(2)  # nothing stale is used
        model.rnn.weight_hh_l0.mul_(2)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    with nnarch.trace() as record:
        fast(x)
    scans = [entry for entry in record if entry.op == "recurrent_scan"]
    assert [entry.backend for entry in scans] == ["cpu"] * 4


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_exchanged(cell):
    model = nn.Sequential(nn.Linear(5, 3), cell(3, 4))
    x = torch.randn(2, 5)
    fast = nnarch.accelerate(model, x)
    assert type(fast.body.get_submodule("1")) is getattr(nnarch.nn, cell.__name__)


def test_functions_of_torch_are_exchanged():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.ParameterList([torch.randn(12, 3), torch.randn(12, 4)])

        def forward(self, x, h):
            return torch.gru_cell(x, h, *self.cell)

    model = Net()
    fast = nnarch.accelerate(model, (torch.randn(2, 3), torch.randn(2, 4)))
    assert any(n.target is nnarch.functional.gru_cell for n in fast.body.graph.nodes)


def test_the_models_of_the_registry():
    for name in ("gru_classifier", "lstm_classifier", "rnn_classifier", "lstm_forecaster"):
        model = nnarch.create_model(name, hidden=12, nn=torch.nn)
        x = torch.randint(100, (9, 2)) if "class" in name else torch.randn(9, 2, 1)
        fast = nnarch.accelerate(model, x)
        assert any(type(m).__module__ == "nnarch.nn.recurrent" for m in fast.modules())
