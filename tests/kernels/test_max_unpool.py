"""Max unpooling against torch, bit for bit, and its gradient."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DTYPES,
    FORMATS,
    VIEWS,
    check_under_isa,
    name_of,
    needs_poison,
    on_fresh_memory,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F

SAMPLES = {
    "max_unpool2d": lambda: [
        (torch.randn(2, 12, 4, 5).contiguous(memory_format=torch.channels_last), i, [8, 10])
        for i in (
            torch.arange(80).view(8, 10)[::2, 1::2].expand(2, 12, 4, 5),  # windows of their own
            torch.randperm(80)[:20].view(4, 5).expand(2, 12, 4, 5),
        )
    ]
}

# kernel_size, stride, padding
POOLS = [
    (2, 2, 0), (3, 2, 1), (2, 1, 0), (3, 3, 0), ((1, 2), None, 0), ((2, 1), None, 0), (4, 4, 0),
]  # fmt: skip
SIZES = [
    (2, 5, 8, 10),
    (1, 64, 28, 28),
    (9, 33, 6, 14),
    (1, 1, 4, 66),
    (3, 17, 12, 14),
    (0, 3, 6, 6),
]
each_format = pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)


def _pooled(size, dtype, memory_format, pool) -> tuple[Tensor, Tensor]:
    x = torch.randn(size).to(dtype).contiguous(memory_format=memory_format)
    return TF.max_pool2d(x, *pool, return_indices=True)


def _contiguous(function):
    """torch's own channels_last kernel takes indices in that format alone."""
    return lambda y, i, *a: function(y.contiguous(), i.contiguous(), *a)


