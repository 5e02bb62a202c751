"""On a real GPU: recurrent modules and reservoirs, against torch's on the same GPU."""

import numpy as np
import pytest
import torch
from on_a_gpu import DEVICE, MARKS, assert_ran, by_dtype, check
from torch.nn.utils.rnn import pack_padded_sequence

import nnarch
from nnarch import functional as F
from nnarch import nn

pytestmark = MARKS

# Options, and the hidden size: 40 takes the small kernel, 200 steps (or, forward, the persistent).
MODULES = {
    "lstm": ("LSTM", {"num_layers": 2, "bidirectional": True}, 40),
    "lstm projected": ("LSTM", {"proj_size": 30}, 50),
    "gru": ("GRU", {"num_layers": 2, "bidirectional": True}, 40),
    "gru of 200": ("GRU", {"batch_first": True}, 200),
    "rnn relu": ("RNN", {"nonlinearity": "relu", "bidirectional": True}, 40),
}
PERSISTENT = [  # few sequences
    ("LSTM", torch.bfloat16),
    ("GRU", torch.float16),
    ("RNN", torch.float32),
]


def flat(result):
    """y and the states, of a tensor or of a packed sequence."""
    y, states = result
    states = states if isinstance(states, tuple) else (states,)
    return y if isinstance(y, torch.Tensor) else y.data, *states


def packed(module, x):
    lengths = torch.tensor([3, 7, 1, 7, 4, 2, 7, 7, 7, 5][: x.shape[1]])
    return flat(module(pack_padded_sequence(x, lengths, enforce_sorted=False)))


@pytest.mark.parametrize("name", MODULES)
@by_dtype
def test_modules(name, dtype):
    kind, options, hidden = MODULES[name]
    ours, twin = (getattr(n, kind)(24, hidden, **options) for n in (nn, torch.nn))
    x = torch.randn(7, 10, 24)
    x = x.transpose(0, 1) if options.get("batch_first") else x
    check(ours, twin, [x], dtype, call=lambda m, x: flat(m(x)), factor=4, ulps=32)


@pytest.mark.parametrize("name", ["lstm", "gru", "gru of 200"])
@by_dtype
def test_packed_sequences(name, dtype):
    kind, options, hidden = MODULES[name]
    options = options | {"batch_first": False}
    ours, twin = (getattr(n, kind)(24, hidden, **options) for n in (nn, torch.nn))
    check(ours, twin, [torch.randn(7, 10, 24)], dtype, call=packed, factor=4, ulps=32)


@pytest.mark.parametrize(("kind", "dtype"), PERSISTENT, ids=str)
def test_the_persistent_scan(kind, dtype):
    """Whole and packed sequences, with states to start from, in both directions."""
    ours, twin = (getattr(n, kind)(24, 200, bidirectional=True) for n in (nn, torch.nn))
    states = [torch.randn(2, 3, 200) for _ in range(2 if kind == "LSTM" else 1)]

    def whole(module, x, *states):
        return flat(module(x, tuple(states) if kind == "LSTM" else states[0]))

    tensors = [torch.randn(7, 3, 24), *states]
    options = {"gradients": False, "factor": 4, "ulps": 32}
    for call, given in ((whole, tensors), (packed, tensors[:1])):
        record = check(ours, twin, given, dtype, call=call, **options)
        if DEVICE == "cuda":
            assert {e.algorithm for e in record if e.op == "recurrent_scan"} == {"persistent"}


@pytest.mark.parametrize("batch", [1, 37])
@by_dtype
def test_cells(batch, dtype):
    x, h, c = torch.randn(batch, 24), torch.randn(batch, 65), torch.randn(batch, 65)
    lstm, gru, rnn = (
        [getattr(n, kind)(24, 65) for n in (nn, torch.nn)]
        for kind in ("LSTMCell", "GRUCell", "RNNCell")
    )
    options = {"factor": 4, "ulps": 16}
    check(*lstm, [x, h, c], dtype, call=lambda m, x, h, c: m(x, (h, c)), **options)
    check(*gru, [x, h], dtype, **options)
    check(*rnn, [x, h], dtype, **options)


