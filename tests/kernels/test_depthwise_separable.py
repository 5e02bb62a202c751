"""Depthwise-separable convolution: fused kernels against float64, gradients, layouts, errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import check_under_isa, machine_with
from tolerances import assert_as_accurate
from torch import Tensor

import nnarch
from nnarch.functional import conv2d, depthwise_separable_conv2d, pack_conv2d_weight
from nnarch.kernels.activation import kinds
from nnarch.kernels.depthwise_separable import op, reference

_ONE = ([1, 1], [1, 1, 1, 1], [1, 1])


def _channels_last(*size: int) -> Tensor:
    return torch.randn(size).contiguous(memory_format=torch.channels_last)


def _samples() -> list[tuple]:
    geometry = ([2, 1], [1, 0, 2, 1], [1, 2])
    x, dw, pw = _channels_last(2, 12, 9, 11), torch.randn(24, 1, 3, 4), torch.randn(7, 24, 1, 1)
    vectors = (None, torch.randn(24), None, torch.randn(7))
    tail = (None, None, *geometry, kinds.RELU6, 0.0, kinds.LEAKY_RELU, 0.1)
    y = reference.depthwise_separable_conv2d(x, dw, pw, *vectors, None, *tail)
    image = _channels_last(1, 40, 30, 30)
    return [
        (x, dw, pw, *vectors, torch.randn_like(y), *tail),
        (x, dw[:12], pw[:, :12], *[None] * 7, *_ONE, 0, 0.0, 0, 0.0),
        (image, torch.randn(40, 1, 3, 3), torch.randn(9, 40, 1, 1), *[None] * 7,
         *_ONE, kinds.RELU, 0.0, 0, 0.0),
    ]  # fmt: skip


def _inverted_samples() -> list[tuple]:
    samples = []
    for n, c, wide, size in ((1, 6, 20, 9), (1, 8, 96, 48)):  # stage by stage, and fused
        samples.append((
            _channels_last(n, c, size, size), torch.randn(wide, c, 1, 1),
            torch.randn(wide, 1, 3, 3), torch.randn(c, wide, 1, 1), torch.randn(wide),
            torch.randn(wide), None, _channels_last(n, c, size, size), None, None, None,
            *_ONE, kinds.RELU6, 0.0, kinds.RELU6, 0.0, 0, 0.0,
        ))  # fmt: skip
    return samples


SAMPLES = {"depthwise_separable_conv2d": _samples, "inverted_residual": _inverted_samples}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tiny tensors: a second thread would only be waited for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _one_megabyte() -> Iterator[None]:
    """What is fused depends on the second-level cache."""
    with machine_with(l2_kib=1024):
        yield


FUSED, STAGES = "fused_depthwise_project", "stages"
LAYOUTS = ("contiguous", "channels_last", "strided")
#        N  C   m  H   W   K  R  S  stride  padding      dilation
CASES = {
    "3x3": (1, 32, 1, 48, 50, 24, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "3x3 stride 2": (2, 33, 1, 57, 63, 40, 3, 3, (2, 2), (1, 1, 1, 1), (1, 1)),
    "several images in a group": (9, 48, 1, 7, 7, 19, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "groups that end early": (3, 16, 1, 31, 29, 37, 5, 5, (1, 1), (2, 2, 2, 2), (1, 1)),
    "few pixels": (2, 33, 1, 2, 3, 5, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "one of everything": (1, 1, 1, 1, 1, 1, 1, 1, (1, 1), (0, 0, 0, 0), (1, 1)),
    "odd channels": (4, 13, 1, 17, 19, 31, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "aliasing channels": (4, 512, 1, 9, 14, 33, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "through tiles": (4, 1024, 1, 5, 7, 16, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "multiplier": (4, 7, 3, 16, 18, 20, 5, 3, (2, 1), (2, 1, 2, 1), (1, 1)),
    "dilated": (4, 16, 1, 21, 23, 8, 3, 3, (1, 1), (2, 3, 2, 3), (2, 3)),
    "stride 3": (4, 16, 1, 23, 27, 24, 3, 3, (3, 3), (1, 1, 1, 1), (1, 1)),
    "asymmetric padding": (4, 16, 1, 18, 19, 9, 3, 3, (1, 1), (0, 2, 1, 0), (1, 1)),
    "more padding than kernel": (4, 16, 1, 9, 11, 9, 3, 3, (1, 1), (4, 12, 5, 3), (1, 1)),
    "a row that outgrows the cache": (1, 640, 1, 3, 700, 3, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
    "no images": (0, 16, 1, 6, 6, 4, 3, 3, (1, 1), (1, 1, 1, 1), (1, 1)),
}
IS_FUSED = {"3x3", "3x3 stride 2", "groups that end early", "through tiles", "multiplier"}


def _random(size: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    if layout == "strided":  # a misaligned view with gaps in every dimension
        n, c, h, w = size
        return torch.randn(n, c + 1, h + 1, 2 * w + 1).to(dtype)[:, 1:, 1:, 1::2]
    t = torch.randn(size).to(dtype)
    return t.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else t


def _arguments(name: str, dtype: torch.dtype, layout: str, inner: int = 0, outer: int = 0):
    """Of the operation, with all of the epilogue."""
    n, c, m, h, w, k, r, s, *geometry = CASES[name]
    x = _random((n, c, h, w), dtype, layout)
    dw, pw = _random((c * m, 1, r, s), dtype, layout), _random((k, c * m, 1, 1), dtype, layout)
    vectors = [torch.randn(size, 2).to(dtype)[:, 0] for size in (c * m, c * m, k, k)]
    tail = (None, None, *geometry, inner, 0.1, outer, 0.1)
    y = reference.depthwise_separable_conv2d(x, dw, pw, *[None] * 5, *tail)
    return (x, dw, pw, *vectors, _random(tuple(y.shape), dtype, layout), *tail)


def _double(arguments):
    return [a.double() if isinstance(a, Tensor) else a for a in arguments]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_torch(name, dtype, layout):
    arguments = _arguments(name, dtype, layout, kinds.RELU, kinds.NONE)
    with nnarch.trace() as trace:
        y = op.separable_op(*arguments)
    (entry,) = trace
    assert entry.backend == "cpu"
    if name in IS_FUSED:
        assert entry.algorithm == FUSED
    if name == "a row that outgrows the cache":
        assert entry.algorithm == STAGES
    theirs = reference.depthwise_separable_conv2d(*arguments)
    # A sum of 1024 products is one chain here, and several in torch.
    ulps = 16 if name == "through tiles" and dtype == torch.float32 else None
    truth = reference.depthwise_separable_conv2d(*_double(arguments))
    assert_as_accurate(y, theirs, truth, ulps=ulps)
    x = arguments[0]
    assert y.is_contiguous(memory_format=nnarch.library.output_format(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("code", range(11), ids=lambda c: str(kinds.NAMES[c]))
@pytest.mark.parametrize("name", ["groups that end early", "few pixels"])
def test_every_activation_at_both_places(name, code, layout):
    arguments = _arguments(name, torch.float64, layout, code, code)
    expected = reference.depthwise_separable_conv2d(*arguments)
    torch.testing.assert_close(op.separable_op(*arguments), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_accumulate_in_float32(dtype):
    arguments = _arguments("3x3", dtype, "channels_last")
    truth = reference.depthwise_separable_conv2d(*_double(arguments))
    assert_as_accurate(op.separable_op(*arguments), truth.to(dtype), truth)


def test_nan_and_infinity_stay_where_they_belong():
    x, dw, pw = torch.zeros(1, 8, 40, 40), torch.ones(8, 1, 1, 1), torch.eye(8)[..., None, None]
    x[0, 5, 1, 1], x[0, 3, 38, 2] = float("nan"), float("inf")
    y = depthwise_separable_conv2d(x, dw, pw, depthwise_activation="relu", activation="relu6")
    assert torch.equal(y.isnan(), F.conv2d(x, pw).isnan())


@pytest.mark.parametrize("stride", [1, 2])
def test_packed_weights_and_the_public_function(stride):
    x, dw, pw = torch.randn(2, 24, 40, 40), torch.randn(48, 1, 3, 3), torch.randn(10, 48, 1, 1)
    bias, shift = torch.randn(48), torch.randn(10)
    depthwise_packed, pointwise_packed = pack_conv2d_weight(dw, 24), pack_conv2d_weight(pw)
    with nnarch.trace() as trace:
        y = depthwise_separable_conv2d(
            x, dw, pw, stride=stride, padding=1, depthwise_shift=bias,
            depthwise_activation="relu6", shift=shift, activation="hardswish",
            depthwise_packed=depthwise_packed, pointwise_packed=pointwise_packed,
        )  # fmt: skip
    assert trace.ops == ["depthwise_separable_conv2d"]
    z = F.conv2d(x, dw, bias, stride, 1, 1, 24).clamp(0, 6)
    expected = F.hardswish(F.conv2d(z, pw, shift))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    one = depthwise_separable_conv2d(x[0], dw, pw, padding="same")
    torch.testing.assert_close(one, depthwise_separable_conv2d(x[:1], dw, pw, padding=1)[0])


GRADCHECKS = {
    "plain": (1, (3, 3), 1, 1, 1, None, None),
    "multiplier, stride": (2, (3, 2), 2, 1, 1, None, "leaky_relu"),
    "dilated, activations": (1, (3, 3), 1, 2, 2, "leaky_relu", "tanh"),
    "split": (1, (3, 3), 1, 1, 1, "silu", "gelu"),
}


@pytest.mark.parametrize("by_operation", [False, True], ids=["function", "operation"])
@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name, by_operation):
    """The function keeps what lies between the two; the operation computes it again."""
    m, kernel, stride, padding, dilation, inner, outer = GRADCHECKS[name]
    x = torch.randn(1, 3, 6, 5, dtype=torch.float64, requires_grad=True)
    dw = torch.randn(3 * m, 1, *kernel, dtype=torch.float64, requires_grad=True)
    pw = torch.randn(2, 3 * m, 1, 1, dtype=torch.float64, requires_grad=True)
    inner_shift = torch.randn(3 * m, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(2, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(3 * m, dtype=torch.float64) + 0.5
    geometry = {"stride": stride, "padding": padding, "dilation": dilation}
    size = depthwise_separable_conv2d(x, dw, pw, **geometry).shape
    residual = torch.randn(size, dtype=torch.float64, requires_grad=True)

    codes = (*kinds.encode(inner), *kinds.encode(outer))
    if by_operation and name == "split":
        return

    def run(x, dw, pw, inner_shift, shift, residual):
        if by_operation:
            numbers = [stride] * 2, [padding] * 4, [dilation] * 2
            return op.separable_op(
                x, dw, pw, scale, inner_shift, None, shift, residual, None, None, *numbers, *codes
            )
        return depthwise_separable_conv2d(
            x, dw, pw, **geometry, depthwise_scale=scale, depthwise_shift=inner_shift,
            depthwise_activation=inner, shift=shift, residual=residual, activation=outer,
        )  # fmt: skip

    inputs = (x, dw, pw, inner_shift, shift, residual)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_gradients_of_scales():
    x, dw, pw = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 3, 3), torch.randn(3, 4, 1, 1)
    for name, n in (("depthwise_scale", 4), ("scale", 3)):
        scale = torch.rand(n, requires_grad=True)
        y = depthwise_separable_conv2d(x, dw, pw, **{name: scale})
        (grad,) = torch.autograd.grad(y.sum(), scale)
        plain = F.conv2d(F.conv2d(x, dw, groups=4), pw)
        assert grad.shape == (n,)
        if name == "scale":
            torch.testing.assert_close(grad, plain.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", ["x", "dw", "pw"])
def test_only_one_gradient_is_wanted(wanted):
    """And it arrives expanded, from a sum."""
    tensors = {
        "x": torch.randn(2, 20, 9, 9), "dw": torch.randn(20, 1, 3, 3),
        "pw": torch.randn(5, 20, 1, 1),
    }  # fmt: skip
    leaf = tensors[wanted].requires_grad_()
    x, dw, pw = tensors.values()
    y = depthwise_separable_conv2d(x, dw, pw, padding=1, depthwise_activation="relu")
    (ours,) = torch.autograd.grad(y.sum(), leaf)
    y = F.conv2d(F.conv2d(x, dw, padding=1, groups=20).relu(), pw)
    (theirs,) = torch.autograd.grad(y.sum(), leaf)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_bitwise_equal_for_any_number_of_threads():
    arguments = [_samples()[2], *_inverted_samples()[1:]]
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        y = op.separable_op(*arguments[0])
        results.append((y, op.inverted_residual_op(*arguments[1])))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


#           N  C   C·t  H   W   K   kernel, stride, padding
INVERTED = {
    "stride 2": (1, 16, 96, 60, 59, 24, 3, 2, 1),
    "residual": (1, 24, 144, 56, 56, 24, 3, 1, 1),
    "5x5": (3, 8, 97, 57, 53, 24, 5, 1, 2),
    "5x5 stride 2": (1, 24, 144, 56, 40, 32, 5, 2, 2),
    "no padding": (2, 16, 100, 46, 44, 20, 3, 1, 0),
    "small": (2, 6, 36, 7, 7, 6, 3, 1, 1),
    "many small images": (9, 16, 96, 14, 14, 16, 3, 1, 1),
    "more stride than kernel": (1, 16, 96, 90, 90, 16, 3, 5, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", INVERTED)
def test_inverted_residual(name, dtype, layout):
    n, c, wide, h, w, k, size, stride, padding = INVERTED[name]
    arguments = [
        _random((n, c, h, w), dtype, layout), torch.randn(wide, c, 1, 1, dtype=dtype),
        torch.randn(wide, 1, size, size, dtype=dtype), torch.randn(k, wide, 1, 1, dtype=dtype),
        torch.randn(wide, dtype=dtype), None, torch.randn(k, dtype=dtype), None, None, None, None,
        (stride,) * 2, (padding,) * 4, (1, 1), kinds.RELU6, 0.0, kinds.SILU, 0.0, 0, 0.0,
    ]  # fmt: skip
    theirs = reference.inverted_residual(*arguments)
    arguments[7] = _random(tuple(theirs.shape), dtype, layout)
    theirs = reference.inverted_residual(*arguments)
    with nnarch.trace() as trace:
        y = op.inverted_residual_op(*arguments)
    (entry,) = trace
    expanded = entry.algorithm == "fused_expand_depthwise_project"
    assert expanded == ("small" not in name)
    assert_as_accurate(y, theirs, reference.inverted_residual(*_double(arguments)))


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    for arguments in SAMPLES[name]():
        overload = getattr(torch.ops.nnarch, name).default
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


_X, _DW, _PW = torch.randn(1, 4, 5, 5), torch.randn(8, 1, 3, 3), torch.randn(3, 8, 1, 1)
BAD = {
    "2-D x": ({"x": _X[0, 0]}, ValueError, "x must be"),
    "integer x": ({"x": _X.long()}, TypeError, "x must be floating"),
    "no tensor": ({"x": [1.0]}, TypeError, "x must be a tensor"),
    "dtypes": ({"depthwise_weight": _DW.double()}, TypeError, "weight must be"),
    "pointwise dtype": ({"pointwise_weight": _PW.double()}, TypeError, "pointwise_weight"),
    "channels": ({"depthwise_weight": torch.randn(6, 1, 3, 3)}, ValueError, "groups"),
    "dense weight": ({"depthwise_weight": torch.randn(8, 2, 3, 3)}, ValueError, "depthwise_weight"),
    "pointwise channels": ({"pointwise_weight": _PW[:, :7]}, ValueError, r"\[K, 8, 1, 1\]"),
    "pointwise kernel": (
        {"pointwise_weight": torch.randn(3, 8, 1, 3)}, ValueError, "pointwise_weight"
    ),
    "no outputs": ({"pointwise_weight": _PW[:0]}, ValueError, "K > 0"),
    "zero stride": ({"stride": 0}, ValueError, "stride"),
    "negative padding": ({"padding": (1, -1)}, ValueError, "padding"),
    "padding": ({"padding": "full"}, ValueError, "padding"),
    "kernel too large": ({"dilation": 3}, ValueError, "larger"),
    "depthwise shift": ({"depthwise_shift": torch.randn(4)}, ValueError, "depthwise_shift"),
    "shift": ({"shift": torch.randn(4)}, ValueError, "shift must have shape"),
    "scale dtype": ({"scale": torch.randn(3).double()}, TypeError, "scale"),
    "residual": ({"residual": torch.randn(1, 3, 5, 4)}, ValueError, "residual"),
    "activation": ({"activation": "mish"}, ValueError, "activation"),
    "depthwise packed": ({"depthwise_packed": torch.randn(7)}, ValueError, "packed"),
    "pointwise packed": ({"pointwise_packed": torch.randn(7)}, ValueError, "packed"),
}  # fmt: skip


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "gradient"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, grad):
    change, error, message = BAD[name]
    dw = _DW.clone().requires_grad_(grad)
    arguments = {"x": _X, "depthwise_weight": dw, "pointwise_weight": _PW} | change
    with pytest.raises(error, match=rf"conv2d: .*{message}"):
        depthwise_separable_conv2d(**arguments)


def test_inverted_residual_refuses_bad_input():
    good = list(_inverted_samples()[0])
    for place, value, error, message in (
        (0, torch.randn(6, 9), ValueError, "x must be"),
        (1, torch.randn(20, 5, 1, 1), ValueError, "expand_weight"),
        (2, torch.randn(21, 1, 3, 3), ValueError, "groups"),
        (3, torch.randn(6, 19, 1, 1), ValueError, "pointwise_weight"),
        (4, torch.randn(19), ValueError, "expand_bias"),
        (7, torch.randn(1, 6, 9, 8), ValueError, "residual"),
        (8, torch.randn(3), ValueError, "packed"),
    ):
        arguments = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(error, match=f"inverted_residual: .*{message}"):
            op.inverted_residual_op(*arguments)
    x = good[0].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="not differentiable"):
        op.inverted_residual_op(x, *good[1:]).sum().backward()


def test_agrees_with_two_convolutions():
    x, dw, pw = torch.randn(1, 32, 40, 40), torch.randn(32, 1, 3, 3), torch.randn(24, 32, 1, 1)
    apart = conv2d(conv2d(x, dw, padding=1, groups=32), pw)
    torch.testing.assert_close(depthwise_separable_conv2d(x, dw, pw, padding=1), apart)


def _quick_check() -> None:
    """What the subprocess of the next test runs."""
    with machine_with(l2_kib=1024):
        _check_quickly()


def _check_quickly() -> None:
    for name in CASES:
        for layout in ("channels_last", "contiguous"):
            arguments = _arguments(name, torch.float32, layout, kinds.SILU, kinds.RELU6)
            y, truth = op.separable_op(*arguments), _double(arguments)
            truth = reference.depthwise_separable_conv2d(*truth)
            torch.testing.assert_close(y.double(), truth, rtol=1e-4, atol=2e-3)
    for name in INVERTED:
        for layout in LAYOUTS:
            test_inverted_residual(name, torch.float32, layout)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, _quick_check)
