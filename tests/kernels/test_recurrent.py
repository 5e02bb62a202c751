"""Recurrent layers against torch and the definition in float64: cells, algorithms, options."""

from __future__ import annotations

import warnings

import pytest
import torch
from kernel_cases import DTYPES, VIEWS, check_under_isa, name_of, needs_poison, on_fresh_memory
from recurrent_cases import (
    GRU,
    KINDS,
    LSTM,
    NAMES,
    RNN_RELU,
    RNN_TANH,
    arguments,
    compare,
    define,
    pack,
    run,
)
from tolerances import assert_as_accurate

import nnarch
from nnarch import functional as F
from nnarch.kernels.recurrent import kinds
from nnarch.kernels.recurrent.op import pack_recurrent_weights, scan

# (T, B, I, H). Up to 4 sequences are matrix-vector products; from 28 on there are several groups of
# them; a last block of units has half the width, or a whole one; long steps are shared. From 12 on
# both products of a step are one sum, of more than 512 products in parts.
SIZES = [
    (1, 1, 1, 1),
    (7, 1, 5, 3),
    (20, 1, 40, 37),
    (33, 2, 16, 64),
    (5, 3, 7, 100),
    (18, 4, 3, 17),
    (6, 5, 33, 48),
    (9, 16, 24, 33),
    (4, 31, 20, 40),
    (40, 61, 9, 21),
    (1, 4, 12, 70),
    (1, 30, 12, 70),
    (1, 90, 11, 19),
    (3, 14, 300, 260),
    (3, 8, 50, 613),
]
CORE = [SIZES[i] for i in (2, 4, 7, 9, 11)]


# ------------------------------------------------------------------------------- every algorithm


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=kinds.NAMES.__getitem__)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_sizes(size, kind, dtype):
    for reverse in (False, True):
        tensors = arguments(kind, size, dtype, states=not reverse, biases=not reverse)
        unpacked = compare(tensors, kind, reverse=reverse, save=reverse)
        packed = compare(tensors, kind, reverse=reverse, save=reverse, packed=pack(tensors, kind))
        for a, b in zip(unpacked, packed, strict=True):
            torch.testing.assert_close(a, b)


def test_weights_beyond_the_caches():
    """More than 16 MB of weights: the input's product is hoisted below 48 rows only."""
    for batch in (20, 50):
        tensors = arguments(LSTM, (2, batch, 4200, 260))
        compare(tensors, LSTM, packed=pack(tensors, LSTM))


@pytest.mark.parametrize("size", [(410, 32, 3, 128), (154, 40, 3, 256), (99, 132, 3, 128)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=kinds.NAMES.__getitem__)
def test_outputs_past_the_caches(size, kind):
    """6 MB of y and more, by one group of sequences, by shared steps, by several groups."""
    tensors = arguments(kind, size)
    compare(tensors, kind, packed=pack(tensors, kind))
    compare(tensors, kind, reverse=True, save=True)


@pytest.mark.parametrize("size", CORE, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=kinds.NAMES.__getitem__)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=name_of)
def test_half_types(size, kind, dtype):
    """Rounded once, at the end: against the definition in float32, which torch's half types are
    not, step by step."""
    tensors = arguments(kind, size, dtype)
    mine = run(tensors, kind, save=True, packed=pack(tensors, kind))
    truth = define(tensors, kind, save=True, dtype=torch.float64)
    for what, a, b in zip(NAMES, mine, truth, strict=True):
        assert a.dtype == dtype
        assert_as_accurate(a, b.to(dtype), b, what=what)


