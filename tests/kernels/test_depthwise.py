"""Depthwise convolution: native kernels against float64 and torch, gradients, layouts, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import check_under_isa
from tolerances import assert_as_accurate
from torch import Tensor

import nnarch
from nnarch.functional import conv2d, pack_conv2d_weight
from nnarch.kernels.activation import kinds
from nnarch.kernels.activation.reference import activation as reference_activation
from nnarch.kernels.depthwise import op, reference


@pytest.fixture(autouse=True)
def _one_thread(highest_precision):
    """Tiny tensors: a second thread would only be waited for. The direct kernels alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LAYOUTS = ("contiguous", "channels_last", "strided")
#        N  C   m  H   W   R  S  stride  padding      dilation
CASES = {
    "3x3": (2, 32, 1, 14, 14, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "3x3 stride 2": (1, 48, 1, 15, 16, 3, 3, (2, 2), (1, 1, 1, 1), (1, 1)),
    "5x5": (1, 16, 1, 9, 28, 5, 5, (1, 1), (2, 2, 2, 2), (1, 1)),
    "5x5 stride 2": (1, 16, 1, 11, 17, 5, 5, (2, 2), (2, 2, 2, 2), (1, 1)),
    "7x7": (1, 16, 1, 16, 14, 7, 7, (1, 1), (3, 3, 3, 3), (1, 1)),
    "7x7, 16 pixels": (1, 24, 1, 9, 16, 7, 7, (1, 1), (3, 3, 3, 3), (1, 1)),
    "7x7, stride 2, 15 pixels": (1, 16, 1, 11, 30, 7, 7, (2, 2), (3, 3, 3, 3), (1, 1)),
    "7x7 stride 2": (1, 24, 1, 13, 13, 7, 7, (2, 2), (3, 3, 3, 3), (1, 1)),
    "few pixels": (2, 33, 1, 2, 3, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "one pixel": (1, 5, 1, 1, 1, 3, 3, (2, 2), (1, 1, 1, 1), (1, 1)),
    "one channel": (3, 1, 1, 7, 11, 3, 3, (1, 1), (0, 0, 0, 0), (1, 1)),
    "odd channels": (1, 13, 1, 7, 19, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "aliasing channels": (1, 512, 1, 7, 7, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "multiplier 2": (1, 12, 2, 9, 9, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "multiplier 3": (2, 7, 3, 8, 8, 5, 3, (2, 1), (2, 1, 2, 1), (1, 1)),
    "multiplier of one channel": (1, 1, 20, 6, 9, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "1x1 stride 2": (1, 16, 1, 5, 6, 1, 1, (2, 2), (0, 0, 0, 0), (1, 1)),
    "4x2 kernel": (1, 16, 1, 9, 9, 4, 2, (1, 1), (1, 0, 2, 1), (1, 1)),
    "9x9": (1, 8, 1, 12, 10, 9, 9, (1, 1), (4, 4, 4, 4), (1, 1)),
    "dilated": (1, 16, 1, 11, 13, 3, 3, (1, 1), (2, 3, 2, 3), (2, 3)),
    "dilated, strided": (1, 10, 1, 17, 15, 3, 3, (2, 3), (2, 2, 2, 2), (2, 2)),
    "stride divides dilation": (1, 32, 1, 21, 26, 5, 5, (2, 2), (4, 4, 4, 4), (2, 2)),
    "dilation 4, stride 2": (1, 16, 1, 19, 23, 3, 3, (2, 2), (4, 4, 4, 4), (4, 4)),
    "dilation past the width": (1, 16, 1, 9, 9, 3, 3, (1, 1), (8, 8, 8, 8), (8, 8)),
    "dilated 6x6": (1, 16, 1, 17, 18, 6, 6, (1, 1), (5, 5, 5, 5), (2, 2)),
    "stride 3": (1, 16, 1, 13, 17, 3, 3, (3, 3), (1, 1, 1, 1), (1, 1)),
    "7x7 pixels": (3, 32, 1, 7, 7, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "7x7 pixels from 14x14": (2, 32, 1, 14, 14, 3, 3, (2, 2), (1, 1, 1, 1), (1, 1)),
    "12 pixels, no padding": (2, 32, 1, 13, 14, 3, 3, (1, 1), (0, 0, 0, 0), (1, 1)),
    "28 pixels, stride 2, no padding": (1, 16, 1, 59, 57, 3, 3, (2, 2), (0, 0, 0, 0), (1, 1)),
    "7x7, stride 2, 28 pixels": (1, 20, 1, 28, 28, 7, 7, (2, 2), (3, 3, 3, 3), (1, 1)),
    "stride 2, odd padding": (1, 16, 1, 12, 17, 5, 5, (2, 2), (0, 3, 2, 1), (1, 1)),
    "flat 5x5, part of a vector": (2, 5, 2, 6, 5, 5, 5, (1, 1), (2, 2, 2, 2), (1, 1)),
    "flat 7x7 dilated": (1, 4, 1, 19, 17, 7, 7, (1, 1), (6, 6, 6, 6), (2, 2)),
    "flat, fewer rows": (2, 6, 1, 9, 7, 3, 3, (1, 1), (0, 1, 1, 1), (1, 1)),
    "from memory": (3, 48, 1, 113, 131, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "from memory, stride 2": (4, 64, 1, 131, 121, 3, 3, (2, 2), (1, 1, 1, 1), (1, 1)),
    "half a vector": (2, 24, 1, 11, 14, 5, 5, (1, 1), (2, 2, 2, 2), (1, 1)),
    "part of a vector, 7×7": (2, 45, 1, 7, 7, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "part of a vector, stride 2": (1, 8, 1, 15, 29, 3, 3, (2, 2), (1, 1, 1, 1), (1, 1)),
    "part of a vector, odd padding": (1, 19, 1, 9, 13, 3, 3, (1, 1), (0, 2, 1, 0), (1, 1)),
    "part of a vector, from memory": (2, 40, 1, 160, 163, 7, 7, (1, 1), (3, 3, 3, 3), (1, 1)),
    "far dilation": (1, 8, 1, 23, 23, 2, 3, (1, 1), (0, 0, 0, 0), (20, 11)),
    "asymmetric padding": (1, 16, 1, 8, 9, 3, 3, (1, 1), (0, 2, 1, 0), (1, 1)),
    "more padding than kernel": (1, 16, 1, 4, 5, 3, 3, (1, 1), (4, 12, 5, 3), (1, 1)),
    "stride past kernel": (1, 16, 1, 10, 11, 2, 2, (3, 4), (0, 0, 0, 0), (1, 1)),
    "no images": (0, 16, 1, 6, 6, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
}


def _random(size: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    if layout == "strided":  # a misaligned view with gaps in every dimension
        n, c, h, w = size
        return torch.randn(n, c + 1, h + 1, 2 * w + 1).to(dtype)[:, 1:, 1:, 1::2]
    t = torch.randn(size).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else t


def _problem(name: str, dtype: torch.dtype, layout: str):
    n, c, m, h, w, r, s, *geometry = CASES[name]
    x = _random((n, c, h, w), dtype, layout)
    weight = _random((c * m, 1, r, s), dtype, layout)
    size = reference.depthwise_conv2d(x, weight, *[None] * 5, *geometry, 0, 0.0).shape
    return x, weight, _random(tuple(size), dtype, layout), geometry


def _double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_are_as_accurate_as_torch(name, dtype, layout):
    x, weight, grad, geometry = _problem(name, dtype, layout)
    x64, weight64, grad64 = _double(x, weight, grad)
    with nnarch.trace() as trace:
        y = op.depthwise_op(x, weight, *[None] * 5, *geometry, 0, 0.0)
        dx = op.input_grad(grad, weight, x.shape, *geometry)
        dw = op.weight_grad(grad, x, weight.shape, *geometry)
        dx2, dw2, db = op.backward_op(grad, x, weight, *geometry, 7)
    assert torch.equal(dx2, dx) and torch.equal(dw2, dw)
    assert_as_accurate(db, grad.sum((0, 2, 3)), grad64.sum((0, 2, 3)), what="db")
    for wanted in range(7):
        some = op.backward_op(grad, x, weight, *geometry, wanted)
        for bit, (one, of_all) in enumerate(zip(some, (dx, dw, db), strict=True)):
            if wanted >> bit & 1:
                torch.testing.assert_close(one, of_all, rtol=1e-4, atol=1e-4)  # other orders
            else:
                assert one.numel() == 0
    assert {entry.backend for entry in trace} == {"cpu"}
    assert all(entry.algorithm.startswith("depthwise_") for entry in trace)
    none = [None] * 5
    for what, result, function, args, args64 in (
        ("y", y, reference.depthwise_conv2d, (x, weight, *none), (x64, weight64, *none)),
        ("dx", dx, reference.depthwise_conv2d_input_grad, (grad, weight, x.shape),
         (grad64, weight64, x.shape)),
        ("dw", dw, reference.depthwise_conv2d_weight_grad, (grad, x, weight.shape),
         (grad64, x64, weight.shape)),
    ):  # fmt: skip
        tail = (*geometry, 0, 0.0) if what == "y" else geometry
        assert_as_accurate(result, function(*args, *tail), function(*args64, *tail), what=what)
    assert y.is_contiguous(memory_format=nnarch.library.output_format(x))
    assert dx.is_contiguous(memory_format=nnarch.library.output_format(grad))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_types_accumulate_in_float32(dtype, layout):
    x, weight, grad, geometry = _problem("5x5", dtype, layout)
    x64, weight64, grad64 = _double(x, weight, grad)
    y = op.depthwise_op(x, weight, None, None, None, None, op.pack(weight), *geometry, 0, 0.0)
    dx = op.input_grad(grad, weight, x.shape, *geometry)
    dw = op.weight_grad(grad, x, weight.shape, *geometry)
    for result, truth in (
        (y, reference.depthwise_conv2d(x64, weight64, *[None] * 5, *geometry, 0, 0.0)),
        (dx, reference.depthwise_conv2d_input_grad(grad64, weight64, x.shape, *geometry)),
        (dw, reference.depthwise_conv2d_weight_grad(grad64, x64, weight.shape, *geometry)),
    ):
        assert_as_accurate(result, truth.to(dtype), truth)


# Every combination of the parts of the epilogue, on a full and a partial vector of channels.
EPILOGUES = list(itertools.product((False, True), repeat=4))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [16, 11])
@pytest.mark.parametrize("code", range(11), ids=lambda c: str(kinds.NAMES[c]))
def test_epilogue(code, channels, layout):
    x = _random((2, channels, 9, 7), torch.float64, layout)
    weight = torch.randn(channels, 1, 3, 3, dtype=torch.float64)
    vectors = torch.randn(3, channels, 2, dtype=torch.float64)[..., 0]  # stride 2
    residual = _random((2, channels, 9, 7), torch.float64, "strided")
    for bias, scale, shift, add in EPILOGUES:
        given = [v if on else None for v, on in zip(vectors, (bias, scale, shift), strict=True)]
        arguments = (x, weight, *given, residual if add else None, None)
        geometry = ((1, 1), (1, 1, 1, 1), (1, 1), code, 0.2)
        actual = op.depthwise_op(*arguments, *geometry)
        expected = reference.depthwise_conv2d(*arguments, *geometry)
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("code", [kinds.NONE, kinds.RELU, kinds.RELU6])
def test_nan_passes_the_epilogue(code):
    x = torch.zeros(1, 16, 3, 3)
    x[0, 5, 1, 1] = float("nan")
    weight = torch.ones(16, 1, 1, 1)
    y = op.depthwise_op(x, weight, *[None] * 5, (1, 1), (0,) * 4, (1, 1), code, 0.0)
    assert torch.equal(y.isnan(), x.isnan())


def test_packed_weights():
    for size, dtype in itertools.product(
        ((19, 1, 3, 3), (16, 1, 5, 2)), (torch.float32, torch.half)
    ):
        weight = _random(size, dtype, "strided")
        packed = op.pack(weight)
        assert torch.equal(packed, reference.depthwise_conv2d_pack(weight))
        assert torch.equal(packed, op.pack(weight.contiguous()))
        x = torch.randn(1, size[0], 8, 8).to(dtype)
        given = conv2d(x, weight, padding=1, groups=size[0], packed=pack_conv2d_weight(weight, 2))
        assert torch.equal(given, conv2d(x, weight, padding=1, groups=size[0]))


def test_functional_routes_here_and_agrees_with_torch():
    x, weight, bias = torch.randn(2, 24, 10, 10), torch.randn(48, 1, 3, 3), torch.randn(48)
    with nnarch.trace() as trace:
        y = conv2d(x, weight, bias, 2, 1, 1, 24, activation="relu6")
    assert trace.ops == ["depthwise_conv2d"]
    expected = F.conv2d(x, weight, bias, 2, 1, 1, 24).clamp(0, 6)
    torch.testing.assert_close(y, expected)
    same = conv2d(x, weight, padding="same", groups=24)
    torch.testing.assert_close(same, F.conv2d(x, weight, padding="same", groups=24))


GRADCHECKS = {
    "plain": ((1, 3, 5, 4), 1, (3, 3), 1, 1, 1, None),
    "multiplier, stride": ((2, 2, 5, 5), 2, (3, 2), 2, 1, 1, None),
    "dilated, relu": ((1, 3, 7, 6), 1, (3, 3), 1, 2, 2, "leaky_relu"),
    "silu": ((1, 2, 4, 4), 1, (3, 3), 1, 1, 1, "silu"),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    size, m, kernel, stride, padding, dilation, activation = GRADCHECKS[name]
    c = size[1]
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(c * m, 1, *kernel, dtype=torch.float64, requires_grad=True)
    bias, scale, shift = torch.randn(3, c * m, dtype=torch.float64)

    def run(x, weight, bias, shift):
        return conv2d(
            x, weight, bias, stride, padding, dilation, c,
            scale=scale, shift=shift, activation=activation,
        )  # fmt: skip

    inputs = (x, weight, bias.requires_grad_(), shift.requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_backward_of_a_sum_has_an_expanded_gradient():
    x = torch.randn(2, 20, 9, 9, requires_grad=True)
    weight = torch.randn(20, 1, 3, 3, requires_grad=True)
    ours = torch.autograd.grad(conv2d(x, weight, padding=1, groups=20).sum(), (x, weight))
    theirs = torch.autograd.grad(F.conv2d(x, weight, padding=1, groups=20).sum(), (x, weight))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(stride):
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    weight = torch.randn(16, 1, 3, 3, requires_grad=True)
    geometry = ([stride] * 2, [1, 1, 1, 1], [1, 1])
    y = op.depthwise_op(x, weight, *[None] * 5, *geometry, 0, 0.0)
    grad = torch.randn_like(y)
    ops = torch.ops.nnarch
    for overload, arguments in (
        (ops.depthwise_conv2d, (x, weight, torch.randn(16), *[None] * 4, *geometry, 1, 0.0)),
        (ops.depthwise_conv2d_input_grad, (grad, weight, [1, 8, 6, 6], *geometry)),
        (ops.depthwise_conv2d_weight_grad, (grad, x, [16, 1, 3, 3], *geometry)),
        (ops.depthwise_conv2d_backward, (grad, x, weight, *geometry, 7)),
        (ops.depthwise_conv2d_pack, (weight.detach(),)),
    ):
        torch.library.opcheck(overload.default, arguments)


def test_bitwise_equal_for_any_number_of_threads():
    x, weight = torch.randn(3, 64, 28, 28), torch.randn(64, 1, 3, 3)
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1))
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        y = op.depthwise_op(x, weight, *[None] * 5, *geometry, 0, 0.0)
        dx = op.input_grad(y, weight, x.shape, *geometry)
        results.append((y, dx, op.weight_grad(y, x, weight.shape, *geometry)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


_X, _W = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
_ARGS = {
    "x": _X, "weight": _W, "bias": None, "scale": None, "shift": None, "residual": None,
    "packed": None, "stride": (1, 1), "padding": (1,) * 4, "dilation": (1, 1), "activation": 0,
    "alpha": 0.0,
}  # fmt: skip
BAD = {
    "3-D x": ({"x": _X[0]}, ValueError, "x must be"),
    "integer x": ({"x": _X.long()}, TypeError, "x must be floating"),
    "dtypes": ({"weight": _W.double()}, TypeError, "weight"),
    "channels": ({"weight": torch.randn(6, 1, 3, 3)}, ValueError, "groups"),
    "dense weight": ({"weight": torch.randn(4, 2, 3, 3)}, ValueError, "weight"),
    "zero stride": ({"stride": (0, 1)}, ValueError, "stride"),
    "negative padding": ({"padding": (1, -1, 1, 1)}, ValueError, "padding"),
    "zero dilation": ({"dilation": (1, 0)}, ValueError, "dilation"),
    "kernel too large": ({"padding": (0, 0, 0, 0), "x": _X[:, :, :2]}, ValueError, "larger"),
    "bias": ({"bias": torch.randn(3)}, ValueError, "bias"),
    "scale dtype": ({"scale": torch.randn(4).double()}, TypeError, "scale"),
    "residual": ({"residual": torch.randn(1, 4, 5, 4)}, ValueError, "residual"),
    "packed": ({"packed": torch.randn(7)}, ValueError, "packed"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    arguments = _ARGS | change
    with pytest.raises(error, match=message):
        op.depthwise_op(*arguments.values())


def test_gradients_refuse_bad_input():
    geometry = ((1, 1), (1,) * 4, (1, 1))
    with pytest.raises(ValueError, match="grad must have the shape"):
        op.input_grad(torch.randn(1, 4, 5, 6), _W, _X.shape, *geometry)
    with pytest.raises(TypeError, match="grad must be"):
        op.weight_grad(torch.randn(1, 4, 5, 5).double(), _X, _W.shape, *geometry)
    with pytest.raises(ValueError, match="grad must have the shape"):
        op.backward_op(torch.randn(1, 4, 5, 6), _X, _W, *geometry, 7)
    with pytest.raises(TypeError, match="weight"):
        op.backward_op(_X, _X, _W.double(), *geometry, 7)
    with pytest.raises(ValueError, match="weight must be"):
        op.pack(torch.randn(4, 2, 3, 3))


def _quick_check() -> None:
    """What the subprocess of the next test runs."""
    for name in CASES:
        for layout, code in (("channels_last", 6), ("contiguous", 1)):
            x, weight, grad, geometry = _problem(name, torch.float32, layout)
            x64, weight64, grad64 = _double(x, weight, grad)
            y = op.depthwise_op(x, weight, *[None] * 5, *geometry, code, 0.0)
            z = reference.depthwise_conv2d(x64, weight64, *[None] * 5, *geometry, 0, 0.0)
            torch.testing.assert_close(
                y.double(), reference_activation(z, code, 0.0), rtol=1e-4, atol=1e-4
            )
            dx = op.input_grad(grad, weight, x.shape, *geometry)
            truth = reference.depthwise_conv2d_input_grad(grad64, weight64, x.shape, *geometry)
            torch.testing.assert_close(dx.double(), truth, rtol=1e-4, atol=1e-4)
            dw = op.weight_grad(grad, x, weight.shape, *geometry)
            truth = reference.depthwise_conv2d_weight_grad(grad64, x64, weight.shape, *geometry)
            torch.testing.assert_close(dw.double(), truth, rtol=1e-4, atol=1e-3)
            db = op.backward_op(grad, x, weight, *geometry, 7)[2].double()
            torch.testing.assert_close(db, grad64.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, _quick_check)


def _past_the_caches() -> None:
    """A batch whose output is written past the caches, against its images one by one."""
    for channels, size, kernel, stride in (
        (128, 56, 3, 1),  # rows of 7 · 4096 bytes: halves of lines are gathered
        (256, 28, 3, 1),  # pixels of 1024 bytes
        (128, 64, 3, 2),
        (256, 32, 5, 1),
        (144, 56, 3, 1),  # no two lines of a block 4096 bytes apart
    ):
        images = -(-(7 << 20) // (channels * (size // stride) ** 2 * 4))
        x = torch.randn(images, channels, size, size).to(memory_format=torch.channels_last)
        weight, shift = torch.randn(channels, 1, kernel, kernel), torch.randn(channels)
        geometry = ((stride, stride), (kernel // 2,) * 4, (1, 1))

        def run(x, weight=weight, shift=shift, geometry=geometry):
            return op.depthwise_op(x, weight, None, None, shift, None, None, *geometry, 1, 0.0)

        y = run(x)
        for i in range(images):
            assert torch.equal(y[i : i + 1], run(x[i : i + 1])), (channels, i)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_outputs_past_the_caches(isa):
    check_under_isa(isa, _past_the_caches)