def theirs(y: Tensor, indices: Tensor, *args) -> Tensor:
    """torch on one thread: where indices are equal, its threads race."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _contiguous(TF.max_unpool2d)(y, indices, *args)
    finally:
        torch.set_num_threads(threads)


@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_undoes_a_pooling(pool, dtype, memory_format):
    for size in SIZES:
        y, indices = _pooled(size, dtype, memory_format, pool)
        y[..., 0, 0] = float("nan")
        y.requires_grad_()
        try:
            expected = theirs(y.float(), indices, *pool, size[2:]).to(dtype)
        except ValueError:  # the pooling left out too much of its input
            continue
        actual = on_fresh_memory(lambda y=y, i=indices, s=size: F.max_unpool2d(y, i, *pool, s))
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=0, equal_nan=True, check_stride=False
        )
        assert actual.is_contiguous(memory_format=nnarch.library.output_format(y))
        grad = torch.randn(actual.shape).to(dtype)
        (dx,) = torch.autograd.grad(actual, y, grad)
        assert torch.equal(dx, torch.autograd.grad(expected, y, grad)[0])


@each_format
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_any_indices(dtype, memory_format):
    """The last of equal ones counts."""
    for size in ((2, 5, 8, 10), (1, 70, 13, 17), (9, 33, 6, 14), (3, 1, 30, 40)):
        y = torch.randn(size).to(dtype).contiguous(memory_format=memory_format)
        outputs = 4 * size[2] * size[3]
        for indices in (
            torch.randint(outputs, size),
            torch.full(size, outputs - 1),
            torch.zeros(size, dtype=torch.int64),
            torch.arange(size[2] * size[3]).flip(0).view(size[2:]).expand(size),
        ):
            assert torch.equal(F.max_unpool2d(y, indices, 2), theirs(y, indices, 2))


@each_format
def test_one_index_outside_its_window(memory_format):
    """Among windows that do not overlap, one input belongs elsewhere."""
    for size in ((1, 20, 8, 18), (2, 3, 9, 33)):
        y, indices = _pooled(
            (*size[:2], 2 * size[2], 2 * size[3]), torch.float32, memory_format, (2,)
        )
        for place in ((0, 0, 0, 0), (0, 2, 5, 7), (-1, -1, -1, -1)):
            for step in (1, -1, 2 * size[3], 30):
                moved = indices.clone()
                moved[place] = (moved[place] + step) % (4 * size[2] * size[3])
                assert torch.equal(F.max_unpool2d(y, moved, 2), theirs(y, moved, 2))


@each_format
@pytest.mark.parametrize("index", [-1, 4 * 8 * 18, 2**31, 2**32, -(2**32), 2**62, -(2**63)])
def test_an_index_outside_raises(index, memory_format):
    """Also one whose low bits would be right."""
    for channels in (2, 20):
        y, indices = _pooled((1, channels, 16, 36), torch.float32, memory_format, (2,))
        wrong = indices.clone()
        wrong[0, 1, 3, 4] = index if abs(index) < 2**32 else indices[0, 1, 3, 4] + index
        with pytest.raises(ValueError, match="max_unpool2d: indices must lie in an output"):
            F.max_unpool2d(y, wrong, 2)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    y = VIEWS[view](torch.randn(3, 8, 4, 8))
    indices = torch.randperm(3 * 8 * 32).view(3, 8, 4, 8) % 128
    views = [indices, indices[:, :1, 1:2].expand_as(indices), indices.mT.contiguous().mT]
    for i in (*views, torch.stack([indices, indices - 999], -1)[..., 0]):
        assert torch.equal(F.max_unpool2d(y, i, 2), theirs(y, i, 2))


def test_image_without_batch():
    y, indices = _pooled((1, 5, 8, 10), torch.float32, torch.contiguous_format, (2,))
    actual = F.max_unpool2d(y[0], indices[0], 2)
    assert torch.equal(actual, TF.max_unpool2d(y[0], indices[0], 2))


@each_format
def test_gradcheck(memory_format):
    """First and second derivatives of the native code."""
    # Not where indices are equal: as torch's, the gradient of each is that of the output.
    for pool in ((2, 2, 0), (3, 3, 0)):
        y, indices = _pooled((2, 9, 6, 8), torch.float64, memory_format, pool)
        y.requires_grad_()
        with nnarch.trace() as trace:
            run = lambda y, i=indices, p=pool: F.max_unpool2d(y, i, *p, (6, 8))  # noqa: E731
            assert gradcheck(run, y)
            assert gradgradcheck(lambda y, f=run: f(y).square(), y)
        assert {entry.backend for entry in trace} == {"cpu"}


def test_algorithms():
    y, indices = _pooled((1, 20, 8, 8), torch.float32, torch.channels_last, (2,))
    with nnarch.trace() as trace:
        F.max_unpool2d(y, indices, 2)
        F.max_unpool2d(y, indices.flip(2), 2)
    assert [entry.algorithm for entry in trace] == ["windows", "scatter"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda y, i: F.max_unpool2d(y * 2, i, 2),
        fullgraph=True, backend="aot_eager", dynamic=dynamic,
    )  # fmt: skip
    for height in (8, 12) if dynamic else (8,):
        y, i = _pooled((2, 5, height, 10), torch.float32, torch.contiguous_format, (2,))
        y.requires_grad_()
        assert torch.equal(compiled(y, i), F.max_unpool2d(y * 2, i, 2))
        assert torch.equal(*(torch.autograd.grad(f.square().sum(), y)[0]
                             for f in (compiled(y, i), F.max_unpool2d(y * 2, i, 2))))  # fmt: skip


@needs_poison
@each_format
def test_one_and_two_threads_agree(memory_format):
    threads = torch.get_num_threads()
    y, indices = _pooled((2, 67, 60, 64), torch.float32, memory_format, (2,))
    try:
        for i in (indices, indices.flip(0), indices // 2):
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(on_fresh_memory(lambda i=i: F.max_unpool2d(y, i, 2)))
            assert torch.equal(*results) and torch.equal(results[0], theirs(y, i, 2))
    finally:
        torch.set_num_threads(threads)


def test_images_that_leave_the_caches():
    """Outputs of 6 MB and more are written past the caches."""
    for memory_format in FORMATS:
        y, indices = _pooled((2, 64, 130, 132), torch.float32, memory_format, (2,))
        assert torch.equal(F.max_unpool2d(y, indices, 2), theirs(y, indices, 2))


def _on_this_isa() -> None:
    """What the subprocess of the next test runs."""
    for memory_format in FORMATS:
        for dtype in DTYPES[:2]:
            for pool in POOLS:
                test_undoes_a_pooling(pool, dtype, memory_format)
            test_any_indices(dtype, memory_format)
        test_one_index_outside_its_window(memory_format)
        test_an_index_outside_raises(2**32, memory_format)
    test_images_that_leave_the_caches()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, _on_this_isa)


X = torch.randn(1, 2, 3, 4)
I = torch.zeros(1, 2, 3, 4, dtype=torch.int64)  # noqa: E741
BAD = [
    (lambda: F.max_unpool2d(None, I, 2), TypeError, "NoneType"),
    (lambda: F.max_unpool2d(X.long(), I, 2), TypeError, "input must be floating point"),
    (lambda: F.max_unpool2d(X[0, 0], I, 2), ValueError, r"must be \[C, H, W\].*\(3, 4\)"),
    (lambda: F.max_unpool2d(X[:, :0], I[:, :0], 2), ValueError, "no size but N being 0"),
    (lambda: F.max_unpool2d(X, I.int(), 2), TypeError, "indices must be torch.int64.*int32"),
    (lambda: F.max_unpool2d(X, None, 2), TypeError, "indices must be a tensor.*NoneType|DLPack"),
    (lambda: F.max_unpool2d(X, I[:, :1], 2), ValueError, "indices must have the shape of input"),
    (lambda: F.max_unpool2d(X, I + 48, 2), ValueError, r"output of \(6, 8\), got 48 to 48"),
    (lambda: F.max_unpool2d(X, I - 1, 2), ValueError, "got -1 to -1"),
    (lambda: F.max_unpool2d(X, I, 2.5), TypeError, "kernel_size must be an int.*2.5"),
    (lambda: F.max_unpool2d(X, I, 2, "2"), TypeError, "stride must be an int.*'2'"),
    (lambda: F.max_unpool2d(X, I, 2, 2, 5), ValueError, r"output_size must be positive.*\(-4, -2"),
    (lambda: F.max_unpool2d(X, I, 2, output_size=(6, 8, 1)), ValueError, "2 or 4 sizes"),
    (lambda: F.max_unpool2d(X, I, 2, output_size=7), TypeError, "sequence of ints, got 7"),
    (lambda: F.max_unpool2d(X, I, 2, output_size=(6, 10)), ValueError, r"away from \(6, 8\)"),
    (lambda: F.max_unpool2d(X, I, 2**40), ValueError, "overflows int64"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_module():
    y, indices = _pooled((2, 5, 9, 10), torch.float32, torch.contiguous_format, (3, 2))
    for args in (((3, 2), {}), ((3,), {"stride": 2, "padding": 0})):
        ours, twin = nnarch.nn.MaxUnpool2d(*args[0], **args[1]), torch.nn.MaxUnpool2d(3, 2)
        assert repr(ours) == repr(twin)
        assert isinstance(ours, torch.nn.MaxUnpool2d)
        for size in (None, (9, 10), (2, 5, 9, 10)):
            if size is None and int(indices.max()) >= 81:
                continue
            assert torch.equal(ours(y, indices, output_size=size), twin(y, indices, size))
