"""Echo-state networks: what they learn, their shapes, their errors."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from echo_state_cases import network, sine

from nnarch import nn
from nnarch.nn import reservoir_stack as module
from nnarch.nn.readout import Readout
from nnarch.nn.reservoir_weights import sparse_reservoir, spectral_radius

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
mackey_glass = importlib.import_module("mackey_glass")

F64 = {"dtype": torch.float64}


# -------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("units", [1, 2, 50, 900])
def test_the_spectral_radius_is_what_was_asked_for(units):
    generator = torch.Generator().manual_seed(1)
    values, columns, rows = sparse_reservoir(units, 0.05, 0.7, generator)
    dense = torch.sparse_csr_tensor(rows, columns, values, (units, units)).to_dense()
    largest = float(torch.linalg.eigvals(dense).abs().max())
    assert largest == pytest.approx(0.7, rel=1e-6) or (units <= 2 and largest == 0)
    assert len(values) == units * max(1, round(0.05 * units))
    assert columns.view(units, -1).diff(dim=1).min() > 0 if units == 900 else True


def test_without_scipy_the_dense_matrix_gives_the_same(monkeypatch):
    w = sparse_reservoir(500, 0.02, 0.9, torch.Generator().manual_seed(0))
    by_arpack = spectral_radius(*w)
    real = importlib.import_module

    def hidden(name):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr("nnarch.nn.reservoir_weights.importlib.import_module", hidden)
    assert spectral_radius(*w) == pytest.approx(by_arpack, rel=1e-7) == pytest.approx(0.9)


def test_seeds():
    a, b, other = (nn.Reservoir(2, 40, connectivity=0.1, seed=s) for s in (5, 5, 6))
    assert all(torch.equal(x, y) for x, y in zip(a.buffers(), b.buffers(), strict=True))
    assert not torch.equal(a.w_in, other.w_in) and not torch.equal(a.columns, other.columns)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    nn.Reservoir(2, 40, seed=1)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone


# -------------------------------------------------------------------------------------- readout


@pytest.mark.parametrize("solver", ["ridge", "lstsq"])
def test_the_readout_solves_what_it_was_given_in_pieces(solver):
    x, y = torch.randn(400, 7, **F64), torch.randn(400, 2, **F64)
    ridge = 0.5 if solver == "ridge" else 0.0
    readout = Readout(7, 2, solver, ridge)
    for first in range(0, 400, 90):
        readout.add(x[first : first + 90], y[first : first + 90])
    weight, bias = readout.solve()
    rows = torch.cat((x, torch.ones(400, 1, **F64)), 1)
    penalty = torch.diag(torch.tensor([ridge] * 7 + [0.0], **F64))
    expected = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ y)
    torch.testing.assert_close(torch.cat((weight, bias[:, None]), 1), expected.T)


def test_least_squares_with_fewer_rows_than_features_has_the_smallest_weights():
    x, y = torch.randn(5, 9, **F64), torch.randn(5, 1, **F64)
    readout = Readout(9, 1, "lstsq", 0.0)
    readout.add(x, y)
    weight, bias = readout.solve()
    expected = torch.linalg.pinv(torch.cat((x, torch.ones(5, 1, **F64)), 1)) @ y
    torch.testing.assert_close(torch.cat((weight[0], bias)), expected[:, 0])


def test_ridge_equals_scikit_learns():
    linear = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    x, y = torch.randn(200, 6, **F64), torch.randn(200, 1, **F64)
    readout = Readout(6, 1, "ridge", 0.3)
    readout.add(x, y)
    weight, bias = readout.solve()
    theirs = linear.Ridge(alpha=0.3).fit(x.numpy(), y[:, 0].numpy())
    np.testing.assert_allclose(weight[0].numpy(), theirs.coef_, rtol=1e-9)
    assert float(bias[0]) == pytest.approx(theirs.intercept_)


# ------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"solver": "lstsq"},
        {"input_to_readout": True},
        {"bidirectional": True},
        {"bidirectional": True, "input_to_readout": True},
        {"noise": 1e-6},
        {"dtype": torch.float32, "ridge": 1e-4},
    ],
    ids=str,
)
def test_it_learns_to_predict_one_step(options):
    series = sine(1500)
    net = network(**options).fit(series[:999], series[1:1000])
    error = net.predict(series[900:-1])[100:] - series[1001:]
    assert np.sqrt(np.mean(error**2)) / series.std() < 0.01


def test_a_deep_one_learns():
    series = sine(1500)
    net = nn.EchoStateNetwork(
        1, (40, 30, 20), 1, washout=50, connectivity=0.1, leak=0.5, ridge=1e-8, **F64
    ).fit(series[:999], series[1:1000])
    assert net.readout.weight.shape == (1, 90)
    error = net.predict(series[900:-1])[100:] - series[1001:]
    assert np.sqrt(np.mean(error**2)) / series.std() < 0.01
    free = net.generate(5)
    assert free.shape == (5, 1) and np.isfinite(free).all()


def test_the_readout_has_the_parameters_of_the_paper():
    net = nn.EchoStateNetwork(1, 100, 2)
    assert sum(p.numel() for p in net.parameters()) == (100 + 1) * 2


def test_feedback():
    """No input at all: the network is driven by what it says."""
    series = 0.5 * sine(1200)
    net = nn.EchoStateNetwork(
        0, 80, 1, feedback_scaling=0.6, connectivity=0.1, bias_scaling=0.2, washout=100,
        solver="lstsq", leak=0.6, **F64,
    ).fit(None, series[:1000])  # fmt: skip
    np.testing.assert_allclose(net.generate(20), series[1000:1020], atol=0.02)
    net.warm_up(y=series[:700])
    np.testing.assert_allclose(net.generate(20), series[700:720], atol=0.02)


def test_feedback_with_an_input():
    u = np.random.default_rng(0).uniform(-0.5, 0.5, (800, 1))
    y = np.zeros((800, 1))
    for t in range(1, 800):
        y[t] = 0.6 * y[t - 1] + 0.4 * u[t]
    net = nn.EchoStateNetwork(
        1, 60, 1, feedback_scaling=0.3, connectivity=0.1, washout=50, input_to_readout=True, **F64
    ).fit(u[:600], y[:600])
    np.testing.assert_allclose(net.generate(x=u[600:]), y[600:], atol=0.02)
    np.testing.assert_allclose(net.predict(u)[100:], y[100:], atol=0.02)


# --------------------------------------------------------------------------------------- shapes


def test_shapes_and_kinds():
    series = sine(300)
    net = network().fit(series[:-1], series[1:])
    assert net.predict(series[:50]).shape == (50, 1)
    assert net.predict(series[:50, 0]).shape == (50,)
    batch = np.stack([series[:50], series[50:100]], 1)
    together = net.predict(batch)
    assert together.shape == (50, 2, 1)
    np.testing.assert_allclose(together[:, 1], net.predict(series[50:100]), rtol=1e-9, atol=1e-12)
    tensor = net.predict(torch.from_numpy(series[:50]))
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.detach().numpy(), net.predict(series[:50]))
    for steps in (0, 1):
        assert net.predict(series[:steps]).shape == (steps, 1)
        assert net.generate(steps).shape == (steps, 1)


def test_a_batch_of_sequences_is_fitted_as_all_of_them():
    a, b = sine(300), 0.7 * sine(300)[::-1].copy()
    x = np.stack([a[:-1], b[:-1]], 1)
    y = np.stack([a[1:], b[1:]], 1)
    net = network().fit(x, y)
    states = [net.layers[0](torch.from_numpy(s)[:, None])[0][50:, 0] for s in (x[:, 0], x[:, 1])]
    readout = Readout(60, 1, "ridge", 1e-8)
    readout.add(torch.cat(states), torch.from_numpy(np.concatenate([y[50:, 0], y[50:, 1]])))
    weight, _ = readout.solve()
    said = torch.cat(states) @ weight.T
    ours = torch.cat(states) @ net.readout.weight.T
    torch.testing.assert_close(ours, said, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"input_to_readout": True}])
def test_chunks_change_nothing(options, monkeypatch):
    """A long sequence runs in pieces; the result is that of one piece."""
    series = sine(400)
    whole = network(**options).fit(series[:-1], series[1:])
    expected = whole.predict(series)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 37 * 60)
    pieces = network(**options).fit(series[:-1], series[1:])
    np.testing.assert_allclose(pieces.predict(series), expected, rtol=1e-4, atol=1e-6)


def test_saved_copied_and_pickled():
    series = sine(300)
    net = network().fit(series[:-1], series[1:])
    expected = net.predict(series)
    fresh = network(seed=9)
    fresh.load_state_dict(net.state_dict())
    for other in (fresh, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        np.testing.assert_array_equal(other.predict(series), expected)


def test_construction_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    network()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_changed_matrix_is_packed_again():
    layer = nn.Reservoir(1, 30, connectivity=0.2, **F64)
    x = torch.randn(4, 2, 1, **F64)
    before = layer(x)[0]
    with torch.no_grad():
        layer.values.zero_()
    after = layer(x)[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, torch.tanh(x @ layer.w_in.T + layer.bias))


def test_many_inputs_are_multiplied_beforehand():
    layer = nn.Reservoir(40, 30, connectivity=0.2, bias_scaling=0.5, **F64)
    x = torch.randn(4, 2, 40, **F64)
    from nnarch import functional as F

    expected, _ = F.reservoir_scan(x, layer.matrix, layer.w_in, layer.bias)
    torch.testing.assert_close(layer(x)[0], expected)


def test_the_readout_can_be_trained_by_gradient():
    net = network()
    x = torch.randn(60, 4, 1, **F64)
    net(x).square().sum().backward()
    assert net.readout.bias.grad is not None and net.readout.weight.grad.shape == (1, 60)


NET = network()
BAD = [
    (ValueError, "leak must be", lambda: network(leak=0.0)),
    (ValueError, "connectivity must be", lambda: network(connectivity=0.0)),
    (ValueError, "spectral_radius must be", lambda: network(spectral_radius=-1.0)),
    (ValueError, "units must be positive", lambda: nn.EchoStateNetwork(1, (), 1)),
    (ValueError, "inputs must be at least 1", lambda: nn.EchoStateNetwork(0, 5, 1)),
    (ValueError, "outputs must be at least 1", lambda: nn.EchoStateNetwork(1, 5, 0)),
    (ValueError, "washout must be", lambda: network(washout=-1)),
    (ValueError, "activation must be one of .* got 'foo'", lambda: network(activation="foo")),
    (ValueError, "a batch of 0",
     lambda: network(washout=0).fit(np.zeros((20, 0, 1)), np.zeros((20, 0, 1)))),
    (TypeError, "x must be real", lambda: network().fit(sine(99) + 1j, sine(99))),
    (ValueError, "input_scaling must be a number or 1", lambda: network(input_scaling=[1.0, 2.0])),
    (ValueError, "bidirectional network cannot feed back",
     lambda: network(bidirectional=True, feedback_scaling=1.0)),
    (ValueError, "solver must be", lambda: network(solver="svd").fit(sine(99), sine(99))),
    (ValueError, r"fit: x must be \[T, 1\]", lambda: network().fit(sine(99, 2), sine(99))),
    (ValueError, "same steps and batch", lambda: network().fit(sine(99), sine(98))),
    (ValueError, "the washout, 50; got 50", lambda: network().fit(sine(50), sine(50))),
    (ValueError, "y must be finite", lambda: network().fit(sine(99), sine(99) * np.nan)),
    (ValueError, "may hold NaN", lambda: network().fit(sine(99) * np.nan, sine(99))),
    (ValueError, "predict: call fit first", lambda: network().predict(sine(9))),
    (ValueError, "generate: call fit first", lambda: network().generate(9)),
    (ValueError, "needs the future",
     lambda: network(bidirectional=True).fit(sine(99), sine(99)).generate(3)),
    (ValueError, "steps must be", lambda: network().fit(sine(99), sine(99)).generate()),
    (ValueError, "there must be as many",
     lambda: nn.EchoStateNetwork(1, 9, 2, washout=9).fit(sine(99), sine(99, 2)).generate(3)),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=message):
        call()


# -------------------------------------------------------------------------------------- oracles


def test_states_equal_reservoirpys():
    """reservoirpy's own reservoir, given our weights."""
    package = pytest.importorskip("reservoirpy", reason="needs reservoirpy")
    nodes = importlib.import_module("reservoirpy.nodes")
    assert package.__version__
    sparse = importlib.import_module("scipy.sparse")
    layer = nn.Reservoir(
        2, 50, connectivity=0.1, leak=0.3, bias_scaling=0.4, spectral_radius=0.8, **F64
    )
    values, columns, rows = (t.numpy() for t in layer.matrix)
    theirs = nodes.Reservoir(
        50, lr=0.3, W=sparse.csr_matrix((values, columns, rows), shape=(50, 50)),
        Win=layer.w_in.numpy(), bias=layer.bias.numpy(), input_dim=2,
    )  # fmt: skip
    x = np.random.default_rng(0).normal(size=(40, 2))
    expected = theirs.run(x)
    got = layer(torch.from_numpy(x)[:, None])[0][:, 0]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_mackey_glass():
    """Jaeger and Haas' accuracy with four seeds: NRMSE84 <= 6.3e-5."""
    m = mackey_glass
    series = m.mackey_glass(m.TRAIN + m.WARM_UP + m.TRIALS * 40 + 1000)
    inputs = m.squash(series)
    for seed in range(4):
        net = m.build(seed).fit(inputs[: m.TRAIN - 1], inputs[1 : m.TRAIN])
        assert m.nrmse84(net, series) <= m.BOUND


def test_options_are_checked_at_once():
    for option, message in (
        ({"solver": "foo"}, "solver must be"),
        ({"ridge": -1.0}, "ridge must be at least 0"),
        ({"noise": -0.1}, "noise must be at least 0"),
        ({"noise": float("nan")}, "noise must be at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            nn.EchoStateNetwork(1, 20, 1, **option)
    with pytest.raises(ValueError, match="fit: y is missing"):
        nn.EchoStateNetwork(1, 20, 1).fit(torch.zeros(200), None)
