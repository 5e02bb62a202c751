"""Upsampling against torch: nearest bit for bit, bilinear against float64, and their gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import (
    DTYPES,
    FORMATS,
    VIEWS,
    check_under_isa,
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
from nnarch.kernels.upsample import reference
from nnarch.kernels.upsample.op import upsample2d_input_grad, upsample2d_op


def _image(*size: int) -> Tensor:
    return torch.randn(size).contiguous(memory_format=torch.channels_last)


_OPTIONS = [(False, False, 0.0, 0.0), (True, False, 2.3, 1.7), (True, True, 0.0, 0.0)]
SAMPLES = {
    "upsample2d": lambda: [(_image(2, 12, 5, 7), [11, 12], *o) for o in _OPTIONS],
    "upsample2d_input_grad": lambda: [(_image(2, 12, 11, 12), [2, 12, 5, 7], *o) for o in _OPTIONS],
}

# What interpolate takes, by how sizes come about.
SIZES = {
    "double": {"scale_factor": 2},
    "eight times": {"scale_factor": 8},
    "no whole number": {"scale_factor": (1.7, 3.3)},
    "less": {"scale_factor": (0.6, 0.21)},
    "more and less": {"scale_factor": (4.0, 0.5)},
    "recomputed": {"scale_factor": 2.4, "recompute_scale_factor": True},
    "primes": {"size": (13, 29)},
    "one": {"size": 1},
    "one row": {"size": (1, 40)},
    "the same": {"size": (7, 9)},
}
MODES = {
    "nearest": {"mode": "nearest"},
    "bilinear": {"mode": "bilinear"},
    "corners": {"mode": "bilinear", "align_corners": True},
}
# Channels of less than a vector, of no whole vectors, of many; single pixels, wide rows.
SHAPES = [(2, 5, 7, 9), (1, 64, 7, 9), (2, 21, 6, 5), (3, 37, 7, 9), (1, 3, 5, 61), (0, 3, 7, 9)]
each_size = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
each_format = pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)


def _functions(**options):
    return (
        lambda x: F.interpolate(x, **options),
        lambda x: TF.interpolate(x, **options),
    )


@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@each_size
@each_mode
def test_forward_and_backward(mode, size, dtype, memory_format):
    if mode["mode"] == "nearest" and dtype not in DTYPES[:2]:
        pytest.skip("by scale: torch rounds its positions in float32, see test_nearest_is_torchs")
    ours, theirs = _functions(**mode, **size)
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
        if 0 in ours(x).shape[2:]:
            continue
        grad = torch.randn(ours(x).shape).to(dtype)
        # Many gradients become one input's: torch adds them one by one.
        y = compare(ours, theirs, {"x": x}, grad, ulps=64)
        assert y.is_contiguous(memory_format=nnarch.library.output_format(x))


@each_format
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_nearest_is_torchs(dtype, memory_format):
    """Bit for bit, infinities and NaN too, for every pair of small sizes and odd factors."""
    x = torch.randn(1, 3, 17, 23).to(dtype)
    x[0, 1, 3, 5], x[0, 2, 2, 2], x[0, 0, 7] = float("nan"), float("inf"), -float("inf")
    x = x.contiguous(memory_format=memory_format)
    for size in itertools.product((1, 2, 5, 16, 17, 18, 33, 51, 97), (1, 7, 22, 23, 46, 50)):
        if memory_format == torch.channels_last and dtype == torch.float64:
            continue  # there torch rounds sources to float, and nowhere else
        torch.testing.assert_close(
            F.interpolate(x, size), TF.interpolate(x, size), rtol=0, atol=0, equal_nan=True
        )
    # 1.02 and 2.02 leave the size and double it: a copy and a doubling.
    for factor in (1.0, 1.02, 1.1, 1.5, 2.0, 2.02, 2.5, 3.0, 3.14159, 5.0, 0.9, 0.5, 0.3):
        torch.testing.assert_close(
            F.interpolate(x, scale_factor=factor), TF.interpolate(x, scale_factor=factor),
            rtol=0, atol=0, equal_nan=True,
        )  # fmt: skip


@each_format
@pytest.mark.parametrize("corners", [False, True])
def test_infinities_and_nan(corners, memory_format):
    """They reach the outputs that weigh them, with a weight of 0 too, as in torch."""
    for channels in (2, 17, 64):
        x = torch.randn(1, channels, 9, 11)
        for value, rarity in ((float("nan"), 40), (float("inf"), 40), (-float("inf"), 40)):
            x[torch.randint(rarity, x.shape) == 0] = value
        x = x.contiguous()  # torch's own two formats disagree at weights of 0
        # No output that lies on an input to the last bit, where float and double may differ.
        sizes = ((17, 21), (9, 11), (1, 1)) if corners else ((18, 22), (16, 20), (13, 30), (9, 11))
        for size in sizes:
            options = {"size": size, "mode": "bilinear", "align_corners": corners}
            expected = TF.interpolate(x, **options)
            actual = F.interpolate(x.contiguous(memory_format=memory_format), **options)
            torch.testing.assert_close(actual, expected, equal_nan=True, check_stride=False)


@pytest.mark.parametrize("view", VIEWS)
@each_mode
def test_views(mode, view):
    """Input and gradient with strides that are not the usual ones, stride 0 among them."""
    ours, theirs = _functions(size=(16, 15), **mode)  # weights are quarters along one axis
    for shape in ((2, 3, 8, 8), (3, 8, 4, 5)):
        x = VIEWS[view](small_integers(torch.empty(shape)))
        grad = VIEWS[view](small_integers(torch.empty(ours(x).shape)))
        if mode["mode"] == "nearest":
            equal_to_torch(lambda x: ours(x), lambda x: theirs(x), {"x": x}, grad)
        else:
            compare(lambda x: ours(x), lambda x: theirs(x), {"x": x}, grad, ulps=16)


@each_format
@each_mode
def test_gradcheck(mode, memory_format):
    """First and second derivatives of the native code."""
    for size, channels in itertools.product(((6, 4), (2, 1), (5, 7)), (2, 17)):
        ours, _ = _functions(**mode, size=size)
        x = torch.randn(1, channels, 3, 2).double().contiguous(memory_format=memory_format)
        x.requires_grad_()
        with nnarch.trace() as trace:
            assert gradcheck(ours, x)
            assert gradgradcheck(lambda x, f=ours: f(x).square(), x)
        assert {entry.backend for entry in trace} == {"cpu"}


@each_format
@each_mode
def test_gradient_is_the_transpose(mode, memory_format):
    """⟨A·x, g⟩ = ⟨x, Aᵀ·g⟩ for sizes that no vector divides."""
    bilinear, corners = mode["mode"] == "bilinear", mode.get("align_corners", False)
    for inputs, outputs, channels in itertools.product(
        ((3, 5), (31, 2), (1, 70)), ((4, 61), (1, 1), (90, 7)), (1, 13, 40)
    ):
        x = torch.randn(2, channels, *inputs).double().contiguous(memory_format=memory_format)
        g = torch.randn(2, channels, *outputs).double().contiguous(memory_format=memory_format)
        y = upsample2d_op(x, outputs, bilinear, corners, 0.0, 0.0)
        dx = on_fresh_memory(
            lambda g=g, x=x: upsample2d_input_grad(g, x.shape, bilinear, corners, 0.0, 0.0)
        )
        torch.testing.assert_close((y * g).sum(), (x * dx).sum())
        truth = reference.upsample2d_input_grad(g, x.shape, bilinear, corners, 0.0, 0.0)
        torch.testing.assert_close(dx, truth)


@pytest.mark.parametrize("dynamic", [False, True])
@each_mode
def test_compile(mode, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: F.interpolate(x * 2, scale_factor=2, **mode),
        fullgraph=True, backend="aot_eager", dynamic=dynamic,
    )  # fmt: skip
    for height in (9, 12) if dynamic else (9,):
        x = torch.randn(2, 5, height, 10).requires_grad_()
        y, expected = compiled(x), F.interpolate(x * 2, scale_factor=2, **mode)
        assert torch.equal(y, expected)
        (a,), (b,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, expected))
        assert torch.equal(a, b)


def test_upsample_is_interpolate():
    x = torch.randn(1, 4, 5, 6)
    for options in ({"size": 9}, {"scale_factor": (2.5, 2), "mode": "bilinear"}):
        assert torch.equal(F.upsample(x, **options), F.interpolate(x, **options))


@needs_poison
@each_format
@each_mode
def test_reads_no_uninitialised_memory(mode, memory_format):
    ours, _ = _functions(size=(13, 30), **mode)
    for channels in (3, 19, 64):
        x = torch.randn(2, channels, 6, 7).contiguous(memory_format=memory_format)
        assert torch.equal(on_fresh_memory(lambda x=x: ours(x)), ours(x))


def test_images_that_leave_the_caches():
    """Outputs of 6 MB and more are written past the caches, aligned or not."""
    for shape in ((1, 64, 113, 115), (2, 21, 190, 101), (1, 1, 1100, 901)):
        for memory_format, mode in itertools.product(FORMATS, ("nearest", "bilinear")):
            x = small_integers(torch.empty(shape)).contiguous(memory_format=memory_format)
            ours, theirs = _functions(scale_factor=2, mode=mode)
            torch.testing.assert_close(ours(x), theirs(x))


def _everything(x: Tensor) -> list[Tensor]:
    results = []
    for mode, size in itertools.product(MODES.values(), SIZES.values()):
        leaf = x.detach().requires_grad_()
        y = F.interpolate(leaf, **mode, **size)
        results += [y.detach(), *torch.autograd.grad(y, leaf, y.detach())]
    return results


@each_format
def test_one_and_two_threads_agree(memory_format):
    threads = torch.get_num_threads()
    try:
        for channels in (5, 33):
            x = torch.randn(2, channels, 31, 37).contiguous(memory_format=memory_format)
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(_everything(x))
            assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    finally:
        torch.set_num_threads(threads)


def _against_reference() -> None:
    """What the subprocess of the next test runs."""
    for memory_format, dtype, channels in itertools.product(FORMATS, DTYPES[:2], (3, 21, 37)):
        x = torch.randn(2, channels, 9, 11, dtype=dtype).contiguous(memory_format=memory_format)
        results = _everything(x)
        with nnarch.use_backend("reference"):
            torch.testing.assert_close(results, _everything(x), rtol=1e-4, atol=1e-4)
    test_images_that_leave_the_caches()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, _against_reference)


X = torch.randn(1, 2, 6, 7)
GRAD = (X, [1, 2, 3, 3], True, False, 0.0, 0.0)
BAD = [
    (lambda: F.interpolate(None, 2), TypeError, "NoneType"),
    (lambda: F.interpolate(X.long(), 2), TypeError, "input must be floating point.*int64"),
    (lambda: F.interpolate(X[0], 2), NotImplementedError, r"got shape \(2, 6, 7\)"),
    (lambda: F.interpolate(X[None], 2), NotImplementedError, "takes 3 and 5 dimensions"),
    (lambda: F.interpolate(X[:, :0], 2), ValueError, r"no size but N being 0, got shape \(1, 0"),
    (lambda: F.interpolate(X, 2, mode="bicubic"), NotImplementedError, "mode must.*'bicubic'"),
    (lambda: F.upsample(X, 2, mode="area"), NotImplementedError, "upsample: mode must.*'area'"),
    (lambda: F.interpolate(X, 2, mode=3), TypeError, "mode must be a string, got 3"),
    (lambda: F.interpolate(X, 2, mode="bilinear", antialias=True), NotImplementedError, "antialia"),
    (lambda: F.interpolate(X), ValueError, "one of size and scale_factor"),
    (lambda: F.interpolate(X, 2, 2.0), ValueError, "one of size and scale_factor"),
    (lambda: F.interpolate(X, 2, align_corners=True), ValueError, "align_corners is for bilinear"),
    (lambda: F.interpolate(X, 2, recompute_scale_factor=True), ValueError, "needs scale_factor"),
    (lambda: F.interpolate(X, (2, 3, 4)), ValueError, r"size must be a number or two.*\(2, 3, 4\)"),
    (lambda: F.interpolate(X, [2]), ValueError, r"size must be a number or two, got \[2\]"),
    (lambda: F.interpolate(X, 2.5), TypeError, "size must be an int or two, got 2.5"),
    (lambda: F.interpolate(X, True), TypeError, "size must be an int or two, got True"),
    (lambda: F.interpolate(X, 0), ValueError, r"at least one row and column, got \(0, 0\)"),
    (lambda: F.interpolate(X, (3, -1)), ValueError, r"at least one row.*got \(3, -1\)"),
    (lambda: F.interpolate(X, None, 0.1), ValueError, r"at least one row.*got \(0, 0\)"),
    (lambda: F.interpolate(X, None, -2), ValueError, "scale_factor must be above 0.*got -2"),
    (lambda: F.interpolate(X, None, float("nan")), ValueError, "scale_factor must be above 0"),
    (lambda: F.interpolate(X, None, "2"), TypeError, "scale_factor must be a number.*'2'"),
    (lambda: F.interpolate(X, None, (2, 2, 2)), ValueError, "scale_factor must be a number or two"),
    (lambda: F.interpolate(X, (1, 2**62)), ValueError, "overflows int64"),
    (lambda: F.interpolate(X, 2**70), ValueError, r"below 2\*\*63"),
    (lambda: upsample2d_input_grad(X, [1, 3, 3, 3], *GRAD[2:]), ValueError, "input_size must be"),
    (lambda: upsample2d_input_grad(X, [1, 2, 0, 3], *GRAD[2:]), ValueError, "must be positive"),
    (lambda: nnarch.nn.Upsample(scale_factor=2, mode="bicubic"), NotImplementedError, "Upsample"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
