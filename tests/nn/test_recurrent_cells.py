"""Recurrent cells are their torch.nn twins; the functions are torch's."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from recurrent_pairs import flat

import nnarch
import nnarch.nn as nn

IN, HIDDEN = 3, 5
CELLS = {
    "lstm": ("LSTMCell", {}),
    "gru": ("GRUCell", {}),
    "rnn tanh": ("RNNCell", {}),
    "rnn relu": ("RNNCell", {"nonlinearity": "relu"}),
}


def twins(kind, dtype=torch.float64, **options):
    name, own = CELLS[kind]
    theirs = getattr(torch.nn, name)(IN, HIDDEN, dtype=dtype, **own, **options)
    ours = getattr(nn, name)(IN, HIDDEN, dtype=dtype, **own, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def arguments(kind, batch, starts, dtype=torch.float64):
    shape = () if batch is None else (batch,)
    x = torch.randn(*shape, IN, dtype=dtype, requires_grad=True)
    states = [
        torch.randn(*shape, HIDDEN, dtype=dtype, requires_grad=True)
        for _ in range(2 if kind == "lstm" else 1)
    ]
    hx = tuple(states) if kind == "lstm" else states[0]
    return ([x, *states], (x, hx)) if starts else ([x], (x,))


@pytest.mark.parametrize("kind", CELLS)
def test_outputs_and_gradients_are_the_twins(kind):
    for bias, starts, batch in itertools.product((True, False), (True, False), (4, 1, 0, None)):
        ours, theirs = twins(kind, bias=bias)
        leaves, args = arguments(kind, batch, starts)
        results = []
        for module in (ours, theirs):
            outputs = flat(module(*args))
            torch.manual_seed(1)
            loss = sum((out * torch.randn_like(out)).sum() for out in outputs)
            leaves_and_weights = [*leaves, *module.parameters()]
            results.append([*outputs, *torch.autograd.grad(loss, leaves_and_weights)])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_step_through_what_layers_scan(kind):
    cell, _ = twins(kind)
    own = CELLS[kind][1]
    layer = getattr(nn, CELLS[kind][0].removesuffix("Cell"))(IN, HIDDEN, **own).double()
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    x = torch.randn(7, 2, IN, dtype=torch.float64)
    state, outputs = None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0] if kind == "lstm" else state)
    y, end = layer(x)
    torch.testing.assert_close(torch.stack(outputs), y, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(flat(state), [t[0] for t in flat(end)], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", CELLS)
def test_state_text_and_copies_are_the_twins(kind):
    ours, theirs = twins(kind, bias=False)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.eval()
    x = torch.randn(2, IN, dtype=torch.float64)
    unpacked = pickle.dumps(ours)
    with torch.no_grad():
        expected = flat(ours(x))
        assert len(pickle.dumps(ours)) == len(unpacked)
        for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert clone._packed is None
            assert all(map(torch.equal, flat(clone(x)), expected))


@pytest.mark.parametrize("kind", CELLS)
def test_packed_weights_follow_the_weights(kind):
    ours, theirs = twins(kind)
    ours.eval().requires_grad_(False)
    x = torch.randn(2, IN, dtype=torch.float64)
    ours(x)
    assert list(ours._packed.packed) == [0]
    for name in ("weight_ih", "weight_hh"):
        getattr(ours, name).mul_(2)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(flat(ours(x)), flat(theirs(x)), rtol=1e-10, atol=1e-12)
    ours.train()
    assert ours._packed is None


@pytest.mark.parametrize("kind", CELLS)
def test_bfloat16_storage(kind):
    name, own = CELLS[kind]
    stored = getattr(nn, name)(IN, HIDDEN, weight_storage=torch.bfloat16, **own).eval()
    plain, _ = twins(kind, torch.float32)
    plain.load_state_dict(stored.state_dict())
    x, h = torch.randn(2, IN), torch.randn(2, HIDDEN)
    hx = (h, h) if kind == "lstm" else h
    with torch.no_grad():
        got, expected = flat(stored(x, hx))[0], flat(plain.eval()(x, hx))[0]
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=1e-2)


@pytest.mark.parametrize("kind", CELLS)
def test_refusals_are_the_twins(kind):
    ours, theirs = twins(kind)
    x, h = torch.randn(2, IN).double(), torch.randn(2, HIDDEN).double()

    def state(h):
        return (h, h) if kind == "lstm" else h

    for args in [(x[None], None), (x, state(h[None])), (x[0, 0], None)]:
        with pytest.raises(ValueError) as expected:
            theirs(*args)
        with pytest.raises(ValueError) as got:
            ours(*args)
        assert str(got.value) == str(expected.value)
    # torch: RuntimeError of the product
    with pytest.raises(ValueError, match=r"the last size of x \(2\)"):
        ours(x[:, :2])
    with pytest.raises(ValueError, match=r"h0 must have shape \(2, 5\), got \(2, 4\)"):
        ours(x, state(h[:, :4]))
    with pytest.raises(ValueError, match=r"h0 must have shape \(2, 5\), got \(1, 5\)"):
        ours(x, state(h[:1]))


@pytest.mark.parametrize("kind", CELLS)
def test_compile_and_export(kind):
    torch.compiler.reset()  # a class may be compiled only so often
    ours, _ = twins(kind)
    leaves, args = arguments(kind, 2, starts=True)
    expected = flat(ours(*args))
    got = flat(torch.compile(ours, fullgraph=True, backend="aot_eager")(*args))
    assert all(map(torch.equal, got, expected))
    grads = [torch.autograd.grad(sum(t.sum() for t in out), leaves) for out in (got, expected)]
    torch.testing.assert_close(*grads)
    exported = torch.export.export(ours.eval(), tuple(_detached(args))).module()
    torch.testing.assert_close(flat(exported(*_detached(args))), expected)


def _detached(args):
    x, hx = args
    return x.detach(), tuple(t.detach() for t in hx) if isinstance(hx, tuple) else hx.detach()


def test_functions_take_torchs_arguments():
    x, h = torch.randn(2, IN).double(), torch.randn(2, HIDDEN).double()
    for kind, function, names in [
        ("lstm", nnarch.functional.lstm_cell, ["lstm_cell"]),
        ("gru", nnarch.functional.gru_cell, ["gru_cell"]),
        ("rnn tanh", nnarch.functional.rnn_cell, ["rnn_tanh_cell"]),
    ]:
        weights = [p.detach() for p in twins(kind)[1].parameters()]
        hx = (h, h) if kind == "lstm" else h
        expected = getattr(torch, names[0])(x, hx, *weights)
        torch.testing.assert_close(function(x, hx, *weights), expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            function(x, hx, *weights[:2]), getattr(torch, names[0])(x, hx, *weights[:2])
        )
    relu = nnarch.functional.rnn_cell(x, h, *weights, nonlinearity="relu")
    torch.testing.assert_close(relu, torch.rnn_relu_cell(x, h, *weights))


def test_functions_take_numpy_arrays():
    x, h = torch.randn(2, IN), torch.randn(2, HIDDEN)
    weights = [p.detach() for p in twins("gru", torch.float32)[1].parameters()]
    got = nnarch.functional.gru_cell(*[t.numpy() for t in (x, h, *weights)])
    torch.testing.assert_close(torch.from_numpy(got), torch.gru_cell(x, h, *weights))
    weights = [p.detach() for p in twins("lstm", torch.float32)[1].parameters()]
    arrays = [t.numpy() for t in weights]
    got = nnarch.functional.lstm_cell(x.numpy(), (h.numpy(), h.numpy()), *arrays)
    expected = torch.lstm_cell(x, (h, h), *weights)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b)


@pytest.mark.parametrize("kind", CELLS)
def test_autocast(kind):
    """Results have torch's dtype: the state's for LSTM and GRU, autocast's for Elman cells."""
    ours, theirs = twins(kind, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        for starts in (False, True):
            x = torch.randn(2, IN).to(dtype)
            h = torch.randn(2, HIDDEN)
            hx = None if not starts else (h, h) if kind == "lstm" else h
            with torch.autocast("cpu", torch.bfloat16):
                got, expected = flat(ours(x, hx)), flat(theirs(x, hx))
            assert [t.dtype for t in got] == [t.dtype for t in expected]
            torch.testing.assert_close(got, expected, rtol=0.05, atol=0.02)
            grads = torch.autograd.grad(sum(t.float().sum() for t in got), ours.parameters())
            assert all(g.dtype == torch.float32 for g in grads)
