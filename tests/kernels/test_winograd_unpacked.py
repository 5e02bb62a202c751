"""Winograd with weights as they come: transformed part by part, right before their products."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    FORMATS,
    VIEWS,
    check_under_isa,
    machine_with,
    name_of,
    needs_poison,
    on_fresh_memory,
)
from tolerances import assert_as_accurate
from torch import Tensor
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch import library

pytestmark = pytest.mark.skipif(
    library.native is None, reason="only the native kernels have Winograd"
)

# (n, c, h, w, k, kernel, padding, stride, groups): sums in one part, in several of unlike size,
# panels that end early, several blocks of tiles, ends of lines.
SHAPES = [
    (1, 96, 14, 14, 96, (3, 3), 1, 1, 1),
    (1, 97, 14, 14, 112, (3, 3), 1, 1, 1),
    (2, 200, 13, 13, 200, (3, 3), 1, 1, 1),
    (1, 512, 7, 7, 144, (3, 3), 1, 1, 1),
    (1, 300, 16, 15, 136, (3, 3), 0, 1, 1),
    (3, 113, 20, 21, 129, (3, 3), 1, 1, 1),
    (1, 128, 14, 14, 136, (5, 5), 2, 1, 1),
    (2, 160, 21, 19, 144, (1, 3), (0, 1), 1, 1),
    (2, 112, 17, 15, 144, (3, 1), (1, 0), 1, 1),
    (1, 256, 29, 30, 160, (3, 3), 1, 2, 1),
    (2, 224, 12, 10, 224, (3, 3), 1, 1, 2),
    (1, 48, 30, 30, 160, (3, 3), 1, 1, 1),
]
DIRECT_GRADIENT = (5, 5)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)


def tensors(shape, memory_format=torch.channels_last) -> tuple[Tensor, Tensor]:
    n, c, h, w, k, kernel, _, _, groups = shape
    deviation = (2 * groups / (c * kernel[0] * kernel[1])) ** 0.5
    x, weight = torch.randn(n, c, h, w), torch.randn(k, c // groups, *kernel) * deviation
    return x.contiguous(memory_format=memory_format), weight.contiguous(memory_format=memory_format)


def ours(x: Tensor, weight: Tensor, shape) -> Tensor:
    with machine_with(l2_kib=1024, far_l3=False), nnarch.trace() as record:
        y = F.conv2d(x, weight, padding=shape[6], stride=shape[7], groups=shape[8])
    assert record.entries[0].algorithm.startswith("winograd")
    return y


def theirs(x: Tensor, weight: Tensor, shape) -> Tensor:
    return TF.conv2d(x, weight, padding=shape[6], stride=shape[7], groups=shape[8])


def input_gradient(convolve, x: Tensor, weight: Tensor, grad: Tensor, shape) -> Tensor:
    x = x.detach().requires_grad_()
    y = convolve(x, weight, shape)
    with machine_with(l2_kib=1024, far_l3=False), nnarch.trace() as record:
        (dx,) = torch.autograd.grad(y, x, grad)
    if record.entries and shape[5] != DIRECT_GRADIENT:  # ours
        assert record.entries[0].algorithm.startswith("winograd")
    return dx


@shapes
@formats
def test_forward(shape, memory_format):
    x, weight = tensors(shape, memory_format)
    truth = theirs(x.double(), weight.double(), shape)
    y = ours(x, weight, shape)
    assert_as_accurate(y, theirs(x, weight, shape), truth, factor=3, ulps=24)


@shapes
@formats
def test_input_gradient(shape, memory_format):
    x, weight = tensors(shape, memory_format)
    grad = torch.randn_like(theirs(x, weight, shape))
    doubles = [t.double() for t in (x, weight, grad)]
    truth = input_gradient(theirs, *doubles, shape)
    actual = input_gradient(ours, x, weight, grad, shape)
    peer = input_gradient(theirs, x, weight, grad, shape)
    assert_as_accurate(actual, peer, truth, factor=3, ulps=32)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradient_past_the_caches(stride, groups):
    """Of a weight of 9 MB: written by its transform in channels_last, from a copy otherwise."""
    size = 7 if stride == 1 else 14
    x = torch.randn(4, 512 * groups, size, size).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(512 * groups, 512, 3, 3) * 0.02
    grads = []
    for memory_format in FORMATS:
        mine = weight.contiguous(memory_format=memory_format).requires_grad_()
        y = F.conv2d(x, mine, padding=1, stride=stride, groups=groups)
        grad = torch.linspace(-1, 1, y.numel()).view_as(y)
        with machine_with(l2_kib=1024, far_l3=False), nnarch.trace() as record:
            grads += torch.autograd.grad(y, mine, grad)
        assert record.entries[-1].algorithm == "winograd_weight_grad"
        assert grads[-1].is_contiguous(memory_format=memory_format)
    assert torch.equal(*grads)
    truth = x.double(), weight.double().requires_grad_()
    y = TF.conv2d(*truth, padding=1, stride=stride, groups=groups)
    (expected,) = torch.autograd.grad(y, truth[1], grad.double())
    torch.testing.assert_close(
        grads[0].double(), expected, rtol=0, atol=5e-6 * float(expected.abs().max())
    )


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    shape = SHAPES[2]
    x, weight = tensors(shape)
    weight = VIEWS[view](weight)
    assert torch.equal(ours(x, weight, shape), ours(x, weight.contiguous(), shape))


@shapes
@formats
def test_reads_no_uninitialised_memory(shape, memory_format):
    needs_poison()
    x, weight = tensors(shape, memory_format)
    y = ours(x, weight, shape)
    assert torch.equal(on_fresh_memory(lambda: ours(x, weight, shape)), y)


@shapes
def test_one_and_two_threads(shape):
    x, weight = tensors(shape)
    y = ours(x, weight, shape)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads if threads < 3 else 1)
    try:
        assert torch.equal(ours(x, weight, shape), y)
    finally:
        torch.set_num_threads(threads)


def check_all() -> None:
    """Runs in a process of its own."""
    for shape in SHAPES:
        for memory_format in FORMATS:
            test_forward(shape, memory_format)
            test_input_gradient(shape, memory_format)
    test_gradient_past_the_caches(stride=1, groups=1)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    check_under_isa(isa, check_all)
