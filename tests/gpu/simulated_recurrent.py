"""The persistent scan in Numba's simulator: run by test_numba_recurrent.py in its own process.

The simulator runs one block, in as many Python threads as the block has.
"""

from __future__ import annotations

import pytest
import torch
from gpu_recurrent_cases import arguments, check_forward

from nnarch.kernels.gpu.numba_support import simulating
from nnarch.kernels.recurrent import gpu_kernel, kinds, numba_scan

assert simulating()

KINDS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3}


@pytest.fixture(autouse=True)
def persistent(monkeypatch):
    monkeypatch.setattr(gpu_kernel, "fits_small", lambda *_: False)
    monkeypatch.setattr(gpu_kernel, "fits_persistent", lambda *_: True)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("counts", [None, [3, 2, 2, 1]], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_cells(kind, counts, reverse):
    check_forward(arguments(kind, counts=counts, hidden=5), kind, reverse)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_half_precision_without_states_and_biases(kind):
    tensors = arguments(kind, hidden=6, batch=1, states=False, bias=False, dtype=torch.float16)
    check_forward(tensors, kind, save=False)


def test_peephole():
    check_forward(arguments(kinds.LSTM, hidden=4, peephole=True), kinds.LSTM)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_nan_stays_in_its_sequence(kind):
    tensors = arguments(kind, hidden=4)
    clean = gpu_kernel.recurrent_scan(*tensors, None, kind, False, 0.0, True)
    tensors[0][1, 1, 2] = float("nan")
    y, h, *_ = gpu_kernel.recurrent_scan(*tensors, None, kind, False, 0.0, True)
    assert y[1:, 1].isnan().all() and h[1].isnan().all()
    assert torch.equal(y[:, [0, 2]], clean[0][:, [0, 2]])


def test_a_projection_is_refused():
    tensors = arguments(kinds.LSTM, proj=3)
    with pytest.raises(NotImplementedError, match="weight_hr"):
        gpu_kernel.recurrent_scan(*tensors, None, kinds.LSTM, False, 0.0, False)
    assert not numba_scan.fits_persistent(2, tensors[0], tensors[4], tensors[7], None)
