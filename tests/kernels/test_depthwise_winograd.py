"""7×7 depthwise convolution by Winograd's algorithm along the rows: accuracy, edges, the choice."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import ACTIVATIONS, check_under_isa, needs_poison, on_fresh_memory
from tolerances import assert_as_accurate
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch import library
from nnarch.backends import isa

ALGORITHM = "depthwise_winograd"
# As Winograd's 4×4 tiles of dense kernels.
TOLERANCE = dict(factor=3, ulps=16)


def tensors(n, c, h, w):
    x = torch.randn(n, c, h, w).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(c, 1, 7, 7) / 7, torch.randn(c)


def ran(call):
    with nnarch.trace() as record:
        y = call()
    return y, record.entries[-1].algorithm


pytestmark = [
    pytest.mark.skipif(library.native is None or isa() != "avx512", reason="wants AVX-512"),
    pytest.mark.usefixtures("default_precision_after"),
]

# (n, c, h, w, padding): odd numbers of rows and columns, strips, bands, all kinds of edges.
SHAPES = [
    (1, 16, 8, 8, 3),
    (2, 32, 14, 13, 3),
    (1, 16, 15, 14, 0),
    (3, 48, 9, 10, (3, 2)),
    (1, 16, 57, 75, 3),
    (1, 32, 11, 12, 6),
    (1, 96, 56, 56, 3),
    (1, 1024, 9, 9, 3),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def by_rows(x, weight, bias=None, padding=3, **epilogue):
    with torch.no_grad():
        y, algorithm = ran(
            lambda: F.conv2d(x, weight, bias, 1, padding, groups=x.shape[1], **epilogue)
        )
    assert algorithm == ALGORITHM
    return y


def direct(x, weight, bias=None, padding=3, **epilogue):
    nnarch.set_precision("highest")
    with torch.no_grad():
        return F.conv2d(x, weight, bias, 1, padding, groups=x.shape[1], **epilogue)


@shapes
def test_forward(shape):
    *size, padding = shape
    x, weight, bias = tensors(*size)
    y = by_rows(x, weight, bias, padding)
    options = dict(padding=padding, groups=x.shape[1])
    truth = TF.conv2d(x.double(), weight.double(), bias.double(), **options)
    assert_as_accurate(y, TF.conv2d(x, weight, bias, **options), truth, **TOLERANCE)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("magnitude", [2.0**-20, 2.0**20])
def test_channels_do_not_meet(magnitude):
    """Every channel is as accurate as its own outputs ask."""
    x, weight, _ = tensors(1, 32, 16, 16)
    weight[5] *= magnitude
    y, truth = by_rows(x, weight), TF.conv2d(x.double(), weight.double(), padding=3, groups=32)
    error = (y - truth).abs().amax((0, 2, 3)) / truth.abs().amax((0, 2, 3))
    assert float(error.max()) < 3e-6


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_epilogue(activation):
    x, weight, bias = tensors(2, 32, 13, 11)
    epilogue = dict(
        scale=torch.rand(32) + 0.5, shift=torch.randn(32), residual=torch.randn_like(x),
        activation=activation,
    )  # fmt: skip
    y = by_rows(x, weight, bias, **epilogue)
    torch.testing.assert_close(y, direct(x, weight, bias, **epilogue), rtol=1e-5, atol=2e-5)


@shapes
def test_input_gradient(shape):
    *size, padding = shape
    x, weight, _ = tensors(*size)
    x.requires_grad_()
    y = F.conv2d(x, weight, None, 1, padding, groups=x.shape[1])
    grad = torch.randn_like(y)
    (mine,) = torch.autograd.grad(y, x, grad)

    def theirs(dtype):
        a = x.detach().to(dtype).requires_grad_()
        out = TF.conv2d(a, weight.to(dtype), None, 1, padding, groups=x.shape[1])
        return torch.autograd.grad(out, a, grad.to(dtype))[0]

    assert_as_accurate(mine, theirs(torch.float32), theirs(torch.float64), **TOLERANCE)


@shapes
def test_reads_no_uninitialised_memory(shape):
    needs_poison()
    *size, padding = shape
    x, weight, bias = tensors(*size)
    y = by_rows(x, weight, bias, padding)
    assert torch.equal(on_fresh_memory(lambda: by_rows(x, weight, bias, padding)), y)


def test_threads_change_no_bit():
    x, weight, bias = tensors(2, 16, 60, 30)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = by_rows(x, weight, bias)
        torch.set_num_threads(2)
        assert torch.equal(by_rows(x, weight, bias), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("column", range(12, 16))
def test_nan_stays_near(column):
    """In its channel and rows, four columns further than in the direct product at most."""
    x, weight, _ = tensors(1, 32, 24, 28)
    x[0, 3, 12, column] = float("nan")
    y = by_rows(x, weight).isnan()
    expected = direct(x, weight).isnan()
    assert bool(y[expected].all())
    assert not bool(y[:, torch.arange(32) != 3].any())
    rows, columns = y[0, 3].any(1).nonzero(), y[0, 3].any(0).nonzero()
    assert rows.flatten().tolist() == list(range(9, 16))
    assert int(columns.min()) >= column - 3 - 4 and int(columns.max()) <= column + 3 + 4


def test_no_images():
    x, weight, bias = tensors(0, 16, 14, 14)
    with torch.no_grad():
        y = F.conv2d(x, weight, bias, padding=3, groups=16)
    assert y.shape == x.shape


@pytest.mark.parametrize(
    ("why", "size", "options"),
    [
        ("half a vector of channels", (1, 24, 14, 14), {}),
        ("stride", (1, 16, 14, 14), {"stride": 2}),
        ("dilation", (1, 16, 30, 30), {"dilation": 2}),
        ("mostly edge", (1, 16, 7, 7), {}),
        ("from memory", (8, 96, 60, 60), {}),
    ],
)
def test_where_it_does_not_serve(why, size, options):
    x, weight, _ = tensors(*size)
    with torch.no_grad():
        _, algorithm = ran(lambda: F.conv2d(x, weight, padding=3, groups=size[1], **options))
    assert algorithm != ALGORITHM, why


def test_highest_precision_is_direct():
    x, weight, bias = tensors(1, 32, 14, 14)
    assert not torch.equal(by_rows(x, weight, bias), direct(x, weight, bias))
    assert ran(lambda: direct(x, weight, bias))[1] == "depthwise_7x7"


def check_isa() -> None:
    x, weight, bias = tensors(2, 32, 14, 13)
    y = F.conv2d(x, weight, bias, 1, 3, groups=32)
    truth = TF.conv2d(x.double(), weight.double(), bias.double(), 1, 3, groups=32)
    assert_as_accurate(y, TF.conv2d(x, weight, bias, 1, 3, groups=32), truth, **TOLERANCE)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_instruction_sets(isa):
    check_under_isa(isa, check_isa)
