"""Pooling of views, of images without batch or larger than caches, on any threads and instruction
sets."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DTYPES,
    FORMATS,
    VIEWS,
    check_under_isa,
    equal_to_torch,
    name_of,
    needs_poison,
    on_fresh_memory,
    small_integers,
)
from pooling_cases import AVERAGE, MAX, POOLS, assert_same, awkward_image, each_pool, image
from torch import Tensor
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F


@pytest.mark.parametrize("view", VIEWS)
@each_pool
def test_views(ours, theirs, view):
    """Input and gradient with strides that are not the usual ones, stride 0 among them."""
    for size in ((2, 3, 8, 8), (3, 8, 4, 8)):
        x = VIEWS[view](small_integers(torch.empty(size)))
        grad = VIEWS[view](small_integers(torch.empty(ours(x).shape)))
        equal_to_torch(lambda x: ours(x), lambda x: theirs(x), {"x": x}, grad)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@each_pool
def test_backward_of_a_sum(ours, theirs, memory_format):
    """`.sum()` sends back a gradient of strides 0."""
    x = image((2, 5, 9, 10), torch.float64, memory_format).requires_grad_()
    (gradient,) = torch.autograd.grad(ours(x).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs(x).sum(), x)[0])


@each_pool
def test_image_without_batch(ours, theirs):
    x = image((2, 5, 9, 10))[0].requires_grad_()
    y, expected = ours(x), theirs(x)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad)
    )


def test_windows_larger_than_the_cache():
    """One window over a large plane, and a few over planes that are cut."""
    for size in ((2, 3, 700, 800), (1, 3, 1200, 1000), (2, 40, 150, 160)):
        x = image(size)
        for output in (1, (2, 3)):
            assert_same(
                F.adaptive_max_pool2d(x, output, return_indices=True),
                TF.adaptive_max_pool2d(x, output, return_indices=True),
            )
        torch.testing.assert_close(
            F.adaptive_avg_pool2d(x, (2, 3)), TF.adaptive_avg_pool2d(x, (2, 3))
        )


def test_indices_of_an_image_without_batch():
    x = image((1, 5, 9, 10))[0]
    for ours, theirs, argument in (
        (F.max_pool2d, TF.max_pool2d, 3),
        (F.adaptive_max_pool2d, TF.adaptive_max_pool2d, (2, 3)),
    ):
        assert_same(
            ours(x, argument, return_indices=True), theirs(x, argument, return_indices=True)
        )


@needs_poison
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@each_pool
def test_reads_no_uninitialised_memory(ours, theirs, memory_format):
    x = image((2, 19, 9, 10), memory_format=memory_format)
    assert torch.equal(on_fresh_memory(lambda: ours(x)), ours(x))


def _everything(x: Tensor) -> list[Tensor]:
    """The outputs and gradients of every kernel on one image."""
    results = []
    for window in MAX.values():
        results += F.max_pool2d(x, *window, return_indices=True)
    results += F.adaptive_max_pool2d(x, (4, 3), return_indices=True)
    for window in AVERAGE.values():
        results.append(F.avg_pool2d(x, *window))
    results += [F.adaptive_avg_pool2d(x, size) for size in (1, (4, 3))]
    leaf = x.detach().requires_grad_()
    for ours, _ in POOLS.values():
        y = ours(leaf)
        results += torch.autograd.grad(y, leaf, y.detach())
    return results


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_one_and_two_threads_agree(memory_format):
    x = image((3, 67, 57, 61), memory_format=memory_format)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(_everything(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def _against_reference() -> None:
    """What the subprocess of the next test runs."""
    for memory_format in FORMATS:
        for dtype in DTYPES[:2]:
            x = image((2, 37, 19, 21), dtype, memory_format)
            results = _everything(x)
            with nnarch.use_backend("reference"):
                torch.testing.assert_close(results, _everything(x))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, _against_reference)


def test_images_that_leave_the_caches():
    """Outputs are written past the caches, rows read ahead, NaN found there too."""
    for size in ((3, 64, 190, 190), (2, 80, 200, 201), (1, 68, 300, 300)):
        x = awkward_image(size, torch.float32, torch.channels_last)
        for window in ((3, 2, 1), (3, 1, 1), (2, 2, 0)):
            assert_same([F.max_pool2d(x, *window)], [TF.max_pool2d(x, *window)])
        x = small_integers(x)
        for window in ((2, 2), (2, 1), (4, 1, 2)):  # divisors that are powers of two
            assert_same([F.avg_pool2d(x, *window)], [TF.avg_pool2d(x, *window)])
