"""Pooling against torch: maxima and their positions bit for bit, averages against float64."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from kernel_cases import (
    DTYPES,
    FORMATS,
    compare,
    name_of,
    on_fresh_memory,
)
from pooling_cases import (
    ADAPTIVE,
    AVERAGE,
    MAX,
    SIZES,
    assert_same,
    awkward_image,
    each_pool,
    image,
)
from tolerances import assert_as_accurate
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch.kernels.pooling import maximum, reference

# ------------------------------------------------------------------------------------- maximum


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("window", MAX.values(), ids=MAX)
def test_max(window, dtype, memory_format):
    """Values and positions, with torch's rules for ties, infinities and NaN."""
    for size in SIZES:
        x = awkward_image(size, dtype, memory_format)
        expected = TF.max_pool2d(x, *window, return_indices=True)
        actual = on_fresh_memory(partial(F.max_pool2d, x, *window, return_indices=True))
        assert_same(actual, expected)
        assert_same([on_fresh_memory(partial(F.max_pool2d, x, *window))], expected[:1])
        assert actual[0].is_contiguous(memory_format=nnarch.library.output_format(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("width", range(1, 18))
def test_narrow_planes(width, dtype):
    """Rows shorter than a vector, plane behind plane; a NaN would take another way."""
    x = image((2, 5, width + 1, width), dtype)
    for kernel, stride, padding, ceil in itertools.product((2, 3, 5), (1, 2, 3), (0, 1), (0, 1)):
        if width + 2 * padding < kernel:
            continue
        window = kernel, stride, padding
        for wants_gradient in (False, True):
            t = x.clone().requires_grad_(wants_gradient)
            y = F.max_pool2d(t, *window, ceil_mode=bool(ceil))
            assert torch.equal(y, TF.max_pool2d(t, *window, ceil_mode=bool(ceil)))
            y = F.avg_pool2d(t, *window, bool(ceil))
            truth = TF.avg_pool2d(t.double(), *window, bool(ceil))
            assert_as_accurate(y, truth.to(dtype), truth)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_one_average_that_is_not_the_mean_of_a_plane(memory_format):
    """A window with padding; a divisor that is a plane's number of pixels by chance."""
    for size, arguments in (((1, 2, 3, 3), (3, 3, 1)), ((1, 4, 3, 1), (1, 3, 0, False, True, 3))):
        x = image(size, memory_format=memory_format)
        truth = TF.avg_pool2d(x.double(), *arguments)
        torch.testing.assert_close(F.avg_pool2d(x, *arguments).double(), truth)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", ADAPTIVE, ids=str)
def test_adaptive_max(size, dtype, memory_format):
    for shape in SIZES:
        x = awkward_image(shape, dtype, memory_format)
        expected = TF.adaptive_max_pool2d(x, size, return_indices=True)
        actual = on_fresh_memory(partial(F.adaptive_max_pool2d, x, size, return_indices=True))
        assert_same(actual, expected)
        assert_same([F.adaptive_max_pool2d(x, size)], expected[:1])


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_infinity_everywhere(dtype, memory_format):
    """An input of -inf is no padding: it has a position, and the first one counts."""
    x = torch.full((1, 9, 8, 8), -float("inf"), dtype=dtype).contiguous(memory_format=memory_format)
    for window in ((3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 3, 0)):
        actual = F.max_pool2d(x, *window, return_indices=True)
        assert_same(actual, TF.max_pool2d(x, *window, return_indices=True))


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_window_of_padding_alone(memory_format):
    """-inf from nowhere: position -1, to which no gradient goes."""
    x = image((1, 2, 1, 1), memory_format=memory_format).requires_grad_()
    y, indices = F.max_pool2d(x, 2, 5, 1, 3, True, return_indices=True)
    assert bool(y.isneginf().all()) and bool((indices == -1).all())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))
    assert torch.equal(maximum.max_pool2d_gather(x.detach(), indices), torch.zeros_like(y))


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("window", MAX.values(), ids=MAX)
def test_max_gradient(window, dtype, memory_format):
    ours, theirs = (lambda x, f=f: f(x, *window) for f in (F.max_pool2d, TF.max_pool2d))
    for size in SIZES:
        x = image(size, dtype, memory_format)
        grad = torch.randn(ours(x).shape).to(dtype)
        compare(ours, theirs, {"x": x}, grad)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("window", MAX.values(), ids=MAX)
