"""Single steps: the operation of cells against the definition, and torch's functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, check_under_isa, name_of, on_fresh_memory
from recurrent_cases import GRU, KINDS, LSTM, arguments, pack
from test_recurrent_bad_input import B16, H0, W_HH, W_IH
from tolerances import assert_as_accurate
from torch import Tensor

import nnarch
from nnarch import functional as F
from nnarch.kernels.recurrent import kinds, reference
from nnarch.kernels.recurrent.cell_op import cell, cell_backward

each_kind = pytest.mark.parametrize("kind", KINDS, ids=kinds.NAMES.__getitem__)
# (B, I, H): weights in place, packed block by block, packed whole, shared between threads.
SIZES = [(1, 1, 1), (1, 40, 37), (3, 7, 100), (12, 24, 33), (31, 20, 40), (70, 9, 21), (2, 8, 700)]
NAMES = ("h", "c", "reserve")
GRADS = ("x", "h", "c", "weight_ih", "weight_hh", "bias_ih", "bias_hh")


def step_arguments(kind: int, size: Any, dtype: torch.dtype = torch.float32, **options: Any):
    return arguments(kind, (1, *size), dtype, **options)


def step(tensors: list[Tensor | None], *rest: Any) -> tuple[Tensor, ...]:
    x, *others = tensors[:7]
    assert x is not None
    return cell(x.flatten(0, -2), *others, *rest)


def define(tensors: list[Tensor | None], kind: int, dtype: torch.dtype, save: bool = True):
    x, *others = (None if t is None else t.to(dtype) for t in tensors[:7])
    return reference.recurrent_cell(x.flatten(0, -2), *others, None, kind, save)


@each_kind
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_sizes(size, kind, dtype):
    for options in ({}, {"states": False, "biases": False}):
        tensors = step_arguments(kind, size, dtype, **options)
        theirs = define(tensors, kind, dtype)
        truth = define(tensors, kind, torch.float64)
        for packed in (None, pack(tensors, kind)):
            mine = on_fresh_memory(lambda t=tensors, p=packed: step(t, p, kind, True))
            for what, a, b, c in zip(NAMES, mine, theirs, truth, strict=True):
                assert_as_accurate(a, b, c, what=what)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_activations_at_their_ends(dtype):
    """tanh is odd, never passes 1 and reaches it; σ(0) is a half: h' = σ(0)·tanh(σ(0)·c)."""
    near_one = torch.linspace(6.0, 10.0, 20_001, dtype=dtype)
    rows = torch.cat((near_one, torch.tensor([30.0, 1e30, float("inf")], dtype=dtype)))[:, None]
    weight_ih, weight_hh = torch.ones(16, 1, dtype=dtype), torch.zeros(16, 16, dtype=dtype)
    state = torch.zeros(len(rows), 16, dtype=dtype)
    above, below = (F.rnn_cell(sign * rows, state, weight_ih, weight_hh) for sign in (1, -1))
    assert torch.equal(above, -below) and float(above.max()) == 1
    assert bool((above[rows[:, 0] > 9.5] > 1 - 1e-7).all())
    cell = torch.full((3, 16), 0.5, dtype=dtype)
    zeros = [torch.zeros(s, dtype=dtype) for s in ((3, 1), (3, 16), (64, 1), (64, 16))]
    _, c = F.lstm_cell(zeros[0], (zeros[1], cell), zeros[2], zeros[3])
    assert torch.equal(c, cell / 2)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=name_of)
def test_half_types(kind, dtype):
    tensors = step_arguments(kind, (5, 20, 24), dtype)
    truth = define(tensors, kind, torch.float64)
    for what, a, b in zip(NAMES, step(tensors, None, kind, True), truth, strict=True):
        assert a.dtype == dtype, what
        torch.testing.assert_close(a.double(), b, rtol=0.01, atol=0.01, msg=what)


@each_kind
def test_gradients(kind):
    for size in ((1, 3, 5), (6, 20, 24)):
        tensors = step_arguments(kind, size, torch.float64)
        h, c, reserve = step(tensors, None, kind, True)
        grads = (torch.randn_like(h), torch.randn_like(c) if kind == LSTM else None)
        x, *others = tensors[:7]
        given = (x.flatten(0, -2), *others, h, reserve, kind)
        for wanted in (127, 1, 1 << 4 | 1 << 1):
            found = on_fresh_memory(lambda g=grads, a=given, w=wanted: cell_backward(*g, *a, w))
            expected = reference.recurrent_cell_backward(*grads, *given, wanted)
            for name, a, b in zip(GRADS, found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=name)


