"""Pooling against torch: maxima and their positions bit for bit, averages against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    DTYPES,
    FORMATS,
    VIEWS,
    compare,
    equal_to_torch,
    name_of,
    needs_poison,
    on_fresh_memory,
    small_integers,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch.kernels.pooling import maximum, reference

# kernel_size, stride, padding, dilation, ceil_mode
MAX = {
    "stem of ResNet": (3, 2, 1, 1, False),
    "overlapping": (3, 1, 1, 1, False),
    "halves": (2, 2, 0, 1, False),
    "default stride": (2, None, 0, 1, True),
    "nothing symmetric": ((3, 2), (2, 1), (1, 0), (1, 2), True),
    "large, dilated": ((3, 4), (1, 2), (1, 2), (3, 2), False),
    "gaps between windows": (2, (3, 5), 1, 1, True),
    "first windows begin last": (2, 3, 1, 4, True),  # their first tap is padding
    "single pixels": (1, 2, 0, 1, False),
    "wide": ((1, 7), 1, (0, 3), 1, False),
    "whole image": ((9, 10), 1, 0, 1, False),
}
# kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
AVERAGE = {
    "halves": (2, 2, 0, False, True, None),
    "overlapping": (3, 1, 1, False, True, None),
    "padding not counted": (3, 1, 1, False, False, None),
    "strided": (3, 2, 1, False, True, None),
    "past the end": (3, 2, 1, True, True, None),
    "past the end, not counted": ((2, 3), (3, 2), (1, 1), True, False, None),
    "own divisor": (3, 2, 1, True, True, 5),
    "negative divisor": (2, None, 0, False, False, -3),
    "nothing symmetric": ((4, 2), (1, 3), (2, 0), False, True, None),
    "gaps between windows": (2, 5, 1, True, True, None),
    "whole image": ((9, 10), None, 0, False, True, None),
}
SIZES = [(2, 5, 9, 10), (0, 3, 9, 10), (3, 1, 13, 11), (1, 67, 17, 23)]
ADAPTIVE = [1, (3, 4), (9, 2), (4, 15), 7, (None, 3), (2, None), (None, None)]


def image(size, dtype=torch.float32, memory_format=torch.contiguous_format) -> Tensor:
    return torch.randn(size).to(dtype).contiguous(memory_format=memory_format)


def awkward_image(size, dtype, memory_format) -> Tensor:
    """Many ties, some infinities, and NaN alone and side by side."""
    x = torch.randint(-2, 3, size).to(dtype)
    infinity = float("inf")
    for value, rarity in ((-infinity, 5), (infinity, 29), (float("nan"), 23)):
        x[torch.randint(rarity, size) == 0] = value
    return x.contiguous(memory_format=memory_format)


def assert_same(actual, expected) -> None:
    """Equal values and positions, NaN equal to NaN, in torch's dtype."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_stride=False)


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


# ------------------------------------------------------------------------------ shapes and memory

POOLS = {
    "max": (partial(F.max_pool2d, kernel_size=3, stride=2, padding=1),
            partial(TF.max_pool2d, kernel_size=3, stride=2, padding=1)),
    "adaptive max": (partial(F.adaptive_max_pool2d, output_size=(2, 3)),
                     partial(TF.adaptive_max_pool2d, output_size=(2, 3))),
    # Divisors that are powers of two: nothing is rounded.
    "average": (partial(F.avg_pool2d, kernel_size=(2, 3), padding=1, divisor_override=4),
                partial(TF.avg_pool2d, kernel_size=(2, 3), padding=1, divisor_override=4)),
    "adaptive average": (partial(F.adaptive_avg_pool2d, output_size=(4, 2)),
                         partial(TF.adaptive_avg_pool2d, output_size=(4, 2))),
    "global average": (partial(F.adaptive_avg_pool2d, output_size=1),
                       partial(TF.adaptive_avg_pool2d, output_size=1)),
}  # fmt: skip
each_pool = pytest.mark.parametrize(("ours", "theirs"), POOLS.values(), ids=POOLS)


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
    script = (
        "import sys, torch, test_pooling\n"
        "from nnarch.backends import isa\n"
        "if isa() != sys.argv[1]: sys.exit(77)\n"
        "torch.manual_seed(0)\n"
        "test_pooling._against_reference()\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here, here.parent, os.environ.get("PYTHONPATH", ""))))
    run = subprocess.run(
        [sys.executable, "-c", script, isa],
        env={**os.environ, "NNARCH_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if run.returncode == 77 or "this CPU lacks it" in run.stderr:
        pytest.skip(f"this CPU lacks {isa}")
    assert run.returncode == 0, run.stderr


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