class SpelledOut(nn.LayerNormLSTM):
    """Ba, Kiros and Hinton, 2016, equations 20 to 22."""

    def forward(self, x):
        def normalized(v, name):
            weight, bias = (getattr(self, f"norm_{name}_{n}_l0") for n in ("weight", "bias"))
            return torch.nn.functional.layer_norm(v, v.shape[-1:], weight, bias, self.eps)

        h = c = x.new_zeros(x.shape[1], self.hidden_size)
        outputs = []
        for step in x:
            gates = normalized(step @ self.weight_ih_l0.t(), "ih")
            gates = gates + normalized(h @ self.weight_hh_l0.t(), "hh")
            i, f, g, o = (gates + self.bias_ih_l0 + self.bias_hh_l0).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * normalized(c, "c").tanh()
            outputs.append(h)
        return torch.stack(outputs), (h[None], c[None])


@by_dtype
def test_layer_norm_lstm(dtype):
    ours, twin = nn.LayerNormLSTM(24, 50), SpelledOut(24, 50)
    for name, parameter in twin.named_parameters():
        if name.startswith("norm"):
            torch.nn.init.normal_(parameter, mean=float("weight" in name), std=0.2)
    check(
        ours, twin, [torch.randn(6, 5, 24)], dtype, call=lambda m, x: flat(m(x)), factor=4, ulps=32
    )


def test_two_runs_are_bitwise_equal():
    module, x = nn.LSTM(24, 200, 2).to(DEVICE), torch.randn(9, 70, 24, device=DEVICE)
    runs = []
    for _ in range(2):
        y, _ = module(x)
        grads = torch.autograd.grad(y.square().sum(), list(module.parameters()))
        runs.append([y, *grads])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------ reservoirs

RESERVOIR = "numba" if DEVICE == "cuda" else "cpu"
DOUBLES = [torch.float32, torch.float64]


@pytest.mark.parametrize("kernel", ["shared", "grid"])
@pytest.mark.parametrize("dtype", DOUBLES, ids=str)
def test_reservoir(dtype, kernel, monkeypatch):
    monkeypatch.setenv("NNARCH_RESERVOIR_KERNEL", kernel)
    layer = nn.Reservoir(3, 333, connectivity=0.05, leak=0.7, bias_scaling=0.1, dtype=dtype)
    x = torch.randn(40, 5, 3, dtype=dtype)
    expected = layer(x, skip=4)
    with nnarch.trace() as record:
        got = layer.to(DEVICE)(x.to(DEVICE), skip=4)
    assert_ran(record, RESERVOIR)
    if DEVICE == "cuda":
        assert [e.algorithm for e in record if e.op == "reservoir_scan"] == [kernel]
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel", ["shared", "grid"])
def test_a_reservoir_that_runs_freely(kernel, monkeypatch):
    monkeypatch.setenv("NNARCH_RESERVOIR_KERNEL", kernel)
    layer = nn.Reservoir(3, 200, connectivity=0.1, dtype=torch.float64, spectral_radius=0.5)
    w_out, b_out = torch.randn(2, 200).double() / 40, torch.randn(2).double()
    x, y0 = torch.randn(30, 4, 1).double(), torch.randn(4, 2).double()
    found = []
    for device in ("cpu", DEVICE):
        layer = layer.to(device)
        here = [t.to(device) for t in (x, y0, w_out, b_out)]
        with nnarch.trace() as record:
            found.append(
                F.reservoir_generate(
                    here[0], here[1], layer.matrix, layer.w_in, here[2], here[3], layer.bias
                )
            )
    assert {e.backend for e in record if e.op == "reservoir_generate"} == {RESERVOIR}
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b.cpu(), rtol=1e-9, atol=1e-9)


# The readout's product in float64 has no GPU kernel: torch's serves, and says so.
@pytest.mark.filterwarnings("default::nnarch.FallbackWarning")
@pytest.mark.parametrize("solver", ["ridge", "lstsq"])
def test_echo_state_network(solver):
    time = np.arange(700)[:, None]
    series = np.sin(0.2 * time) * np.cos(0.0311 * time)
    found = []
    for device in ("cpu", DEVICE):
        network = nn.EchoStateNetwork(
            1, 300, 1, connectivity=0.1, leak=0.5, solver=solver, ridge=1e-6, seed=3,
            dtype=torch.float64,
        ).to(device)  # fmt: skip
        network.fit(series[:500], series[1:501])
        found.append((network.generate(50), network.predict(series[:600])))
    for future, prediction in found:
        assert np.abs(future - series[501:551]).max() < 0.05
        assert np.abs(prediction[150:] - series[151:601]).max() < 0.01
    np.testing.assert_allclose(found[0][1][150:], found[1][1][150:], atol=1e-3)
