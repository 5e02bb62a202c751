"""Recurrent layers by Strassen's product of pairs of sequences: accuracy, and who meets whom."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import check_under_isa, needs_poison, on_fresh_memory
from recurrent_cases import LSTM, NAMES, RNN_RELU, RNN_TANH, arguments, define, pack, run
from tolerances import assert_as_accurate

import nnarch
from nnarch import functional as F
from nnarch import library, nn
from nnarch.kernels.recurrent import kinds

pytestmark = [
    pytest.mark.skipif(library.native is None, reason="only the native kernels have pairs"),
    pytest.mark.usefixtures("default_precision_after"),
]

# As Strassen's product of pixels.
TOLERANCE = dict(factor=3, ulps=16)

# (steps, sequences, input, hidden): odd numbers of sequences, several parts and groups, input and
# state of unlike size, shared steps, sums that are cut, y past the caches.
SIZES = [
    (5, 20, 64, 64),
    (4, 21, 32, 128),
    (6, 32, 128, 128),
    (3, 33, 192, 64),
    (3, 91, 96, 128),
    (2, 120, 128, 128),
    (2, 48, 544, 512),
    (2, 48, 1056, 64),
    (104, 120, 64, 128),
]
# RNNs have a quarter of the weights: with few of them none are packed for pairs.
CASES = [(LSTM, size) for size in SIZES] + [
    (kind, size) for kind in (RNN_TANH, RNN_RELU) for size in ((4, 37, 128, 256), (3, 48, 544, 512))
]
cases = pytest.mark.parametrize(
    ("kind", "size"), CASES, ids=lambda v: kinds.NAMES[v] if isinstance(v, int) else str(v)
)


def by_pairs(tensors, kind, **options):
    packed = pack(tensors, kind, pairs=True)
    with nnarch.trace() as record:
        results = run(tensors, kind, packed=packed, **options)
    assert record.entries[-1].algorithm.startswith("pairs")
    return results


def assert_accurate(mine, tensors, kind, **options):
    theirs = define(tensors, kind, **options)
    truth = define(tensors, kind, dtype=torch.float64, **options)
    for what, a, b, c in zip(NAMES, mine, theirs, truth, strict=True):
        assert_as_accurate(a, b, c, what=what, **TOLERANCE)


@cases
def test_forward(kind, size):
    tensors = arguments(kind, size)
    assert_accurate(by_pairs(tensors, kind), tensors, kind)


@pytest.mark.parametrize(
    "option",
    [
        {"peephole": True},
        {"projection": 32},
        {"states": False, "biases": False},
        {"lengths": [5, 5, 4, *(3,) * 14, *(2,) * 15, *(1,) * 3]},
    ],
    ids=lambda option: next(iter(option)),
)
@pytest.mark.parametrize("reverse", [False, True])
def test_options(option, reverse):
    """The reserve, too. Of sequences of unlike length the last steps have too few for pairs."""
    tensors = arguments(LSTM, (5, 35, 64, 128), **option)
    mine = by_pairs(tensors, LSTM, reverse=reverse, save=True)
    assert_accurate(mine, tensors, LSTM, reverse=reverse, save=True)


def test_batch_first_costs_no_copy_and_changes_nothing():
    tensors = arguments(LSTM, (4, 20, 64, 64))
    dense = by_pairs(tensors, LSTM)
    tensors[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(by_pairs(tensors, LSTM)[0], dense[0])


@cases
def test_reads_no_uninitialised_memory(kind, size):
    needs_poison()
    tensors = arguments(kind, size)
    expected = by_pairs(tensors, kind)
    for mine, once_more in zip(
        expected, on_fresh_memory(lambda: by_pairs(tensors, kind)), strict=True
    ):
        assert torch.equal(mine, once_more)


@pytest.mark.parametrize("size", [(6, 120, 64, 128), (2, 48, 544, 512)], ids=str)
def test_threads_change_no_bit(size):
    tensors = arguments(LSTM, size)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = by_pairs(tensors, LSTM)
        torch.set_num_threads(2)
        two = by_pairs(tensors, LSTM)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, one, two))


def test_magnitudes_of_inputs_and_weights():
    """Values of 2⁻²⁰ to 2²⁰ with weights that make up for it are no less accurate."""
    tensors = arguments(LSTM, (4, 32, 64, 128))
    scale = 2.0 ** torch.randint(-20, 21, (64,))
    tensors[0] *= scale
    tensors[3] /= scale
    assert_accurate(by_pairs(tensors, LSTM), tensors, LSTM)


# ------------------------------------------------------------------------ who meets whom


def plain(tensors, kind=LSTM, **options):
    return run(tensors, kind, packed=pack(tensors, kind), **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e4])
@pytest.mark.parametrize("row", [0, 15, 16, 31])
def test_what_is_no_size_stays_in_its_row(value, row):
    """From that step on all is as without pairs: while the state is no number, or this step."""
    tensors = arguments(LSTM, (6, 32, 64, 128))
    clean = by_pairs(tensors, LSTM)
    tensors[0][2, row, 5] = value
    y, _, c, _ = by_pairs(tensors, LSTM)
    others = torch.arange(32) != row
    assert torch.equal(y[:2], clean[0][:2])
    for mine, before in ((y[:, others], clean[0][:, others]), (c[others], clean[2][others])):
        torch.testing.assert_close(mine, before, rtol=0, atol=3e-6)
    reference, *_ = define(tensors, LSTM)
    torch.testing.assert_close(y[:, row], reference[:, row], rtol=0, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("which", [1, 2], ids=["h0", "c0"])
def test_nan_in_a_first_state_stays_in_its_row(which):
    tensors = arguments(LSTM, (3, 20, 64, 64))
    tensors[which][4, 7] = float("nan")
    y = by_pairs(tensors, LSTM)[0]
    others = torch.arange(20) != 4
    assert not bool(y[:, others].isnan().any()) and bool(y[1:, 4].isnan().all())


@pytest.mark.parametrize("which", [3, 4], ids=["weight_ih", "weight_hh"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_makes_all_steps_plain(which, value):
    tensors = arguments(LSTM, (3, 20, 64, 64))
    tensors[which][70, 3] = value
    for mine, expected in zip(by_pairs(tensors, LSTM), plain(tensors), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0, equal_nan=True)


def test_zero_weights_and_inputs_are_exact():
    tensors = arguments(LSTM, (3, 20, 64, 64))
    tensors[0].zero_(), tensors[3].zero_(), tensors[4].zero_()
    assert all(map(torch.equal, by_pairs(tensors, LSTM), plain(tensors)))


def test_weights_too_large_for_their_scale_make_all_steps_plain():
    tensors = arguments(LSTM, (3, 20, 64, 64))
    tensors[3][70, 3] = 2.0**100
    tensors[0] *= 2.0**-80
    for mine, expected in zip(by_pairs(tensors, LSTM), plain(tensors), strict=True):
        assert torch.equal(mine, expected)


def test_highest_precision_knows_no_pairs():
    tensors = arguments(LSTM, (3, 32, 64, 128))
    packed = pack(tensors, LSTM, pairs=True)
    assert not torch.equal(run(tensors, LSTM, packed=packed)[0], plain(tensors)[0])
    nnarch.set_precision("highest")
    assert all(map(torch.equal, run(tensors, LSTM, packed=packed), plain(tensors)))
    assert not F.recurrent_pairs(tensors[3], tensors[4], 32, kind=LSTM)


# ------------------------------------------------------------------------------- the choice


@pytest.mark.parametrize(
    ("kind", "size", "expected"),
    [
        (LSTM, (32, 128, 128), True),
        (LSTM, (13, 128, 128), False),  # too few sequences
        (LSTM, (32, 128, 32), False),  # too few weights
        (LSTM, (32, 120, 128), False),  # no whole vectors
        (LSTM, (32, 128, 104), False),  # no two halves of whole blocks
        (LSTM, (20, 512, 512), False),  # 8 MB of weights a step
        (LSTM, (48, 512, 512), True),
        (LSTM, (32, 1024, 1024), False),  # 32 MB
        (LSTM, (64, 1024, 1024), True),
        (LSTM, (64, 4096, 4096), False),  # 1.5 GB
        (kinds.GRU, (32, 128, 128), False),
    ],
)
def test_where_pairs_serve(kind, size, expected):
    rows, width, hidden = size
    gates = kinds.GATES[kind]
    ih = torch.empty(1).expand(gates * hidden, width)
    hh = torch.empty(1).expand(gates * hidden, hidden)
    assert F.recurrent_pairs(ih, hh, rows, kind=kind) is expected
    ih, hh = ih[:, :1].double().expand_as(ih), hh[:, :1].double().expand_as(hh)
    assert not F.recurrent_pairs(ih, hh, rows, kind=kind)


def test_bad_input():
    weight = torch.randn(64, 16)
    with pytest.raises(ValueError, match="kind must be 0 to 3, got 4"):
        F.recurrent_pairs(weight, weight, 32, kind=4)
    with pytest.raises(ValueError, match="must be 2-D, got 1-D and 2-D"):
        F.recurrent_pairs(weight[0], weight, 32, kind=LSTM)
    huge = torch.empty(1).expand(1 << 22, 1 << 40)
    assert not F.recurrent_pairs(huge, huge, 32, kind=LSTM)


def test_modules_pack_for_pairs_where_they_serve():
    """Once packed so, weights serve few sequences as well."""
    layer = nn.LSTM(64, 128, num_layers=2).eval()
    few, many = torch.randn(3, 4, 64), torch.randn(3, 32, 64)
    with torch.no_grad():
        before, _ = layer(few)
        plain = layer._packed.packed
        sizes = [plain[k].numel() for k in range(2)]
        assert sorted(plain) == [0, 1]
        y, _ = layer(many)
        assert sorted(layer._packed.packed) == [2, 3]
        assert all(2.7 < layer._packed.packed[k + 2].numel() / sizes[k] < 2.8 for k in range(2))
        assert torch.equal(layer(few)[0], before)
        assert sorted(layer._packed.packed) == [2, 3]
        truth, _ = torch.nn.LSTM.forward(layer.double(), many.double())
    torch.testing.assert_close(y.double(), truth, rtol=0, atol=3e-6)


def test_cells_pack_for_pairs_where_they_serve():
    cell = nn.LSTMCell(64, 128).eval()
    with torch.no_grad():
        cell(torch.randn(4, 64))
        assert sorted(cell._packed.packed) == [0]
        x = torch.randn(32, 64)
        h, c = cell(x)
        assert sorted(cell._packed.packed) == [1]
        truth = torch.nn.LSTMCell.forward(cell.double(), x.double())
    torch.testing.assert_close((h.double(), c.double()), truth, rtol=0, atol=3e-6)


def test_a_normalized_layer_packs_none():
    layer = nn.LayerNormLSTM(64, 128).eval()
    with torch.no_grad():
        layer(torch.randn(3, 32, 64))
    assert sorted(layer._packed.packed) == [0]


def test_packed_sequences_need_no_values_to_be_traced():
    """How many sequences there are is read for packed weights alone."""
    layer = nn.LSTM(8, 16)
    sequences = torch.nn.utils.rnn.pack_padded_sequence(torch.randn(3, 2, 8), torch.tensor([3, 2]))

    def fail(_):
        raise AssertionError("batch_sizes was read")

    class Unread(torch.Tensor):
        __int__ = fail

    data, sizes, *order = sequences
    unread = torch.nn.utils.rnn.PackedSequence(data, sizes.as_subclass(Unread), *order)
    y, _ = layer(unread)
    assert torch.equal(y.data, layer(sequences)[0].data)


def test_weights_in_bfloat16_have_no_pairs():
    layer = nn.LSTM(64, 128, weight_storage=torch.bfloat16).eval()
    with torch.no_grad():
        layer(torch.randn(3, 32, 64))
    assert sorted(layer._packed.packed) == [0]
    with pytest.raises(ValueError, match="no bfloat16 form"):
        F.pack_recurrent_weights(
            layer.weight_ih_l0, layer.weight_hh_l0, kind=LSTM, bfloat16=True, pairs=True
        )


# ------------------------------------------------------------------------- instruction sets


def check_isa() -> None:
    for kind, size in ((LSTM, (4, 33, 64, 128)), (RNN_TANH, (3, 48, 544, 512))):
        tensors = arguments(kind, size)
        assert_accurate(by_pairs(tensors, kind), tensors, kind)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_instruction_sets(isa):
    check_under_isa(isa, check_isa)
