"""The backward of recurrent layers: every kind and option against autograd of the definition."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from alone import alone, measures_memory, peak
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import check_under_isa, name_of, needs_poison, on_fresh_memory
from tolerances import assert_as_accurate
from torch import Tensor
from torch.autograd import gradcheck

from nnarch import functional as F
from nnarch.kernels.recurrent import kinds, reference
from nnarch.kernels.recurrent.op import scan_backward

NAMES = (
    "x",
    "h0",
    "c0",
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "weight_hr",
    "peephole",
    "norm",
)
ALL = (1 << len(NAMES)) - 1
EPS = 1e-3

# What a layer may have, by name; each belongs to some kinds.
PLAIN = {
    "plain": {},
    "reverse": {"reverse": True},
    "packed": {"packed": True},
    "packed reverse": {"packed": True, "reverse": True},
    "bare": {"bias": False, "states": False},
}
LSTM_ONLY = {
    "projection": {"projection": 5},
    "peephole": {"peephole": True},
    "norm": {"norm": True},
    "norm without biases": {"norm": True, "bias": False, "states": False},
    "everything": {
        "projection": 6,
        "peephole": True,
        "norm": True,
        "packed": True,
        "reverse": True,
    },
}
CASES = [
    *((kind, name) for kind in range(4) for name in PLAIN),
    *((kinds.LSTM, name) for name in LSTM_ONLY),
]
OPTIONS = PLAIN | LSTM_ONLY
each_case = pytest.mark.parametrize(
    ("kind", "option"), CASES, ids=[f"{kinds.NAMES[k]}-{name}" for k, name in CASES]
)


class Layer(NamedTuple):
    """Arguments of recurrent_scan_backward behind the three gradients, as far as `wanted`."""

    tensors: tuple[Tensor | None, ...]  # NAMES
    batch_sizes: Tensor | None
    kind: int
    reverse: bool

    def to(self, dtype: torch.dtype) -> Layer:
        return self._replace(
            tensors=tuple(None if t is None else t.to(dtype) for t in self.tensors)
        )

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, h, c and the reserve, by the definition."""
        rest = (self.batch_sizes, None, self.kind, self.reverse, EPS, True)
        return reference.recurrent_scan(*self.tensors, *rest)

    def arguments(self, wanted: int = ALL) -> tuple[Any, ...]:
        y, _, _, reserve = self.forward()
        return (*self.tensors, self.batch_sizes, y, reserve, self.kind, self.reverse, EPS, wanted)


def make(
    kind: int,
    time: int,
    batch: int,
    size: int,
    hidden: int,
    *,
    packed: bool = False,
    reverse: bool = False,
    projection: int = 0,
    peephole: bool = False,
    norm: bool = False,
    bias: bool = True,
    states: bool = True,
) -> Layer:
    """A layer in float64 with values that float32 has."""

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.5).double()

    rows, out = kinds.GATES[kind] * hidden, projection or hidden
    batch_sizes, x = None, draw(time, batch, size)
    if packed:
        batch_sizes = torch.randint(1, batch + 1, (time,)).sort(descending=True).values
        batch_sizes[0] = batch
        x = draw(int(batch_sizes.sum()), size)
    lstm = kind == kinds.LSTM
    tensors = (
        x,
        draw(batch, out) if states else None,
        draw(batch, hidden) if states and lstm else None,
        draw(rows, size),
        draw(rows, out),
        draw(rows) if bias else None,
        draw(rows) if bias else None,
        draw(out, hidden) if projection else None,
        draw(3, hidden) if peephole else None,
        draw(kinds.NORM_ROWS, hidden) + 1 if norm else None,
    )
    return Layer(tensors, batch_sizes, kind, reverse)


def output_grads(layer: Layer) -> tuple[Tensor | None, ...]:
    """Random gradients of y, h and c."""
    y, h, c, _ = layer.forward()
    grads = [torch.randn(t.shape).to(t.dtype) for t in (y, h, c)]
    return (*grads[:2], grads[2] if layer.kind == kinds.LSTM else None)


def cast(tensors: tuple[Tensor | None, ...], dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.to(dtype) for t in tensors)