def test_taps_are_positions(window, dtype, memory_format):
    """The taps that training keeps, with torch's rules for ties, infinities and NaN."""
    kernel, stride, padding, dilation, ceil_mode = window
    pairs = [(v, v) if isinstance(v, int) else v for v in (kernel, stride or kernel, padding)]
    arguments = (*pairs, (dilation, dilation) if isinstance(dilation, int) else dilation)
    for size in SIZES:
        x = awkward_image(size, dtype, memory_format)
        y, taps = on_fresh_memory(partial(maximum.max_pool2d_taps_op, x, *arguments, ceil_mode))
        positions = reference.max_pool2d_positions(taps, x.shape, *arguments)
        assert_same((y, positions), TF.max_pool2d(x, *window, return_indices=True))


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dilation", [1, 2])
def test_taps_of_no_window(dilation, memory_format):
    """Any byte may come as a tap: what lies outside the input or the window is dropped."""
    grad = image((2, 17, 6, 5), memory_format=memory_format)
    taps = torch.randint(0, 256, grad.shape, dtype=torch.uint8).contiguous(
        memory_format=memory_format
    )
    for window in (((3, 3), (2, 2), (1, 1)), ((2, 2), (1, 1), (1, 1)), ((3, 1), (3, 3), (0, 0))):
        arguments = (*window, (dilation, dilation))
        axes = zip(grad.shape[2:], *window, strict=True)
        size = [(n - 1) * s - 2 * p + dilation * (k - 1) + 1 for n, k, s, p in axes]
        sample = (grad, taps, (2, 17, *size), *arguments, False)
        expected = reference.max_pool2d_taps_grad(*sample)
        torch.testing.assert_close(maximum.max_pool2d_taps_grad(*sample), expected)


def test_gradient_without_saved_indices():
    """The operation that saved its input finds the positions in the backward pass."""
    x = image((2, 3, 9, 10)).requires_grad_()
    arguments = ((3, 3), (2, 2), (1, 1), (1, 1), False)
    y, indices = maximum.max_pool2d_op(x, *arguments, False)
    assert indices.numel() == 0
    expected = torch.autograd.grad(TF.max_pool2d(x, 3, 2, 1).square().sum(), x)
    assert_same(torch.autograd.grad(y.square().sum(), x), expected)


# ------------------------------------------------------------------------------------- average


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("window", AVERAGE.values(), ids=AVERAGE)
def test_average(window, dtype, memory_format):
    ours, theirs = (lambda x, f=f: f(x, *window) for f in (F.avg_pool2d, TF.avg_pool2d))
    for size in SIZES:
        x = image(size, dtype, memory_format)
        grad = torch.randn(ours(x).shape).to(dtype)
        y = compare(ours, theirs, {"x": x}, grad)
        assert y.is_contiguous(memory_format=nnarch.library.output_format(x))


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("output", ADAPTIVE, ids=str)
def test_adaptive_average(output, dtype, memory_format):
    ours = partial(F.adaptive_avg_pool2d, output_size=output)
    theirs = partial(TF.adaptive_avg_pool2d, output_size=output)
    for size in SIZES:
        x = image(size, dtype, memory_format)
        grad = torch.randn(ours(x).shape).to(dtype)
        compare(lambda x: ours(x), lambda x: theirs(x), {"x": x}, grad)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("pool", [F.adaptive_max_pool2d, F.adaptive_avg_pool2d])
@pytest.mark.parametrize("size", [(0, 2), (2, 0), (0, 0)])
def test_empty_output(size, pool, memory_format):
    """No output, and a gradient of 0 (torch has no gradient for these)."""
    x = image((2, 5, 9, 10), memory_format=memory_format).requires_grad_()
    y = pool(x, size)
    assert y.shape == (2, 5, *size)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))


