"""Sparse reservoirs: scans and free runs against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import machine_with
from op_samples import run
from tolerances import assert_as_accurate
from torch import Tensor

import nnarch
from nnarch import functional as F
from nnarch.kernels.activation import kinds
from nnarch.kernels.reservoir import reference

# One neuron; fewer than a slice; slices with a rest; several vectors with a rest.
SIZES = (1, 5, 16, 61, 203)
# One row; few enough to go one by one; a part of a block; a block and more; blocks and single rows.
BATCHES = (1, 3, 4, 11, 16, 18, 37)


def matrix(n: int, density: float = 0.1, dtype: torch.dtype = torch.float32):
    """Random compressed rows, some of them empty, one of them full."""
    there = torch.rand(n, n) < density
    there[n // 2] = True
    if n > 4:
        there[3] = False
    rows = torch.cat((torch.zeros(1), there.sum(1).cumsum(0))).int()
    columns = there.nonzero()[:, 1].int()
    values = (torch.randn(len(columns)) * (0.9 / (n * density) ** 0.5)).to(dtype)
    return values, columns, rows


def problem(n: int, batch: int, steps: int = 7, inputs: int = 2, dtype=torch.float32):
    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype)

    x, w_in, bias = random(steps, batch, inputs), random(n, inputs), 0.3 * random(n)
    return x, w_in, bias, matrix(n, dtype=dtype), 0.5 * random(batch, n)


def _scan(x, w_in, bias, w, state, *, packed=None, leak=0.3, code=kinds.TANH, skip=0):
    return run("reservoir_scan", x, w_in, bias, *w, packed, state, leak, code, skip)


def _truth(function, *args):
    return function(
        *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    )


def _samples(name: str):
    x, w_in, bias, w, state = problem(29, 5)
    one = problem(29, 1)
    if name == "reservoir_pack":
        return [w]
    scans = [
        (x, w_in, bias, *w, None, state, 0.3, kinds.TANH, 2),
        (one[0], one[1], None, *one[3], None, one[4], 1.0, kinds.RELU, 0),
        (torch.randn(4, 20, 29), None, None, *w, None, torch.randn(20, 29), 0.5, kinds.SIGMOID, 9),
    ]
    if name == "reservoir_scan":
        return scans
    y0, w_out = torch.randn(5, 3), 0.1 * torch.randn(3, 29)
    wide = torch.cat((w_out, torch.randn(3, 5) * 0.1), 1)
    w_all = torch.randn(29, 5)
    return [
        (x, y0, w_all, bias, *w, None, state, w_out, torch.randn(3), 0.3, kinds.TANH),
        (x[:, :1], y0[:1], w_all, None, *w, None, state[:1], wide, None, 1.0, kinds.NONE),
    ]


SAMPLES = {
    name: (lambda name=name: _samples(name))
    for name in ("reservoir_pack", "reservoir_scan", "reservoir_generate")
}


# -------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_scans_agree_with_the_definition(n, dtype):
    for batch in BATCHES:
        x, w_in, bias, w, state = problem(n, batch, dtype=dtype)
        args = (x, w_in, bias, *w, None, state, 0.3, kinds.TANH, 2)
        got = run("reservoir_scan", *args)
        plain = reference.reservoir_scan(*args)
        truth = _truth(reference.reservoir_scan, *args)
        for what, mine, torchs, true in zip(("states", "last"), got, plain, truth, strict=True):
            assert_as_accurate(mine, torchs, true, ulps=32 if dtype == torch.float32 else None,
                               what=f"{what} of {n}, batch {batch}")  # fmt: skip


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu", None])
@pytest.mark.parametrize("batch", [1, 20])
def test_activations_agree(name, batch):
    x, w_in, bias, w, state = problem(61, batch)
    got, _ = F.reservoir_scan(x, w, w_in, bias, state, leak=0.7, activation=name)
    code = kinds.CODES[name]
    args = (x, w_in, bias, *w, None, state, 0.7, code, 0)
    plain, truth = reference.reservoir_scan(*args), _truth(reference.reservoir_scan, *args)
    assert_as_accurate(got, plain[0], truth[0], ulps=32)


@pytest.mark.parametrize("batch", [1, 20])
def test_large_and_small_arguments_of_tanh(batch):
    """One neuron a value, no matrix: the response alone."""
    edges = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    z = torch.cat((torch.linspace(-20, 20, 4001), torch.logspace(-30, 1, 500), edges))
    n = len(z)
    w = torch.empty(0), torch.empty(0, dtype=torch.int32), torch.zeros(n + 1, dtype=torch.int32)
    states, _ = F.reservoir_scan(z.expand(1, batch, n), w)
    assert_as_accurate(states, torch.tanh(z).expand(1, batch, n),
                       torch.tanh(z.double()).expand(1, batch, n))  # fmt: skip
    finite = torch.isfinite(z)
    error = (states[0, 0] - torch.tanh(z.double()))[finite].abs()
    assert bool((error <= 4e-7 * torch.tanh(z.double().abs())[finite]).all())
    assert bool((states[:, :, finite].abs() <= 1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_free_runs_agree_with_the_definition(n, dtype):
    for batch in BATCHES:
        x, _, bias, w, state = problem(n, batch, dtype=dtype)
        w_in, y0 = torch.randn(n, 5, dtype=dtype), torch.randn(batch, 3, dtype=dtype)
        w_out = torch.randn(3, n + 5, dtype=dtype) / (n + 5) ** 0.5
        for weights, offset in ((w_out, torch.randn(3, dtype=dtype)), (w_out[:, :n], None)):
            args = (x, y0, w_in, bias, *w, None, state, weights, offset, 0.4, kinds.TANH)
            got, plain = run("reservoir_generate", *args), reference.reservoir_generate(*args)
            truth = _truth(reference.reservoir_generate, *args)
            for mine, torchs, true in zip(got, plain, truth, strict=True):
                assert_as_accurate(mine, torchs, true, ulps=32 if dtype == torch.float32 else None,
                                   what=f"{n}, batch {batch}")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_compute_in_float32(dtype):
    x, w_in, bias, w, state = problem(61, 6)
    half = [t.to(dtype) for t in (x, w_in, bias, w[0], state)]
    states, last = _scan(*half[:3], (half[3], *w[1:]), half[4])
    full = [t.float() for t in half]
    expected, _ = _scan(*full[:3], (full[3], *w[1:]), full[4])
    assert states.dtype == last.dtype == dtype
    assert torch.equal(states, expected.to(dtype))


def test_a_drive_is_an_input_already_multiplied():
    x, w_in, bias, w, state = problem(61, 18)
    for batch in (1, 18):
        drive = x[:, :batch] @ w_in.T + bias
        got = _scan(drive, None, None, w, state[:batch])[0]
        torch.testing.assert_close(got, _scan(x[:, :batch], w_in, bias, w, state[:batch])[0])


def test_repeated_entries_add_up():
    values, columns = torch.tensor([0.5, 0.25, 1.0]), torch.tensor([1, 1, 0], dtype=torch.int32)
    w = values, columns, torch.tensor([0, 2, 3], dtype=torch.int32)
    got, _ = F.reservoir_scan(
        torch.zeros(1, 1, 2), w, state=torch.tensor([[2.0, 4.0]]), activation=None
    )
    assert got.flatten().tolist() == [3.0, 2.0]


def test_more_neurons_than_16_bits_count():
    """Wide columns: a ring of 65,600 neurons moves its state by one."""
    n = 65_600
    w = torch.ones(n), ((torch.arange(n) + 1) % n).int(), torch.arange(n + 1).int()
    for batch in (1, 5):
        state = torch.randn(batch, n)
        got, last = F.reservoir_scan(
            torch.zeros(3, batch, n), w, state=state, activation=None, skip=2
        )
        assert torch.equal(got[0], state.roll(-3, 1)) and torch.equal(last, got[0])


# ---------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_no_steps_and_one_step(batch):
    x, w_in, bias, w, state = problem(61, batch)
    states, last = _scan(x[:0], w_in, bias, w, state)
    assert states.shape == (0, batch, 61) and torch.equal(last, state)
    states, last = _scan(x[:1], w_in, bias, w, state)
    assert torch.equal(states[0], last)
    y0 = torch.randn(batch, 1)
    for steps in (0, 1):
        y, _ = F.reservoir_generate(x[:steps], y0, w, torch.randn(61, 3), torch.randn(1, 61))
        assert y.shape == (steps, batch, 1)


def test_no_neurons_and_no_batch():
    none = torch.empty(0), torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    states, last = F.reservoir_scan(torch.randn(4, 2, 3), none, torch.empty(0, 3))
    assert states.shape == (4, 2, 0) and last.shape == (2, 0)
    x, w_in, bias, w, _ = problem(5, 1)
    assert _scan(x[:, :0], w_in, bias, w, torch.empty(0, 5))[0].shape == (7, 0, 5)


@pytest.mark.parametrize("batch", [1, 3, 18])
def test_pieces_of_a_sequence_are_the_sequence(batch):
    x, w_in, bias, w, state = problem(61, batch, steps=20)
    whole, last = _scan(x, w_in, bias, w, state)
    first, middle = _scan(x[:8], w_in, bias, w, state)
    second, end = _scan(x[8:], w_in, bias, w, middle)
    assert torch.equal(torch.cat((first, second)), whole) and torch.equal(end, last)
    kept, same = _scan(x, w_in, bias, w, state, skip=13)
    assert torch.equal(kept, whole[13:]) and torch.equal(same, last)
    nothing, same = _scan(x, w_in, bias, w, state, skip=99)
    assert nothing.shape[0] == 0 and torch.equal(same, last)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [3, 16, 19])
def test_nan_stays_in_its_batch_row(batch, bad):
    x, w_in, bias, w, state = problem(61, batch)
    clean = _scan(x, w_in, bias, w, state)[0]
    x = x.clone()
    x[2, 1] = bad
    got = _scan(x, w_in, bias, w, state)[0]
    others = torch.arange(batch) != 1
    assert torch.equal(got[:, others], clean[:, others])
    assert torch.equal(got[:2], clean[:2])
    expected = reference.reservoir_scan(x, w_in, bias, *w, None, state, 0.3, kinds.TANH, 0)[0]
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 16])
def test_nan_reaches_the_neurons_that_it_is_connected_to_and_no_others(batch):
    """Padding of short rows multiplies nothing that could be NaN."""
    _, _, _, w, state = problem(61, batch)
    state[:, 7] = float("nan")
    _, columns, rows = w
    reached = torch.tensor([7 in columns[rows[r] : rows[r + 1]] for r in range(61)])
    reached[7] = True  # its own past leaks in
    got, _ = F.reservoir_scan(torch.zeros(1, batch, 61), w, state=state, leak=0.5)
    assert torch.equal(got[0].isnan(), reached.expand(batch, 61))


def test_threads_change_nothing():
    x, w_in, bias, w, state = problem(203, 37)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_scan(x, w_in, bias, w, state))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [*SIZES, 1000])
def test_gathers_of_either_kind_give_the_same_bits(n, dtype):
    """One state by one, or by the machine's own instruction."""
    arguments = problem(n, 3, dtype=dtype)
    results = []
    for fast in (False, True):
        with machine_with(far_l3=fast):
            results.append(_scan(*arguments))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_was_packed_is_what_is_used():
    x, w_in, bias, w, state = problem(61, 5)
    expected = _scan(x, w_in, bias, w, state)
    got = _scan(x, w_in, bias, w, state, packed=F.pack_reservoir(w))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_matrices_of_torch_and_scipy_and_dense_ones():
    scipy = pytest.importorskip("scipy.sparse", reason="needs scipy")
    x, w_in, bias, (values, columns, rows), state = problem(61, 2)
    expected = F.reservoir_scan(x, (values, columns, rows), w_in, bias, state)[0]
    csr = torch.sparse_csr_tensor(rows, columns, values, (61, 61))
    for form in (
        csr,
        csr.to_dense(),
        scipy.csr_matrix((values.numpy(), columns.numpy(), rows.numpy()), shape=(61, 61)),
        scipy.coo_array(csr.to_dense().numpy()),
    ):
        got = F.reservoir_scan(x, form, w_in, bias, state)[0]
        torch.testing.assert_close(got, expected)


