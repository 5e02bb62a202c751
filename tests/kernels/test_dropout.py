"""dropout: the mask is the definition's on every backend, in the backward, for any strides."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import BACKENDS, DTYPES, VIEWS, name_of, needs_poison, on_fresh_memory

import nnarch
from nnarch import functional as F
from nnarch.kernels.dropout import reference
from nnarch.kernels.dropout.op import dropout_op

SEED = torch.tensor([0x1234_5678_9ABC_DEF0])
# Around a quad, a step of every instruction set, the 1024 elements made at once, and a task.
SHAPES = [
    (),
    (0,),
    (1,),
    (3, 0),
    (7, 1),
    (50, 2),
    (33, 3),
    (9, 4),
    (40, 5),
    (6, 16),
    (5, 63),
    (3, 64),
    (2, 3, 65),
    (3, 1025),
    (2, 4100),
    (1, 16387),
    (70, 512),
    (2, 3, 4, 5),
]

SAMPLES = {
    "dropout": lambda: [
        (torch.randn(3, 5, 41), SEED.clone(), 0.3),
        (torch.randn(70, 64), SEED.clone(), 0.9),
    ]
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_mask_is_the_definition(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for p in (0.1, 0.5, 1.0):
        y = on_fresh_memory(lambda p=p: dropout_op(x, SEED, p))
        with nnarch.trace() as trace:
            assert torch.equal(dropout_op(x, SEED, p), y)
        assert [(e.op, e.backend) for e in trace] == [("dropout", "cpu")]
        wide = reference.dropout(x.double(), SEED, p).to(dtype)
        assert torch.equal(y == 0, wide == 0)
        torch.testing.assert_close(y, wide)


def test_philox():
    """The generator's published answers (Random123's kat_vectors)."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    known = [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]
    for counter, seed, words in known:
        counters = [torch.tensor(c) for c in counter]
        assert tuple(int(w) for w in reference.philox(torch.tensor(seed), *counters)) == words


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_statistics(p):
    """Frequencies within 5 standard deviations: overall, by row, by column, by neighbours."""
    n = 1000
    kept = dropout_op(torch.ones(n, n), SEED, p) != 0
    for axis in (None, 0, 1):
        share = kept.double().mean() if axis is None else kept.double().mean(axis)
        count = n * n if axis is None else n
        assert bool(((share - (1 - p)).abs() < 5 * math.sqrt(p * (1 - p) / count)).all())
    for pairs in (kept[:, 1:] & kept[:, :-1], kept[1:] & kept[:-1], kept[:, 4:] & kept[:, :-4]):
        share, expected = pairs.double().mean(), (1 - p) ** 2
        assert abs(share - expected) < 8 * math.sqrt(expected * (1 - expected) / (n * n))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_has_the_mask(backend):
    x = torch.randn(7, 37, dtype=torch.float64, requires_grad=True)
    with nnarch.use_backend(backend):
        torch.manual_seed(3)
        y = F.dropout(x, 0.4)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad == 0, y == 0)
    torch.testing.assert_close(grad * x, y)
    assert 0 < int((y == 0).sum()) < y.numel()


def test_gradcheck():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout_op(x, SEED, 0.4), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout_op(x, SEED, 0.4), x)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    """An element's place is where it is indexed, not where it lies."""
    x = VIEWS[view](torch.randn(6, 9))
    assert torch.equal(dropout_op(x, SEED, 0.5), dropout_op(x.clone().contiguous(), SEED, 0.5))


def test_memory_format():
    x = torch.randn(2, 5, 4, 3)
    last = x.contiguous(memory_format=torch.channels_last)
    y = dropout_op(last, SEED, 0.5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, dropout_op(x, SEED, 0.5))


def test_seeds():
    """torch.manual_seed decides; calls differ."""
    x = torch.ones(2000)
    torch.manual_seed(1)
    a, b = F.dropout(x), F.dropout(x)
    torch.manual_seed(1)
    assert torch.equal(a, F.dropout(x)) and not torch.equal(a, b)


def test_nothing_to_drop():
    x = torch.randn(5)
    assert F.dropout(x, 0.5, training=False) is x
    assert F.dropout(x, 0.0) is x
    assert not F.dropout(x, 1.0).any()


def test_inplace():
    x = torch.randn(300, requires_grad=True)
    h = x * 2
    y = F.dropout(h, 0.5, inplace=True)
    assert y is h
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 4.0 * (y != 0))


def test_not_finite():
    """As torch: a product, so that infinity dropped is NaN."""
    x = torch.full((400,), math.inf)
    y, mask = dropout_op(x, SEED, 0.5), dropout_op(torch.ones(400), SEED, 0.5)
    assert torch.equal(y.isnan(), mask == 0) and torch.equal(y.isinf(), mask != 0)


@needs_poison
def test_reads_no_uninitialised_memory():
    x = torch.randn(7, 333)
    assert torch.equal(on_fresh_memory(lambda: dropout_op(x, SEED, 0.5)), dropout_op(x, SEED, 0.5))


def test_compile():
    torch._dynamo.reset()
    x = torch.ones(4000, requires_grad=True)
    compiled = torch.compile(lambda x: F.dropout(x, 0.25), fullgraph=True, backend="aot_eager")
    a, b = compiled(x), compiled(x)
    assert not torch.equal(a, b)  # drawn anew at every call
    a.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, a.detach())
    assert abs(float((a != 0).float().mean()) - 0.75) < 0.05


BAD = [
    (lambda: F.dropout(torch.ones(3), 1.5), ValueError, "p must be between 0 and 1"),
    (lambda: F.dropout(torch.ones(3), -0.1), ValueError, "p must be between 0 and 1"),
    (lambda: F.dropout(torch.ones(3, dtype=torch.int64)), TypeError, "must be floating point"),
    (lambda: F.dropout([1.0]), TypeError, "input must be a tensor"),  # type: ignore[arg-type]
    (lambda: dropout_op(torch.ones(3), torch.ones(1), 0.5), TypeError, "seed must be an int64"),
    (lambda: dropout_op(torch.ones(3), SEED.expand(2), 0.5), TypeError, "seed must be an int64"),
    (lambda: dropout_op(torch.ones(3), SEED, 2.0), ValueError, "dropout_p must be between"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=f"dropout: .*{message}"):
        call()
