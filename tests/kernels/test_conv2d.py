"""conv2d against torch in float64: every algorithm, dtype, memory format, stride and epilogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_cases import CASES, CORE, EMPTY, Conv
from kernel_cases import (
    BACKENDS,
    DTYPES,
    FORMATS,
    VIEWS,
    compare,
    equal_to_torch,
    exact_product,
    name_of,
    needs_long_double,
    on_fresh_memory,
    small_integers,
    ulps_of_running_sum,
    ulps_of_sum,
)
from tolerances import assert_as_accurate
from torch import Tensor
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch import library
from nnarch.kernels.conv2d.geometry import padding_of

# Sums of products only: Winograd has tests and tolerances of its own (test_winograd.py).
pytestmark = pytest.mark.usefixtures("highest_precision")


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, dtype, memory_format):
    tensors = case.tensors(dtype, memory_format)
    grad = torch.randn_like(case.theirs(**tensors))
    y = compare(case.ours, case.theirs, tensors, grad, ulps=ulps_of_sum(case.depth, dtype))
    assert y.is_contiguous(memory_format=library.output_format(tensors["x"], tensors["weight"]))


# 1×1 past unpacked weights: of up to 8, 96, 512 pixels and more, and for x's gradient of up to 4,
# 96, 192, 512 and more, each another way. 49 pixels fill one lane of a vector, and sums of more
# than 1536 terms are made in parts.
PIXELS = [
    Conv(n, c, h, w, k, (1, 1), groups=groups)
    for n, h, w in ((1, 1, 2), (3, 1, 2), (1, 4, 5), (1, 7, 7), (2, 7, 8), (1, 12, 13), (4, 7, 11))
    for c, k, groups in ((40, 70, 1), (76, 130, 2), (40, 3, 1))
] + [
    Conv(4, 76, 11, 12, 130, (1, 1), groups=2),
    Conv(2, 1700, 10, 11, 36, (1, 1)),
    Conv(1, 36, 7, 7, 1700, (1, 1)),
    Conv(1, 512, 25, 24, 64, (1, 1)),
    Conv(1, 48, 1, 90, 33, (1, 1), stride=(1, 2)),
]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("case", PIXELS, ids=str)
def test_pixels_past_unpacked_weights(case, dtype):
    tensors = case.tensors(dtype, torch.channels_last)
    y = case.theirs(**tensors)
    epilogue = {"scale": torch.rand(case.k).to(dtype) + 0.5, "residual": torch.randn_like(y)}
    ulps = ulps_of_sum(case.depth, dtype)
    compare(case.ours, case.theirs, tensors, torch.randn_like(y), ulps=ulps)
    compare(case.ours, case.theirs, tensors | epilogue, ulps=ulps)


@needs_long_double
@pytest.mark.parametrize("case", [c for c in CORE if c.groups == 1], ids=str)
def test_float64_against_long_double(case):
    """In float64 torch is no truth: the sums are taken again with 64 bits."""
    t = case.tensors(torch.float64, torch.contiguous_format)
    t.pop("bias")
    mine, theirs = case.ours(**t), case.theirs(**t)
    top, left, bottom, right = padding_of(case.padding, t["weight"], (1, 1), (1, 1))
    padded = TF.pad(t["x"], (left, right, top, bottom))
    columns = TF.unfold(padded, case.kernel, case.dilation, 0, case.stride)
    truth = torch.stack([exact_product(t["weight"].flatten(1), image) for image in columns])
    assert_as_accurate(
        mine, theirs, truth.view_as(mine), ulps=ulps_of_running_sum(t["weight"][0].numel())
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=name_of)
@pytest.mark.parametrize("case", CORE, ids=str)
def test_half_precision(case, dtype, memory_format):
    tensors = case.tensors(dtype, memory_format)
    compare(case.ours, case.theirs, tensors, torch.randn_like(case.ours(**tensors)))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CORE, ids=str)
def test_reference_backend(case, dtype):
    tensors = case.tensors(dtype, torch.contiguous_format)

    def ours(**named: Any) -> Tensor:
        with nnarch.use_backend("reference"):
            return case.ours(**named)

    compare(ours, case.theirs, tensors, ulps=ulps_of_sum(case.depth, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_batch(case, backend):
    tensors = case.tensors(torch.float32, torch.contiguous_format)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    with nnarch.use_backend(backend):
        y = case.ours(**leaves)
        gradients = torch.autograd.grad(y.sum(), list(leaves.values()))
    assert y.shape == case.theirs(**leaves).shape
    assert [g.shape for g in gradients] == [t.shape for t in leaves.values()]
    assert all(bool((g == 0).all()) for g in gradients)


def test_no_input_channels():
    """A sum of nothing: the bias alone."""
    bias = torch.randn(5)
    y = on_fresh_memory(
        lambda: F.conv2d(torch.empty(2, 0, 6, 6), torch.empty(5, 0, 3, 3), bias, padding=1)
    )
    torch.testing.assert_close(y, bias.view(1, 5, 1, 1).expand(2, 5, 6, 6), rtol=0, atol=0)


def test_unbatched():
    case = Conv(1, 12, 8, 8, 10, padding=1)
    t = case.tensors(torch.float32, torch.contiguous_format)
    residual = torch.randn(10, 8, 8)
    y = F.conv2d(t["x"][0], t["weight"], t["bias"], padding=1, residual=residual)
    batch = F.conv2d(t["x"], t["weight"], t["bias"], padding=1, residual=residual[None])
    assert torch.equal(y, batch[0])


# ---------------------------------------------------------------------------------------- strides


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("case", CORE, ids=str)
def test_views(case, dtype, view):
    """Every operand with strides that are not the usual ones, gradient included."""
    t = case.tensors(dtype, torch.contiguous_format)
    like = case.theirs(**t)
    t |= {"scale": t["bias"], "shift": t["bias"], "residual": like}
    strange = {name: VIEWS[view](small_integers(value)) for name, value in t.items()}
    equal_to_torch(case.ours, case.theirs, strange, VIEWS[view](small_integers(like)))


@pytest.mark.parametrize("case", CORE, ids=str)
def test_sum_backward(case):
    """`.sum()` sends back a gradient of strides 0."""
    t = {n: v.requires_grad_() for n, v in case.tensors(torch.float64, FORMATS[0]).items()}
    case.ours(**t).sum().backward()
    mine = [v.grad for v in t.values()]
    theirs = torch.autograd.grad(case.theirs(**t).sum(), list(t.values()))
    torch.testing.assert_close(mine, list(theirs))


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_ambiguous_memory_format(memory_format):
    """One channel or one pixel: both formats at once. The output is then contiguous."""
    for shape in ((2, 1, 5, 5), (2, 12, 1, 1)):
        x = torch.randn(shape).to(memory_format=memory_format)
        y = F.conv2d(x, torch.randn(4, shape[1], 3, 3), padding=1)
        assert y.is_contiguous()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reads_no_uninitialised_memory(case):
    """The same bits on memory full of NaN and on memory that was used before."""
    t = case.tensors(torch.float32, torch.contiguous_format)
    packed = F.pack_conv2d_weight(t["weight"], case.groups)
    fresh_packed = on_fresh_memory(lambda: F.pack_conv2d_weight(t["weight"], case.groups))
    assert torch.equal(packed, fresh_packed)
    usual = case.ours(**t, packed=packed, activation="silu")
    fresh = on_fresh_memory(lambda: case.ours(**t, packed=packed, activation="silu"))
    assert torch.equal(usual, fresh)
    assert bool(torch.isfinite(fresh).all())


# ---------------------------------------------------------------------------------- packed weights


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", [*CORE, CASES[-1]], ids=str)
def test_packed_weight(case, dtype):
    t = case.tensors(dtype, torch.channels_last)
    packed = F.pack_conv2d_weight(t["weight"], case.groups)
    mine = compare(
        lambda **named: case.ours(**named, packed=packed),
        case.theirs,
        t,
        ulps=ulps_of_sum(case.depth, dtype),
    )
    if case.kernel != (1, 1):  # few pixels meet unpacked weights as linear's rows do
        assert torch.equal(mine, case.ours(**t))


def test_other_backends_ignore_packed_weights():
    case = CORE[2]
    t = case.tensors(torch.float32, torch.contiguous_format)
    packed = F.pack_conv2d_weight(t["weight"])
    with nnarch.use_backend("reference"):
        assert torch.equal(case.ours(**t, packed=packed), case.ours(**t))


# -------------------------------------------------------------------------------------- algorithms


@pytest.mark.parametrize(
    ("case", "algorithm"),
    [
        (Conv(2, 16, 2, 2, 8, (1, 1)), "gemv"),
        (Conv(1, 16, 6, 6, 8, (1, 1)), "turned"),
        (Conv(2, 16, 10, 10, 8, (1, 1)), "gemm"),
        (Conv(1, 16, 30, 30, 8, (1, 1)), "gemm_1x1"),
        (Conv(1, 16, 6, 6, 8, padding=1), "implicit_gemm"),
        (Conv(1, 16, 6, 6, 8, (1, 1), stride=2), "implicit_gemm"),
        (Conv(1, 3, 6, 6, 8, padding=1), "stem"),
        (Conv(1, 3, 6, 6, 8, padding=1, groups=1, dilation=2), "implicit_gemm"),
        (Conv(1, 16, 6, 6, 16, padding=1, groups=4), "narrow_groups"),
        (Conv(1, 9, 6, 6, 9, padding=1, groups=3), "implicit_gemm"),
    ],
    ids=str,
)
def test_algorithm(case, algorithm):
    with nnarch.trace() as trace:
        case.ours(**case.tensors(torch.float32, torch.contiguous_format))
    (entry,) = trace
    assert (entry.op, entry.backend, entry.algorithm) == ("conv2d", "cpu", algorithm)


@pytest.mark.parametrize(
    ("case", "algorithm"),
    [
        (Conv(1, 16, 2, 2, 8, (1, 1)), "rows"),
        (Conv(2, 16, 6, 6, 24, (1, 1), groups=2), "unpacked"),
        (Conv(2, 16, 12, 12, 8, (1, 1)), "gemm"),
        (Conv(1, 16, 30, 30, 8, (1, 1)), "implicit_gemm"),
        (Conv(1, 16, 6, 6, 8, (1, 1), stride=2), "implicit_gemm_phases"),
    ],
    ids=str,
)
def test_algorithm_of_the_inputs_gradient(case, algorithm):
    t = case.tensors(torch.float32, torch.channels_last)
    y = case.ours(**t | {"x": t["x"].requires_grad_()})
    with nnarch.trace() as trace:
        torch.autograd.grad(y, t["x"], torch.randn_like(y))
    assert [e.algorithm for e in trace if e.op == "conv2d_input_grad"] == [algorithm]


def test_huge_steps_need_no_memory():
    """A stride far past a kernel of few channels: nothing as wide as the stride may be copied."""
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(2, 3, 3, 3)
    for geometry in ((2**30, 2**30, 1), (1, 2**20, 2**20)):
        y = F.conv2d(x, weight, None, *geometry)
        torch.testing.assert_close(y, TF.conv2d(x, weight, None, *geometry))


@pytest.mark.parametrize("geometry", [(2**20, 2**20, 1), (1, 2**20, 2**20), (1, 2**12, 2**12)])
def test_huge_steps_of_narrow_groups_need_no_memory(geometry):
    x, weight = torch.randn(1, 8, 8, 8, requires_grad=True), torch.randn(8, 4, 3, 3)
    weight.requires_grad_()
    y, truth = F.conv2d(x, weight, None, *geometry, 2), TF.conv2d(x, weight, None, *geometry, 2)
    torch.testing.assert_close(y, truth)
    packed = F.pack_conv2d_weight(weight.detach(), 2)
    torch.testing.assert_close(F.conv2d(x, weight, None, *geometry, 2, packed=packed), truth)
    mine = torch.autograd.grad(y.sum(), [x, weight])
    torch.testing.assert_close(mine, torch.autograd.grad(truth.sum(), [x, weight]))


# -------------------------------------------------------------------------------------- derivatives

GRADCHECK_CASES = [
    Conv(1, 3, 5, 4, 2, (1, 1)),
    Conv(2, 2, 5, 5, 3, stride=2, padding=(1, 0, 2, 1)),
    Conv(1, 9, 4, 5, 2, (2, 3), padding=1, dilation=(1, 2)),
    Conv(1, 4, 4, 4, 6, padding=1, groups=2),
    Conv(1, 3, 5, 5, 6, padding=1, groups=3),
    Conv(1, 8, 6, 5, 8, padding=1, groups=4),
    Conv(2, 4, 5, 5, 4, stride=2, padding=1, groups=2),
]


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
def test_gradcheck(case):
    t = case.tensors(torch.float64, torch.contiguous_format)
    names, leaves = list(t), [v.requires_grad_() for v in t.values()]

    def function(*tensors: Tensor) -> Tensor:
        return case.ours(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize(
    "case", [Conv(2, 24, 9, 8, 20, padding=1), Conv(1, 3, 9, 9, 20, (5, 3))], ids=str
)
def test_weight_gradient_has_the_weights_format(case, precision):
    """Autograd would copy any other; the bits are those of the contiguous one."""
    nnarch.set_precision(precision)
    t = case.tensors(torch.float32, torch.channels_last)
    grads = {}
    for memory_format in FORMATS:
        weight = t["weight"].clone(memory_format=memory_format).requires_grad_()
        case.ours(x=t["x"], weight=weight).square().sum().backward()
        assert weight.grad is not None and weight.grad.is_contiguous(memory_format=memory_format)
        grads[memory_format] = weight.grad
    assert torch.equal(*grads.values())


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_gradient_of_one_input(wanted):
    case = Conv(1, 9, 5, 5, 4, padding=1)
    t = case.tensors(torch.float64, torch.contiguous_format)
    t[wanted].requires_grad_()
    (mine,) = torch.autograd.grad(case.ours(**t).square().sum(), t[wanted])
    (theirs,) = torch.autograd.grad(case.theirs(**t).square().sum(), t[wanted])
    torch.testing.assert_close(mine, theirs)


def test_input_and_weight_one_tensor():
    """The two gradients of one tensor add up."""
    t = torch.randn(4, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    (mine,) = torch.autograd.grad(F.conv2d(t, t, padding=1).sum(), t)
    (theirs,) = torch.autograd.grad(TF.conv2d(t, t, padding=1).sum(), t)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_an_output_that_sees_padding_alone(channels, format):
    """The only column of the output ends left of the image."""
    x = torch.ones(2, channels, 5, 1).to(memory_format=format).requires_grad_()
    weight = torch.ones(8, channels, 5, 5).requires_grad_()
    y = F.conv2d(x, weight, stride=5, padding=(0, 8, 0, 0))
    y.sum().backward()
    assert y.count_nonzero() == x.grad.count_nonzero() == weight.grad.count_nonzero() == 0