def test_a_default_device_moves_no_tensor():
    x, w_in, bias, w, state = problem(61, 2)
    expected = _scan(x, w_in, bias, w, state)
    with torch.device("meta"):
        got = _scan(x, w_in, bias, w, state)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_numpy_in_and_numpy_out():
    x, w_in, bias, w, state = problem(61, 2)
    states, last = F.reservoir_scan(
        x.numpy(), w, w_in.numpy(), bias.numpy(), state.numpy(), leak=0.3
    )
    assert isinstance(states, np.ndarray) and isinstance(last, np.ndarray)
    assert np.array_equal(states, _scan(x, w_in, bias, w, state)[0].numpy())


def test_views_with_any_stride():
    x, w_in, bias, w, state = problem(61, 6)
    spread = torch.empty(7, 12, 4)[:, ::2, 1:3].copy_(x)
    got = _scan(spread, w_in.T.contiguous().T, bias, w, state.T.contiguous().T)[0]
    assert torch.equal(got, _scan(x, w_in, bias, w, state)[0])
    same = x[:1].expand(7, 6, 2)
    assert torch.equal(
        _scan(same, w_in, bias, w, state)[0], _scan(same.contiguous(), w_in, bias, w, state)[0]
    )


def test_which_algorithm_ran():
    for batch, algorithm in ((1, "row"), (16, "block")):
        x, w_in, bias, w, state = problem(61, batch)
        with nnarch.trace() as trace:
            _scan(x, w_in, bias, w, state)
        assert [(e.op, e.backend, e.algorithm) for e in trace] == [
            ("reservoir_scan", "cpu", algorithm)
        ]


