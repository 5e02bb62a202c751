"""The Numba kernels of reservoirs, in the simulator. Run by test_simulated.py."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    pytest.skip("needs NUMBA_ENABLE_CUDASIM=1 before import", allow_module_level=True)

import nnarch
from nnarch.kernels.activation import kinds
from nnarch.kernels.reservoir import numba_scan, numba_slices, reference


def problem(n, batch, steps, dtype):
    there = torch.rand(n, n) < 0.15
    there[n // 2] = False
    rows = torch.cat((torch.zeros(1), there.sum(1).cumsum(0))).int()
    values = (torch.randn(int(there.sum())) * 0.3).to(dtype)
    matrix = values, there.nonzero()[:, 1].int(), rows
    return matrix, torch.randn(batch, n).to(dtype), torch.randn(steps, batch, 2).to(dtype)


def nothing(dtype):
    return torch.zeros(0, dtype=dtype), torch.zeros(0).int(), torch.zeros(1).int()


@pytest.fixture(params=["shared", "grid"])
def kernel(request, monkeypatch):
    monkeypatch.setenv("NNARCH_RESERVOIR_KERNEL", request.param)
    return request.param


CASES = [(1, 1, 2), (37, 1, 3), (70, 2, 2)]  # neurons, batch, steps: a warp, more, odd sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "batch", "steps"), CASES)
def test_scan(kernel, n, batch, steps, dtype):
    w, state, x = problem(n, batch, steps, dtype)
    w_in, bias = torch.randn(n, 2).to(dtype), torch.randn(n).to(dtype)
    for args in (
        (x, w_in, bias, *w, None, state, 0.3, kinds.TANH, 1),
        (x @ w_in.T, None, None, *w, None, state, 1.0, kinds.SIGMOID, 0),
    ):
        with nnarch.use_backend("numba"), nnarch.trace() as trace:
            got = torch.ops.nnarch.reservoir_scan(*args)
        assert [(e.backend, e.algorithm) for e in trace] == [("numba", kernel)]
        for mine, expected in zip(got, reference.reservoir_scan(*args), strict=True):
            torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("n", "batch", "steps"), CASES[1:])
def test_generate(kernel, n, batch, steps, wide):
    w, state, x = problem(n, batch, steps, torch.float64)
    y0, w_in = torch.randn(batch, 2).double(), torch.randn(n, 4).double()
    w_out = 0.1 * torch.randn(2, n + 4 * wide).double()
    args = (x, y0, w_in, None, *w, None, state, w_out, torch.randn(2).double(), 0.4, kinds.RELU)
    with nnarch.use_backend("numba"):
        got = torch.ops.nnarch.reservoir_generate(*args)
    for mine, expected in zip(got, reference.reservoir_generate(*args), strict=True):
        torch.testing.assert_close(mine, expected)


def test_nothing_to_do(kernel):
    w, state, x = problem(37, 2, 3, torch.float32)
    args = (x[:0], torch.randn(37, 2), None, *w, None, state, 0.3, kinds.TANH, 0)
    with nnarch.use_backend("numba"):
        states, last = torch.ops.nnarch.reservoir_scan(*args)
    assert states.shape == (0, 2, 37) and torch.equal(last, state)


def test_nan_stays_in_its_batch_row(kernel):
    w, state, x = problem(37, 2, 2, torch.float32)
    x[0, 0] = float("nan")
    args = (x, torch.randn(37, 2), None, *w, None, state, 0.3, kinds.TANH, 0)
    with nnarch.use_backend("numba"):
        states, _ = torch.ops.nnarch.reservoir_scan(*args)
    expected = reference.reservoir_scan(*args)[0]
    torch.testing.assert_close(states, expected, equal_nan=True)
    assert bool(states[:, 0].isnan().all()) and not bool(states[:, 1].isnan().any())


def test_slices_hold_every_entry():
    w, _, _ = problem(70, 1, 1, torch.float32)
    values, columns, rows = w
    cut = numba_slices.cut(values, columns, rows)
    dense = torch.zeros(70, 71)
    for s, (start, length) in enumerate(zip(cut.starts, cut.lengths, strict=True)):
        for lane in range(32):
            row = int(cut.rows[s * 32 + lane])
            for k in range(int(length)):
                at = int(start) + k * 32 + lane
                if row < 70:
                    dense[row, cut.columns[at]] += cut.values[at]
                else:
                    assert cut.values[at] == 0
    expected = torch.sparse_csr_tensor(rows, columns, values, (70, 70)).to_dense()
    assert torch.equal(dense[:, :70], expected) and not bool(dense[:, 70].any())


@pytest.mark.parametrize("n", [0, 1, 33, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_slices_travel_as_one_tensor(dtype, n):
    (values, columns, rows), _, _ = problem(n, 1, 1, dtype) if n else (nothing(dtype), 0, 0)
    expected = numba_slices.cut(values, columns, rows)
    packed = numba_scan.reservoir_pack(values, columns, rows)
    assert packed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    found = numba_slices.unpack(packed, n)
    for name in ("values", "columns", "lengths", "starts", "rows"):
        mine, wanted = getattr(found, name), getattr(expected, name)
        if name == "values":
            wanted = wanted.to(packed.dtype)
        elif name == "starts":
            wanted = wanted[: found.lengths.numel()]
        assert mine.dtype == wanted.dtype and torch.equal(mine, wanted)
    with pytest.raises(ValueError, match="packed is not what pack_reservoir made"):
        numba_slices.unpack(packed, n + 320)


def test_a_grid_that_cannot_be_resident_is_refused():
    numba_scan.check_grid(4, 4)
    for blocks, limit in ((5, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"grid of {blocks} blocks; this GPU holds {limit}"):
            numba_scan.check_grid(blocks, limit)


def test_too_many_neurons_for_shared_memory(monkeypatch):
    monkeypatch.setenv("NNARCH_RESERVOIR_KERNEL", "shared")
    with pytest.raises(ValueError, match="do not fit shared memory"):
        numba_scan.uses_shared(7000, 1, torch.float32, torch.device("cpu"))
    monkeypatch.delenv("NNARCH_RESERVOIR_KERNEL")
    assert not numba_scan.uses_shared(7000, 1, torch.float32, torch.device("cpu"))
    assert numba_scan.uses_shared(1000, 1, torch.float64, torch.device("cpu"))
