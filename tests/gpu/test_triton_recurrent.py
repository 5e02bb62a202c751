"""The Triton kernels of recurrent layers in the interpreter, both ways, against float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from gpu_recurrent_cases import arguments, check, check_backward, check_forward  # noqa: E402
from triton_cases import VIEWS  # noqa: E402

import nnarch  # noqa: E402
from nnarch import functional as F  # noqa: E402
from nnarch import library  # noqa: E402
from nnarch.kernels.gpu import tiles  # noqa: E402
from nnarch.kernels.recurrent import (  # noqa: E402
    gpu_kernel,
    kinds,
    triton_small,
    triton_step,
)

KINDS = {"rnn_tanh": 0, "rnn_relu": 1, "lstm": 2, "gru": 3}
PACKED = [4, 2, 2]


@pytest.fixture(params=["small", "step"])
def algorithm(request, monkeypatch):
    """Both algorithms, whatever the size; on a GPU a third would take few sequences."""
    monkeypatch.setattr(gpu_kernel, "fits_persistent", lambda *_: False)
    monkeypatch.setattr(gpu_kernel, "fits_small", lambda *_: request.param == "small")
    return request.param


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("counts", [None, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_cells(algorithm, kind, counts, reverse):
    check(arguments(kind, counts=counts), kind, reverse)
    assert library.ran.algorithm == algorithm


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_half_precision(algorithm, kind):
    check(arguments(kind, counts=[3, 2, 1], dtype=torch.float16), kind, reverse=True)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_no_states_and_no_biases(algorithm, kind):
    check(arguments(kind, states=False, bias=False), kind)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("counts", [None, PACKED], ids=["whole", "packed"])
def test_projection_and_peephole(algorithm, counts, reverse):
    both = arguments(kinds.LSTM, counts=counts, proj=6, peephole=True)
    check(both, kinds.LSTM, reverse)


@pytest.mark.parametrize("proj, peephole", [(0, True), (17, False)])
def test_projection_or_peephole(algorithm, proj, peephole):
    check(arguments(kinds.LSTM, proj=proj, peephole=peephole), kinds.LSTM)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("counts", [None, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("rest", [{}, {"proj": 6, "peephole": True}], ids=["norm", "all"])
def test_normalized(rest, counts, reverse):
    check(arguments(kinds.LSTM, counts=counts, norm=True, **rest), kinds.LSTM, reverse)
    assert library.ran.algorithm == "unfused"


def test_normalized_half_precision_without_the_rest():
    tensors = arguments(kinds.LSTM, norm=True, bias=False, states=False, dtype=torch.float16)
    check(tensors, kinds.LSTM)


def test_too_many_units_to_normalize_are_refused():
    tensors = arguments(kinds.LSTM, steps=1, batch=1, inputs=1, hidden=2049, norm=True)
    with pytest.raises(NotImplementedError, match=r"norm for more than 2048 units, got 2049"):
        gpu_kernel.recurrent_scan(*tensors, None, kinds.LSTM, False, 1e-5, False)


@pytest.mark.parametrize("kind", [0, 2, 3])
@pytest.mark.parametrize("counts", [[1], [2, 1, 1], [17, 2]], ids=str)
def test_lengths(algorithm, counts, kind):
    """One step; one row in the end; more sequences than a tile has, so more than one program."""
    check(arguments(kind, counts=counts, hidden=5), kind)


@pytest.mark.parametrize("kind", [0, 2, 3])
def test_nothing_to_do(kind):
    for tensors in (
        arguments(kind, steps=0),
        arguments(kind, batch=0),
        arguments(kind, counts=[]),
    ):
        check(tensors, kind)


def test_without_saving_there_is_no_reserve(algorithm):
    *_, reserve = check_forward(arguments(kinds.GRU), kinds.GRU, save=False)
    assert reserve.shape == (9, 0)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(algorithm, view):
    tensors = [
        t if t is None or not t.is_floating_point() else view(t) for t in arguments(kinds.LSTM)
    ]
    outputs = check_forward(tensors, kinds.LSTM)
    check_backward([view(torch.randn_like(t)) for t in outputs[:3]], tensors, outputs, kinds.LSTM)


@pytest.mark.parametrize("absent", range(3), ids=["y", "h", "c"])
def test_absent_gradients(algorithm, absent):
    tensors = arguments(kinds.LSTM, proj=4)
    outputs = check_forward(tensors, kinds.LSTM)
    grads = [None if i == absent else torch.randn_like(t) for i, t in enumerate(outputs[:3])]
    check_backward(grads, tensors, outputs, kinds.LSTM)


@pytest.mark.parametrize("wanted", [1 << bit for bit in range(9)], ids=bin)
def test_one_gradient_at_a_time(wanted):
    check(
        arguments(kinds.LSTM, steps=2, hidden=4, proj=3, peephole=True), kinds.LSTM, wanted=wanted
    )


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_nan_stays_in_its_sequence(algorithm, kind):
    tensors = arguments(kind)
    clean = gpu_kernel.recurrent_scan(*tensors, None, kind, False, 0.0, True)
    tensors[0][1, 1, 2] = float("nan")
    y, h, c, _ = gpu_kernel.recurrent_scan(*tensors, None, kind, False, 0.0, True)
    assert y[1:, 1].isnan().all() and h[1].isnan().all()
    for a, b in ((y, clean[0]), (h, clean[1]), (c, clean[2])):
        assert torch.equal(a[..., [0, 2], :], b[..., [0, 2], :])
    assert torch.equal(y[0], clean[0][0])


TILES = [
    (table, precision, tile)
    for table in (
        triton_small.SMALL,
        triton_small.SMALL_BACKWARD,
        triton_step.STEP,
        triton_step.STEP_BACKWARD,
    )
    for precision in ("half", "ieee")
    for tile in table.tiles[precision]
]


@pytest.mark.parametrize(
    "table, precision, tile", TILES, ids=[f"{t.name} {p} {tile}" for t, p, tile in TILES]
)
def test_every_tile(monkeypatch, table, precision, tile):
    monkeypatch.setattr(gpu_kernel, "fits_small", lambda *_: "small" in table.name)
    monkeypatch.setattr(gpu_kernel, "fits_persistent", lambda *_: False)
    dtype = torch.float16 if precision == "half" else torch.float32
    with tiles.force(**{table.name: tile}):
        check(arguments(kinds.GRU, steps=2, hidden=35, dtype=dtype), kinds.GRU)


def test_small_sizes_are_kept_on_chip_and_large_ones_are_not():
    for dtype, hidden, expected in (
        (torch.float32, 64, "small"),
        (torch.float32, 65, "step"),
        (torch.float16, 128, "small"),
        (torch.float16, 129, "step"),
    ):
        # More sequences than `persistent` takes, which a GPU would choose for fewer.
        tensors = arguments(kinds.LSTM, steps=1, batch=9, hidden=hidden, dtype=dtype)
        gpu_kernel.recurrent_scan(*tensors, None, kinds.LSTM, False, 0.0, False)
        assert library.ran.algorithm == expected


LAYERS = {
    "lstm": (F.lstm_layer, torch.nn.LSTM),
    "gru": (F.gru_layer, torch.nn.GRU),
    "rnn": (F.rnn_layer, torch.nn.RNN),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_torchs(name):
    """Through autograd, against torch.nn itself."""
    layer, Twin = LAYERS[name]
    twin = Twin(6, 9)
    x = torch.randn(5, 3, 6)
    weights = [p.detach().clone().requires_grad_() for p in twin.parameters()]
    with nnarch.use_backend("triton"), nnarch.trace() as record:
        y, h, *_ = layer(x, *weights)
        grads = torch.autograd.grad((y * y).sum() + h.sum(), weights)
    assert {entry.backend for entry in record} == {"triton"}

    def torchs(dtype):
        module, wide = twin.to(dtype), x.to(dtype)
        y, h = module(wide)
        h = h[0] if isinstance(h, tuple) else h
        return y, *torch.autograd.grad((y * y).sum() + h.sum(), list(module.parameters()))

    expected = [t.detach() for t in torchs(torch.float32)]
    truth = [t.detach() for t in torchs(torch.float64)]
    for three in zip([y.detach(), *grads], expected, truth, strict=True):
        assert_as_accurate(*three)


def test_unsupported_dtype_names_operation_and_dtype():
    with pytest.raises(NotImplementedError, match=r"recurrent_scan for torch\.float64"):
        gpu_kernel.recurrent_scan(
            *arguments(kinds.GRU, dtype=torch.float64), None, kinds.GRU, False, 0.0, False
        )