@each_kind
def test_gradcheck_and_second_derivatives(kind):
    x, *others = step_arguments(kind, (2, 3, 4), torch.float64)[:7]
    leaves = [
        None if t is None else t.requires_grad_() for t in (x.flatten(0, -2).clone(), *others)
    ]

    def outputs(*tensors):
        h, c, _ = cell(*tensors, None, kind, True)
        return (h, c) if kind == LSTM else h

    assert torch.autograd.gradcheck(outputs, leaves)
    total = cell(*leaves, None, kind, True)[0].sum()
    (grad,) = torch.autograd.grad(total, leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="once_differentiable"):
        grad.sum().backward()


def test_functions_are_torchs():
    for kind, mine, theirs in (
        (0, F.rnn_cell, torch.rnn_tanh_cell),
        (1, lambda *a: F.rnn_cell(*a, nonlinearity="relu"), torch.rnn_relu_cell),
        (LSTM, F.lstm_cell, torch.lstm_cell),
        (GRU, F.gru_cell, torch.gru_cell),
    ):
        x, h, c, *weights = step_arguments(kind, (3, 5, 6), torch.float64)[:7]
        state = (h, c) if kind == LSTM else h
        torch.testing.assert_close(mine(x[0], state, *weights), theirs(x[0], state, *weights))


@each_kind
def test_empty(kind):
    for size in ((0, 3, 5), (2, 0, 5)):
        tensors = step_arguments(kind, size)
        mine, expected = step(tensors, None, kind, True), define(tensors, kind, torch.float32)
        torch.testing.assert_close(mine, expected)


def test_the_native_kernel_runs():
    tensors = step_arguments(LSTM, (2, 8, 16))
    with nnarch.trace() as trace:
        step(tensors, None, LSTM, False)
    assert [(r.op, r.backend) for r in trace] == [("recurrent_cell", "cpu")]


def check_isa() -> None:
    for kind in KINDS:
        for size in SIZES[1:5]:
            test_sizes(size, kind, torch.float32)
        test_gradients(kind)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_instruction_sets(isa):
    check_under_isa(isa, check_isa)


X = torch.ones(2, 3)
BAD = [
    (TypeError, "lstm: x .*int64", lambda: F.lstm_cell(X.long(), (H0, H0), W_IH, W_HH)),
    (TypeError, "lstm: c0 .*float64", lambda: F.lstm_cell(X, (H0, H0.double()), W_IH, W_HH)),
    (ValueError, r"lstm: x must be \[B, I\]", lambda: F.lstm_cell(X[None], (H0, H0), W_IH, W_HH)),
    (ValueError, "lstm: h0 .*2, 4", lambda: F.lstm_cell(X, (H0[:1], H0), W_IH, W_HH)),
    (ValueError, "lstm: bias_hh .*16", lambda: F.lstm_cell(X, (H0, H0), W_IH, W_HH, B16, B16[1:])),
    (ValueError, "gru: weight_ih must be .*3 . H", lambda: F.gru_cell(X, H0, W_IH, W_HH)),
    (ValueError, "rnn: nonlinearity .*'gelu'",
     lambda: F.rnn_cell(X, H0, W_IH, W_HH, nonlinearity="gelu")),
    (ValueError, "recurrent_scan: kind",
     lambda: cell(X, None, None, W_IH, W_HH, None, None, None, 9, False)),
    (ValueError, "lstm: reserve must have shape",
     lambda: cell_backward(H0, None, X, H0, H0, W_IH, W_HH, None, None, H0, H0, LSTM, 127)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=range(len(BAD)))
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def _samples() -> list[tuple[Any, ...]]:
    samples = []
    for kind in KINDS:
        x, *others = step_arguments(kind, (3, 5, 6))[:7]
        samples.append((x[0].clone(), *others, None, kind, True))
    return samples


def _backward_samples() -> list[tuple[Any, ...]]:
    samples = []
    for *inputs, _packed, kind, _save in _samples():
        h, c, reserve = reference.recurrent_cell(*inputs, None, kind, True)
        last = torch.randn_like(c) if kind == LSTM else None
        wanted = sum((t is not None) << bit for bit, t in enumerate(inputs))
        samples.append((torch.randn_like(h), last, *inputs, h, reserve, kind, wanted))
    return samples


SAMPLES = {"recurrent_cell": _samples, "recurrent_cell_backward": _backward_samples}