def test_a_gradient_is_refused():
    x, w_in, bias, w, state = problem(5, 2)
    states, _ = F.reservoir_scan(x.requires_grad_(), w, w_in, bias, state)
    with pytest.raises(NotImplementedError, match="reservoir_scan is not differentiable"):
        states.sum().backward()


def test_memory_does_not_grow_with_the_sequence():
    """100,000 steps of which none is kept: the state alone is returned."""
    x, w_in, bias, w, _ = problem(16, 1, steps=100_000)
    states, last = F.reservoir_scan(x, w, w_in, bias, leak=0.3, skip=100_000)
    assert states.numel() == 0 and states.untyped_storage().nbytes() == 0
    end = F.reservoir_scan(x[-500:], w, w_in, bias, leak=0.3)[1]  # older inputs have faded
    torch.testing.assert_close(last, end)


X, W_IN, BIAS, W, STATE = problem(5, 2)
V, C, R = W
W_ALL, W_OUT, Y0 = torch.ones(5, 3), torch.ones(1, 5), torch.ones(2, 1)
scan, generate = F.reservoir_scan, F.reservoir_generate
BAD = [
    (TypeError, "reservoir_scan: x .*list", lambda: scan([1.0], W)),
    (TypeError, "reservoir_scan: x .*int64", lambda: scan(X.long(), W)),
    (ValueError, r"x must be \[steps, batch, inputs\]", lambda: scan(X[0], W, W_IN)),
    (ValueError, r"w_in must be \(5, 2\)", lambda: scan(X, W, W_IN[:4])),
    (ValueError, "without w_in, x must be", lambda: scan(X, W)),
    (ValueError, r"bias must be \(5,\)", lambda: scan(X, W, W_IN, BIAS[:3])),
    (ValueError, r"state must be \(2, 5\)", lambda: scan(X, W, W_IN, state=STATE[:1])),
    (TypeError, "state must be torch.float32", lambda: scan(X, W, W_IN, state=STATE.double())),
    (TypeError, "values must be torch.float32", lambda: scan(X, (V.double(), C, R), W_IN)),
    (TypeError, "columns must be torch.int32", lambda: scan(X, (V, C.long(), R), W_IN)),
    (ValueError, "columns must have", lambda: scan(X, (V, C[1:], R), W_IN)),
    (ValueError, "columns must be at least 0", lambda: scan(X, (V, C + 1, R), W_IN)),
    (ValueError, "columns must be at least 0", lambda: scan(X, (V, C - 1, R), W_IN)),
    (ValueError, "rows must rise", lambda: scan(X, (V, C, R.flip(0)), W_IN)),
    (ValueError, "rows must rise", lambda: scan(X, (V, C, R + 1), W_IN)),
    (ValueError, "rows must have", lambda: scan(X, (V, C, R[:0]), W_IN)),
    (ValueError, "activation must be one of", lambda: scan(X, W, W_IN, activation="gelu")),
    (ValueError, "skip must be", lambda: scan(X, W, W_IN, skip=-1)),
    (TypeError, "skip must be", lambda: scan(X, W, W_IN, skip=1.5)),
    (TypeError, "matrix must be", lambda: scan(X, "W", W_IN)),
    (ValueError, "matrix must be square", lambda: scan(X, torch.ones(5, 4), W_IN)),
    (TypeError, "packed must be a torch.float32 tensor", lambda: scan(X, W, W_IN, packed=C)),
    (TypeError, "packed must be .* got list", lambda: scan(X, W, W_IN, packed=[1.0])),
    (ValueError, "reservoir_scan: arguments do not fit",
     lambda: scan(X, W, W_IN, packed=F.pack_reservoir(matrix(6)))),
    (ValueError, "reservoir_scan: arguments do not fit",
     lambda: scan(X, W, W_IN, packed=torch.zeros(99))),
    (ValueError, "reservoir_pack: rows must rise", lambda: F.pack_reservoir((V, C, R.flip(0)))),
    (ValueError, "w_out must be", lambda: generate(X, Y0, W, W_ALL, torch.ones(2, 5))),
    (ValueError, r"w_in must be \(5, 3\)", lambda: generate(X, Y0, W, W_IN, W_OUT)),
    (ValueError, r"y0 must be \[batch", lambda: generate(X, STATE[0], W, W_IN, W_OUT)),
    (ValueError, r"y0 must be \(2, 1\)", lambda: generate(X, STATE[:1, :1], W, W_ALL, W_OUT)),
    (ValueError, r"b_out must be \(1,\)",
     lambda: generate(X, Y0, W, W_ALL, W_OUT, torch.ones(2))),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=message):
        call()