def check(layer: Layer, dtype: torch.dtype) -> None:
    """Against the definition's autograd in float64, next to that of the same dtype."""
    layer = layer.to(dtype)
    grads = cast(output_grads(layer), dtype)
    arguments = layer.arguments()
    mine = scan_backward(*grads, *arguments)
    theirs = reference.recurrent_scan_backward(*grads, *arguments)
    exact = layer.to(torch.float64)
    truth = reference.recurrent_scan_backward(
        *cast(grads, torch.float64), *exact.tensors, *cast_rest(arguments)
    )
    for name, a, b, t in zip(NAMES, mine, theirs, truth, strict=True):
        # Errors of few values: torch's own may be 0 by luck.
        assert_as_accurate(a, b, t, what=name, ulps=16.0 if dtype == torch.float32 else 1024.0)


def cast_rest(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What follows the layer's tensors; y and the reserve are recomputed by the definition."""
    return arguments[len(NAMES) :]


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_agrees_with_the_definition(kind, option, dtype):
    # Normalized, two values are 1 and -1 and one input has no scale: gradients of rounding alone.
    smallest = (1, 3, 4, 8) if OPTIONS[option].get("norm") else (1, 1, 1, 2)
    for time, batch, size, hidden in ((5, 3, 7, 9), smallest, (3, 40, 33, 35), (6, 16, 20, 64)):
        check(make(kind, time, batch, size, hidden, **OPTIONS[option]), dtype)


@each_case
def test_several_chunks_of_time(kind, option):
    """A chunk has 1024 rows at most; a sum of weights then has several runs of them."""
    check(make(kind, 500, 5, 3, 4, **OPTIONS[option]), torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.integers(0, 3),
    time=st.integers(1, 9),
    batch=st.integers(1, 33),
    size=st.integers(1, 40),
    hidden=st.integers(1, 70),
    flags=st.tuples(*[st.booleans()] * 7),
)
def test_any_sizes_and_options(kind, time, batch, size, hidden, flags):
    packed, reverse, bias, states, projection, peephole, norm = flags
    options: dict[str, Any] = {"packed": packed, "reverse": reverse, "bias": bias, "states": states}
    if kind == kinds.LSTM:
        options |= {"projection": 3 * projection, "peephole": peephole}
        options["norm"] = norm and hidden > 1
    check(make(kind, time, batch, size, hidden, **options), torch.float64)


@pytest.mark.parametrize("kind", range(4), ids=kinds.NAMES)
def test_large_products(kind):
    """Sizes at which products are cut into pieces of their depth and tasks of their columns."""
    check(make(kind, 2, 30, 300, 520), torch.float32)
    check(make(kind, 3, 2, 300, 520), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("kind", range(4), ids=kinds.NAMES)
def test_half_types_compute_in_float32(kind, dtype):
    layer = make(kind, 4, 3, 5, 9).to(dtype)
    grads, arguments = cast(output_grads(layer), dtype), layer.arguments()
    mine = scan_backward(*grads, *arguments)
    single = [
        t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments
    ]
    expected = scan_backward(*cast(grads, torch.float32), *single)
    for a, b in zip(mine, expected, strict=True):
        assert torch.equal(a, b.to(dtype))


# --------------------------------------------------------------------------- through the layers


def _leaves(layer: Layer) -> list[Tensor | None]:
    return [None if t is None else t.clone().requires_grad_() for t in layer.tensors]


def _public(layer: Layer, leaves: list[Tensor | None]) -> list[Tensor]:
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, weight_hr, peephole, norm = leaves
    common = {"h0": h0, "batch_sizes": layer.batch_sizes, "reverse": layer.reverse}
    if layer.kind == kinds.LSTM:
        extra = {"c0": c0, "weight_hr": weight_hr, "peephole": peephole, "norm": norm, "eps": EPS}
        return list(F.lstm_layer(x, w_ih, w_hh, b_ih, b_hh, **common, **extra))
    if layer.kind == kinds.GRU:
        return list(F.gru_layer(x, w_ih, w_hh, b_ih, b_hh, **common))
    name = kinds.NAMES[layer.kind].removeprefix("rnn_")
    return list(F.rnn_layer(x, w_ih, w_hh, b_ih, b_hh, nonlinearity=name, **common))


@each_case
def test_gradcheck(kind, option):
    layer = make(
        kind, 3, 2, 3, 4, **OPTIONS[option] | ({"projection": 3} if option == "projection" else {})
    )
    leaves = _leaves(layer)
    given_tensors = [t for t in leaves if t is not None]

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        found = iter(tensors)
        return tuple(_public(layer, [None if t is None else next(found) for t in leaves]))

    assert gradcheck(function, given_tensors)


@pytest.mark.parametrize("kind", range(4), ids=kinds.NAMES)
def test_backward_of_a_sum(kind):
    """`.sum()` sends back a gradient of strides 0."""
    layer = make(kind, 4, 3, 5, 18)
    mine, theirs = _leaves(layer), _leaves(layer)
    wanted = [t for t in mine if t is not None]
    grads = torch.autograd.grad(_public(layer, mine)[0].sum(), wanted)
    y = reference.recurrent_scan(*theirs, None, None, kind, False, EPS, False)[0]
    truth = torch.autograd.grad(y.sum(), [t for t in theirs if t is not None], allow_unused=True)
    for a, b in zip(grads, truth, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


# --------------------------------------------------------------------------- what must hold


@each_case
def test_nan_stays_in_its_sequence(kind, option):
    layer = make(kind, 4, 31, 6, 9, **OPTIONS[option])
    arguments = [*output_grads(layer), *layer.arguments()]
    expected = scan_backward(*arguments)
    for i in (0, 3 + len(NAMES) + 1, 3 + len(NAMES) + 2):  # of y, y, the reserve
        arguments[i] = arguments[i].clone()
        arguments[i].flatten(0, -2)[2] = float("nan")  # sequence 2, step 0
    mine = scan_backward(*arguments)
    order = reference.steps(layer.tensors[0], layer.batch_sizes)
    dx, truth = (g[0].reshape(-1, 6) for g in (mine, expected))
    others = torch.ones(len(dx), dtype=torch.bool)
    others[[step.start + 2 for step in order if step.stop - step.start > 2]] = False
    assert torch.equal(dx[others], truth[others])
    assert dx[2].isnan().all()
    assert mine[3].isnan().any()  # the weights' gradients have it
    others = torch.arange(31) != 2
    for a, b in zip(mine[1:3], expected[1:3], strict=True):
        assert not len(a) or torch.equal(a[others], b[others])


def _calls(*sizes: int) -> list[tuple[Any, ...]]:
    """Arguments of every case, in float32."""
    layers = [make(kind, *sizes, **OPTIONS[option]).to(torch.float32) for kind, option in CASES]
    return [(*cast(output_grads(layer), torch.float32), *layer.arguments()) for layer in layers]


def _all_gradients(calls: list[tuple[Any, ...]]) -> list[Tensor]:
    return [g for arguments in calls for g in scan_backward(*arguments)]


def test_one_and_two_threads_agree():
    calls = _calls(12, 70, 40, 40)
    layer = make(kinds.LSTM, 3, 20, 64, 320).to(torch.float32)  # a step's columns are cut
    calls.append((*cast(output_grads(layer), torch.float32), *layer.arguments()))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(_all_gradients(calls))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@needs_poison
def test_reads_no_uninitialised_memory():
    calls = _calls(5, 11, 13, 19)
    fresh = on_fresh_memory(lambda: _all_gradients(calls))
    assert all(map(torch.equal, fresh, _all_gradients(calls)))


def against_the_definition() -> None:
    """What the subprocess of the next test runs."""
    for kind, option in CASES:
        for dtype in (torch.float32, torch.float64):
            check(make(kind, 4, 17, 21, 37, **OPTIONS[option]), dtype)
    for kind in range(4):
        check(make(kind, 3, 9, 40, 300), torch.float32)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, against_the_definition)


def _growth(time: int) -> int:
    """Bytes by which the peak of memory grows while an LSTM's gradients are computed."""
    size, hidden = 16, 64
    weights = [torch.randn(n) * 0.05 for n in ((256, 16), (256, 64), (256,), (256,))]
    for steps in (100, time):  # the first call loads what is loaded once
        x, y = torch.randn(steps, 1, size), torch.randn(steps, 1, hidden)
        reserve = torch.rand(steps, 5 * hidden)
        before = peak()
        scan_backward(
            y, None, None, x, None, None, *weights, None, None, None, None, y, reserve,
            kinds.LSTM, False, 0.0, 0b1111001,
        )  # fmt: skip
    return peak() - before


@measures_memory
def test_long_sequences_take_little_memory():
    """The gradients of the gates, 102 MB here, exist for a chunk of time only."""
    gradient_of_x = 4 * 100_000 * 16
    assert alone(_growth, 100_000) < gradient_of_x + 16e6