def test_every_small_adaptive_size():
    """More outputs than inputs, fewer, windows that overlap and windows that do not."""
    for inputs in range(1, 8):
        x = torch.randn(1, 2, inputs, inputs, dtype=torch.float64)
        for outputs in range(1, 16):
            size = (outputs, inputs)
            expected = TF.adaptive_avg_pool2d(x, size)
            torch.testing.assert_close(F.adaptive_avg_pool2d(x, size), expected)
            assert torch.equal(F.adaptive_max_pool2d(x, size), TF.adaptive_max_pool2d(x, size))


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("pool", [F.avg_pool2d, F.adaptive_avg_pool2d])
def test_average_of_infinities(pool, memory_format):
    """Infinities and NaN reach the windows that hold them, and no other."""
    theirs = getattr(TF, pool.__name__)
    for size in SIZES:
        x = awkward_image(size, torch.float32, memory_format)
        torch.testing.assert_close(pool(x, 3), theirs(x, 3), equal_nan=True)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_global_average_of_many_numbers(memory_format):
    """A running sum in float32 of a million numbers near 1 would lose three digits."""
    x = (torch.rand(1, 3, 1000, 1001) + 0.5).contiguous(memory_format=memory_format)
    truth = x.double().mean((2, 3), keepdim=True)
    torch.testing.assert_close(F.adaptive_avg_pool2d(x, 1).double(), truth, rtol=1e-7, atol=0)


# ------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@each_pool
def test_gradcheck(ours, theirs, memory_format):
    """First and second derivatives of the native code, on numbers far enough apart for maxima."""
    x = torch.randperm(2 * 3 * 6 * 5).view(2, 3, 6, 5).double() / 10
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    with nnarch.trace() as trace:
        assert gradcheck(ours, x)
        assert gradgradcheck(lambda x: ours(x).square(), x)
    assert {entry.backend for entry in trace} == {"cpu"}


def test_opcheck():
    x = image((2, 3, 7, 8), memory_format=torch.channels_last).requires_grad_()
    ops, check = torch.ops.nnarch, torch.library.opcheck
    window = ([3, 2], [2, 1], [1, 0])
    y, indices = ops.max_pool2d(x.detach(), *window, [1, 2], True, True)
    grad, shape = torch.randn_like(y), list(x.shape)
    check(ops.max_pool2d.default, (x, *window, [1, 2], True, True))
    check(ops.max_pool2d.default, (x, *window, [1, 2], True, False))
    check(ops.max_pool2d_input_grad.default, (grad.requires_grad_(), indices, shape))
    check(ops.max_pool2d_gather.default, (x, indices))
    y, taps = ops.max_pool2d_taps(x.detach(), *window, [1, 2], True)
    check(ops.max_pool2d_taps.default, (x, *window, [1, 2], True))
    check(ops.max_pool2d_taps_grad.default, (grad, taps, shape, *window, [1, 2], True))
    check(ops.adaptive_max_pool2d.default, (x, [2, 3], True))
    average = (*window, True, False, None)
    grad = torch.randn_like(ops.avg_pool2d(x.detach(), *average)).requires_grad_()
    check(ops.avg_pool2d.default, (x, *average))
    check(ops.avg_pool2d_input_grad.default, (grad, shape, *average))
    check(ops.adaptive_avg_pool2d.default, (x, [2, 3]))
    check(ops.adaptive_avg_pool2d_input_grad.default, (grad, shape))


@pytest.mark.parametrize("dynamic", [False, True])
@each_pool
def test_compile(ours, theirs, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: ours(x * 2), fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for height in (9, 12) if dynamic else (9,):
        x = image((2, 5, height, 10)).requires_grad_()
        y, expected = compiled(x), ours(x * 2)
        assert torch.equal(y, expected)
        grad = torch.randn_like(y)
        (a,), (b,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad)
        assert torch.equal(a, b)


@pytest.mark.parametrize("window", AVERAGE.values(), ids=AVERAGE)
def test_reference_is_the_gradient(window):
    """The definition of the gradient against torch's autograd, in float64."""
    kernel, stride, padding = ((v, v) if isinstance(v, int) else v for v in window[:3])
    arguments = (kernel, stride or kernel, padding, *window[3:])
    x = image((2, 3, 9, 10), torch.float64).requires_grad_()
    y = TF.avg_pool2d(x, *arguments)
    grad = torch.randn_like(y)
    actual = reference.avg_pool2d_input_grad(grad, x.shape, *arguments)
    assert_same([actual], torch.autograd.grad(y, x, grad))