OPTIONS = [
    {"projection": 11},
    {"projection": 40},
    {"peephole": True},
    {"norm": True},
    {"norm": True, "biases": False},
    {"norm": True, "peephole": True, "projection": 13},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [*CORE, SIZES[-1]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_lstm_options(options, size, dtype):
    tensors = arguments(LSTM, size, dtype, **options)
    for reverse in (False, True):
        compare(tensors, LSTM, reverse=reverse, save=True)
        compare(tensors, LSTM, reverse=reverse, packed=pack(tensors, LSTM))


LENGTHS = {
    "one": [1],
    "equal": [4, 4, 4],
    "falling": [9, 7, 7, 5, 2, 1],
    "many": sorted(
        torch.randint(1, 30, (70,), generator=torch.Generator().manual_seed(1)).tolist()
    )[::-1],
}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("kind", KINDS, ids=kinds.NAMES.__getitem__)
def test_packed_sequences(lengths, kind):
    size = (lengths[0], len(lengths), 12, 35)
    tensors = arguments(kind, size, lengths=lengths, peephole=kind == LSTM)
    for reverse in (False, True):
        compare(tensors, kind, reverse=reverse, save=True)
        compare(tensors, kind, reverse=reverse, packed=pack(tensors, kind))


def test_packed_sequences_with_every_option():
    lengths = LENGTHS["many"]
    size = (lengths[0], len(lengths), 12, 35)
    for options in OPTIONS:
        tensors = arguments(LSTM, size, lengths=lengths, **options)
        compare(tensors, LSTM, reverse=True, save=True)


@pytest.mark.parametrize("kind", KINDS, ids=kinds.NAMES.__getitem__)
def test_against_torchs_module(kind):
    """The definition is torch's: layers of torch.nn from the same parameters."""
    torch_nn = torch.nn
    module = {
        RNN_TANH: torch_nn.RNN(24, 40),
        RNN_RELU: torch_nn.RNN(24, 40, nonlinearity="relu"),
        LSTM: torch_nn.LSTM(24, 40),
        GRU: torch_nn.GRU(24, 40),
    }[kind]
    x = torch.randn(30, 6, 24)
    w = [p.detach() for p in module.parameters()]
    empty = [None] * 3
    with torch.no_grad():
        theirs, state = module(x)
        truth, _ = module.double()(x.double())
    y, h, c, _ = run([x, None, None, *w, *empty, None], kind)
    assert_as_accurate(y, theirs, truth)
    states = state if kind == LSTM else (state,)
    for mine, torchs in zip((h, c), states, strict=False):
        torch.testing.assert_close(mine, torchs[0])


@pytest.mark.parametrize("kind", KINDS, ids=kinds.NAMES.__getitem__)
def test_a_step_of_cells(kind):
    """[B, I] is one step."""
    tensors = arguments(kind, (1, 6, 20, 30))
    whole = run(tensors, kind)
    tensors[0] = tensors[0][0]
    cell = compare(tensors, kind, save=True)
    assert cell[0].shape == (6, 30)
    assert torch.equal(cell[0], whole[0][0]) and torch.equal(cell[1], cell[0])


# ------------------------------------------------------------------------------------ the edges


@pytest.mark.parametrize("kind", KINDS, ids=kinds.NAMES.__getitem__)
@pytest.mark.parametrize(
    "size",
    [(0, 2, 3, 4), (3, 0, 3, 4), (0, 0, 3, 4), (3, 2, 0, 4), (3, 2, 3, 0), (3, 9, 0, 4)],
    ids=str,
)
def test_empty(kind, size):
    tensors = arguments(kind, size)
    mine, truth = run(tensors, kind, save=True), define(tensors, kind, save=True)
    for what, a, b in zip(NAMES, mine, truth, strict=True):
        assert a.shape == b.shape, what
        torch.testing.assert_close(a, b)


def test_empty_batch_sizes():
    tensors = arguments(LSTM, (1, 1, 3, 4), states=False)
    tensors[0], tensors[-1] = torch.randn(0, 3), torch.empty(0, dtype=torch.int64)
    mine = run(tensors, LSTM)
    assert [tuple(t.shape) for t in mine] == [(0, 4), (0, 4), (0, 4), (0, 0)]


@pytest.mark.parametrize("kind", KINDS, ids=kinds.NAMES.__getitem__)
@pytest.mark.parametrize("batch", [3, 16, 60])
def test_nan_stays_in_its_row(kind, batch):
    tensors = arguments(kind, (6, batch, 10, 40))
    clean = run(tensors, kind, save=True)
    tensors[0][2, 1, 4] = float("nan")
    for packed in (None, pack(tensors, kind)):
        y, h, c, _ = run(tensors, kind, save=True, packed=packed)
        assert bool(y[2:, 1].isnan().all()) and bool(h[1].isnan().all())
        others = torch.arange(batch) != 1
        assert torch.equal(y[:, others], clean[0][:, others]) or packed is not None
        assert not bool(y[:, others].isnan().any()) and not bool(y[:2, 1].isnan().any())
        if kind == LSTM:
            assert bool(c[1].isnan().all()) and not bool(c[others].isnan().any())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_gates_saturate(dtype):
    """Gates that are wide open or shut are exactly 1 or 0, and infinity is as in torch."""
    hidden = 20
    for value in (30.0, 1e4, 1e30, float("inf")):
        tensors = arguments(LSTM, (1, 1, 1, hidden), dtype, biases=True)
        for i in (3, 4):
            tensors[i].zero_()
        tensors[6].zero_()
        bias = tensors[5].view(4, hidden)
        bias[0], bias[1], bias[2], bias[3] = -value, value, 0.5, value
        y, _, c, _ = run(tensors, LSTM, save=True)
        assert torch.equal(c, tensors[2]) if value > 40 else torch.allclose(c, tensors[2])
        torch.testing.assert_close(y[0], c.tanh())
        bias[1], bias[3] = -value, -value
        y, _, c, _ = run(tensors, LSTM, save=True)
        assert float(c.abs().max()) < 1e-9 and float(y.abs().max()) < 1e-9


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", (RNN_TANH, LSTM, GRU), ids=kinds.NAMES.__getitem__)
def test_views(view, kind):
    """Every tensor in any strides, and the memory around it never read."""
    strange = VIEWS[view]
    for size in ((5, 3, 7, 20), (4, 20, 6, 9), (1, 6, 7, 20)):
        tensors = arguments(kind, size, peephole=kind == LSTM, projection=8 * (kind == LSTM))
        if view == "scalar":  # alike in all units: far out, all that is left of a gate is rounding
            tensors = [t if t is None else t / 4 for t in tensors]
        odd = [t if t is None else strange(t) for t in tensors]
        compare(odd, kind, save=True)
        dense = [t if t is None else t.contiguous() for t in odd]
        for a, b in zip(run(odd, kind), run(dense, kind), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("batch", [1, 3, 20, 70])
def test_batch_first_views(batch):
    """x as batch_first has it: the time steps of a sequence lie one after the other."""
    tensors = arguments(LSTM, (12, batch, 9, 16))
    straight = run(tensors, LSTM)
    tensors[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    for a, b in zip(straight, run(tensors, LSTM), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_rows_4_kb_apart(dtype):
    """Such rows are copied: they would share one set of a cache."""
    tensors = arguments(LSTM, (4, 20, 256, 16), dtype)
    tensors[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert tensors[0].stride(1) * tensors[0].element_size() % 4096 == 0
    compare(tensors, LSTM, packed=pack(tensors, LSTM))


@needs_poison
def test_every_output_is_written():
    for kind in KINDS:
        for size in ((3, 2, 5, 33), (3, 29, 5, 17)):
            tensors = arguments(kind, size)
            for t in on_fresh_memory(lambda: run(tensors, kind, save=True)):  # noqa: B023
                assert not bool(t.isnan().any())


def test_outputs_are_fresh():
    tensors = arguments(LSTM, (0, 2, 3, 4))
    _, h, c, _ = run(tensors, LSTM)
    assert torch.equal(h, tensors[1]) and h.data_ptr() != tensors[1].data_ptr()
    assert torch.equal(c, tensors[2]) and c.data_ptr() != tensors[2].data_ptr()
    tensors = arguments(LSTM, (2, 2, 3, 4))
    before = [t if t is None else t.clone() for t in tensors]
    run(tensors, LSTM)
    assert all(a is None or torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


# ------------------------------------------------------------------------------- threads, packing


@pytest.mark.parametrize("kind", KINDS, ids=kinds.NAMES.__getitem__)
def test_one_and_two_threads_agree(kind):
    threads = torch.get_num_threads()
    for size in ((4, 2, 30, 1300), (3, 64, 20, 40), (30, 7, 40, 50), (3, 20, 8, 600)):
        tensors = arguments(kind, size, norm=kind == LSTM and size[1] == 20)
        packed = pack(tensors, kind)
        results = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append([run(tensors, kind, save=True, packed=p) for p in (None, packed)])
        finally:
            torch.set_num_threads(threads)
        for one, two in zip(*results, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=kinds.NAMES.__getitem__)
def test_bfloat16_weights(kind):
    """The state's weights in bfloat16, sums in float32: what rounded weights give."""
    for size in ((9, 1, 10, 50), (7, 3, 10, 35), (5, 24, 10, 40)):
        tensors = arguments(kind, size)
        mine = run(tensors, kind, packed=pack(tensors, kind, bfloat16=True))
        tensors[4] = tensors[4].bfloat16().float()
        theirs, truth = define(tensors, kind), define(tensors, kind, dtype=torch.float64)
        for what, a, b, c in zip(NAMES, mine, theirs, truth, strict=True):
            assert_as_accurate(a, b, c, what=what)


def test_bfloat16_packing_is_smaller():
    tensors = arguments(LSTM, (1, 1, 8, 64))
    assert pack(tensors, LSTM, bfloat16=True).numel() < pack(tensors, LSTM).numel()
    tensors[4][0, 0] = float("nan")
    assert bool(run(tensors, LSTM, packed=pack(tensors, LSTM, bfloat16=True))[0].isnan().any())


def test_packed_of_other_weights_is_refused():
    tensors = arguments(LSTM, (3, 2, 8, 64))
    other = arguments(LSTM, (3, 2, 9, 64))
    with pytest.raises(ValueError, match="packed"):
        scan(*tensors, pack(other, LSTM), LSTM, False, 0.0, False)
    with pytest.raises(ValueError, match="packed"):
        scan(*tensors, pack(tensors, LSTM).double(), LSTM, False, 0.0, False)


def test_the_native_kernel_runs_and_says_how():
    expected = {(5, 2, 8, 16): "scan", (5, 64, 8, 16): "scan_groups", (2, 1, 8, 700): "scan_wide"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", nnarch.FallbackWarning)
        for size, algorithm in expected.items():
            x, _, _, ih, hh, *_ = arguments(LSTM, size)
            with nnarch.trace() as t:
                F.lstm_layer(x, ih, hh, packed=pack_recurrent_weights(ih, hh, kind=LSTM))
            ran = [(r.op, r.algorithm) for r in t if r.op == "recurrent_scan"]
            assert ran == [("recurrent_scan", algorithm)]


def check_isa() -> None:
    """For `check_under_isa`: every cell, few rows and many, whole blocks and half ones."""
    for kind in KINDS:
        for size in ((6, 1, 20, 37), (5, 3, 7, 72), (4, 20, 24, 33), (1, 2, 5, 9)):
            tensors = arguments(kind, size, peephole=kind == LSTM)
            compare(tensors, kind, save=True)
            compare(tensors, kind, packed=pack(tensors, kind))
    tensors = arguments(LSTM, (6, 5, 7, 41), norm=True, projection=19)
    compare(tensors, LSTM, save=True)
    test_bfloat16_weights(GRU)
    test_gates_saturate(torch.float32)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_instruction_sets(isa):
    check_under_isa(isa, check_isa)
