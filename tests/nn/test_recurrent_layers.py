"""Recurrent layers are their torch.nn twins: outputs, states, gradients, for every option."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from recurrent_pairs import (
    BATCH,
    HIDDEN,
    IN,
    KINDS,
    LENGTHS,
    TIME,
    flat,
    make_input,
    make_state,
    twins,
)
from recurrent_pairs import run as run_module
from tolerances import assert_as_accurate
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import nnarch.nn as nn

FORMS = ["batch", "unbatched", "packed", "packed, sorted"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_states_and_gradients_are_the_twins(kind, form):
    for layers, bidirectional, batch_first, bias, starts in itertools.product(
        (1, 3), *[(False, True)] * 4
    ):
        ours, theirs = twins(
            kind,
            num_layers=layers,
            bidirectional=bidirectional,
            batch_first=batch_first,
            bias=bias,
            dropout=0.3,
        )
        x = make_input(ours, form)
        hx = make_state(ours, form) if starts else None
        got, mine = run_module(ours, x, hx)
        expected, its = run_module(theirs, x, hx)
        assert mine.keys() == its.keys()
        for name in its:
            torch.testing.assert_close(
                mine[name], its[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert type(got[0]) is type(expected[0])
        assert type(got[1]) is type(expected[1])
        if isinstance(expected[0], PackedSequence):
            for a, b in zip(got[0][1:], expected[0][1:], strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_accurate_as_torch(kind):
    torch.manual_seed(3)
    ours, theirs = twins(kind, torch.float32, num_layers=2, bidirectional=True)
    truth = copy.deepcopy(theirs).double()
    x, hx = make_input(ours, "packed"), make_state(ours, "packed")
    _, mine = run_module(ours, x, hx)
    _, its = run_module(theirs, x, hx)
    double = PackedSequence(x.data.double(), *x[1:])
    states = [t.double() for t in flat(hx)]
    # Loss weights differ by dtype, so gradients are compared with torch's alone.
    outputs = flat(truth(double, tuple(states) if len(states) > 1 else states[0]))
    for i, out in enumerate(outputs):
        name = f"output {i}"
        assert_as_accurate(mine[name], its[name], out.detach(), ulps=16, what=name)
    for name in its:
        torch.testing.assert_close(mine[name], its[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_without_gradients(kind):
    """Packed weights."""
    ours, theirs = twins(kind, num_layers=2, bidirectional=True, dropout=0.4)
    ours.eval(), theirs.eval()
    for form in FORMS:
        x, hx = make_input(ours, form), make_state(ours, form)
        with torch.no_grad():
            got, expected = flat(ours(x, hx)), flat(theirs(x, hx))
            again = flat(ours(x, hx))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
        assert all(map(torch.equal, got, again))


@pytest.mark.parametrize("kind", KINDS)
def test_text_state_and_copies_are_the_twins(kind):
    ours, theirs = twins(kind, num_layers=2, bidirectional=True, batch_first=True)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.eval()
    x = make_input(ours, "batch")
    with torch.no_grad():
        expected = flat(ours(x))
        size = len(pickle.dumps(ours))
        for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.copy(ours)):
            assert "_packed" not in vars(clone)
            assert all(map(torch.equal, flat(clone(x)), expected))
            assert repr(clone) == repr(ours)
    fresh, _ = twins(kind, num_layers=2, bidirectional=True, batch_first=True)
    assert len(pickle.dumps(fresh.eval())) == size


@pytest.mark.parametrize("kind", KINDS)
def test_seeded_initial_weights_are_the_twins(kind):
    name, options = KINDS[kind]
    torch.manual_seed(5)
    ours = getattr(nn, name)(IN, HIDDEN, num_layers=2, **options)
    torch.manual_seed(5)
    theirs = getattr(torch.nn, name)(IN, HIDDEN, num_layers=2, **options)
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_none_and_a_sequence_of_one_step(kind):
    ours, theirs = twins(kind, num_layers=2, bidirectional=True)
    for shape in ((4, 0, IN), (1, 2, IN)):
        x = torch.randn(shape, dtype=torch.float64)
        got, expected = flat(ours(x)), flat(theirs(x))
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_length_one_among_packed_ones(kind):
    ours, theirs = twins(kind, bidirectional=True)
    for lengths in ([1], [1, 1, 1], [2, 1], [1, 3]):
        x = pack_sequence(
            [torch.randn(n, IN, dtype=torch.float64) for n in lengths], enforce_sorted=False
        )
        _, mine = run_module(ours, x)
        _, its = run_module(theirs, x)
        for name in its:
            torch.testing.assert_close(mine[name], its[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_refusals_are_the_twins(kind):
    ours, theirs = twins(kind, num_layers=2)
    x, h = make_input(ours, "batch"), make_state(ours, "batch")
    h, rest = (h[0], h[1:]) if isinstance(h, tuple) else (h, ())

    def state(h):
        return (h, *rest) if rest else h

    calls = [
        (torch.randn(0, 2, IN).double(), None),  # no step
        (x[0, 0], None),
        (x[None], None),
        (x[..., :2], None),
        (x.float(), None),
        (x, state(h[:1])),
        (x, state(h[:, :2])),
        (x, state(h[..., :1])),
        (x, state(h[0])),
        (x[:, 0], state(h)),
    ]
    for args in calls:
        with pytest.raises((RuntimeError, ValueError)) as expected:
            theirs(*args)
        with pytest.raises(expected.type) as got:
            ours(*args)
        assert str(got.value).split()[0] == str(expected.value).split()[0]


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="LSTM: dtype must be one of"):
        nn.LSTM(2, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"GRU: weight_storage must be torch\.bfloat16 or None"):
        nn.GRU(2, 3, weight_storage=torch.float16)
    with pytest.raises(ValueError, match="RNN: weight_storage is for float32 parameters"):
        nn.RNN(2, 3, dtype=torch.float64, weight_storage=torch.bfloat16)
    with pytest.raises(ValueError, match="proj_size"):
        nn.GRU(2, 3, proj_size=1)
    with pytest.raises(TypeError, match="peephole"):
        nn.GRU(2, 3, peephole=True)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_one_sequence_reaches_another(kind):
    ours, _ = twins(kind, num_layers=2, bidirectional=True)
    x = torch.randn(TIME, BATCH, IN, dtype=torch.float64)
    expected = ours(x)[0]
    x[2, 1] = float("nan")
    got = ours(x)[0]
    others = [0, 2, 3]
    assert torch.equal(got[:, others], expected[:, others])
    assert got[:, 1].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_equal_each_sequence_alone(kind):
    ours, _ = twins(kind, num_layers=2, bidirectional=True)
    sequences = [torch.randn(n, IN, dtype=torch.float64) for n in LENGTHS]
    y, state = ours(pack_sequence(sequences, enforce_sorted=False))
    padded, lengths = torch.nn.utils.rnn.pad_packed_sequence(y)
    assert lengths.tolist() == LENGTHS
    for i, sequence in enumerate(sequences):
        alone, end = ours(sequence)
        torch.testing.assert_close(padded[: LENGTHS[i], i], alone, rtol=1e-10, atol=1e-12)
        for a, b in zip(flat(state), flat(end), strict=True):
            torch.testing.assert_close(a[:, i], b, rtol=1e-10, atol=1e-12)


def test_gradcheck():
    for kind in KINDS:
        ours, _ = twins(kind, num_layers=2, bidirectional=True)
        x = torch.randn(3, 2, IN, dtype=torch.float64, requires_grad=True)
        hx = [t[:, :2].clone().requires_grad_() for t in flat(make_state(ours, "batch"))]

        def call(x, *hx, module=ours):
            return tuple(flat(module(x, hx if len(hx) > 1 else hx[0])))

        assert torch.autograd.gradcheck(call, (x, *hx), fast_mode=True)


def test_second_derivatives_are_refused():
    ours, _ = twins("gru")
    x = torch.randn(3, 2, IN, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(ours(x)[0].sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", [k for k in KINDS if "lstm" not in k.lower()])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_comes_back_may_be_written(kind, bidirectional):
    ours, theirs = twins(kind, num_layers=2, bidirectional=bidirectional)
    x = torch.randn(TIME, BATCH, IN, dtype=torch.float64)
    for module in (ours, theirs):
        y, h = module(x)
        y *= 2
        h += 1
        (y.square().sum() + h.sum()).backward()
    for mine, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad)
