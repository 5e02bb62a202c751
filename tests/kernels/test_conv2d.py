"""conv2d against torch in float64: every algorithm, dtype, memory format, stride and epilogue."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_cases import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    FORMATS,
    VIEWS,
    compare,
    equal_to_torch,
    exact_product,
    name_of,
    needs_long_double,
    needs_poison,
    on_fresh_memory,
    small_integers,
    torch_epilogue,
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


@pytest.fixture(autouse=True)
def direct():
    """Sums of products only: Winograd has tests and tolerances of its own (test_winograd.py)."""
    nnarch.set_precision("highest")
    yield
    nnarch.set_precision("high")


@dataclass(frozen=True)
class Conv:
    """Sizes of one convolution; `padding` as conv2d takes it."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    def __str__(self) -> str:
        r, s = self.kernel
        text = f"{self.n}x{self.c}x{self.h}x{self.w}-k{self.k}-{r}x{s}"
        for short, value, usual in (
            ("s", self.stride, 1),
            ("p", self.padding, 0),
            ("d", self.dilation, 1),
            ("g", self.groups, 1),
        ):
            if value != usual:
                text += f"-{short}{value}".replace(" ", "")
        return text

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def tensors(self, dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, Tensor]:
        """x, weight and bias, with outputs near 1."""
        x = torch.randn(self.n, self.c, self.h, self.w)
        weight = torch.randn(self.k, self.c // self.groups, *self.kernel)
        weight /= weight[0].numel() ** 0.5
        tensors = {"x": x.contiguous(memory_format=memory_format), "weight": weight}
        return {name: t.to(dtype) for name, t in tensors.items()} | {
            "bias": torch.randn(self.k).to(dtype)
        }

    @property
    def depth(self) -> int:
        """Products in an output's sum, or in an input gradient's, whichever has more."""
        return max(self.c, self.k) // self.groups * self.kernel[0] * self.kernel[1]

    def ours(self, **tensors: Any) -> Tensor:
        x, weight = tensors.pop("x"), tensors.pop("weight")
        return F.conv2d(x, weight, tensors.pop("bias", None), *self.geometry, **tensors)

    def theirs(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **epilogue: Any):
        padding = self.padding
        if isinstance(padding, tuple) and len(padding) == 4:
            top, left, bottom, right = padding
            x, padding = TF.pad(x, (left, right, top, bottom)), 0
        y = TF.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        names = ("scale", "shift", "residual", "activation")
        return torch_epilogue(y, *(epilogue.get(name) for name in names), dim=1)


# Tiles: 6 or 14 rows, 8 to 32 columns, blocks of 48 to 96 positions and of 256 columns, weight
# gradients in 256 positions and 192 output channels, sums cut at a depth of 512 to 2048.
CASES = [
    # 1x1 as a matrix product
    Conv(1, 1, 1, 1, 1, (1, 1)),
    Conv(2, 16, 7, 7, 32, (1, 1)),
    Conv(1, 13, 5, 3, 17, (1, 1)),
    Conv(3, 31, 9, 11, 61, (1, 1)),
    Conv(1, 64, 14, 14, 300, (1, 1)),
    Conv(1, 1030, 3, 3, 9, (1, 1)),
    Conv(1, 2100, 2, 3, 33, (1, 1)),
    Conv(2, 24, 9, 8, 40, (1, 1), stride=2),
    Conv(2, 24, 9, 8, 40, (1, 1), padding=1),
    Conv(2, 12, 6, 6, 20, (1, 1), groups=4),
    # implicit GEMM
    Conv(1, 9, 4, 4, 1),
    Conv(2, 16, 8, 8, 16, padding=1),
    Conv(1, 17, 13, 11, 19, padding=1),
    Conv(2, 23, 10, 9, 29, stride=2, padding=1),
    Conv(1, 10, 12, 14, 13, stride=3, padding=2),
    Conv(1, 11, 14, 9, 12, stride=(3, 2), padding=(0, 2)),
    Conv(1, 12, 11, 11, 14, padding=2, dilation=2),
    Conv(1, 9, 15, 13, 10, stride=2, padding=3, dilation=(2, 3)),
    Conv(1, 130, 5, 5, 70, padding=1),
    Conv(1, 600, 4, 4, 20, padding=1),
    Conv(1, 9, 5, 5, 210, padding=1),
    Conv(1, 10, 30, 31, 12, padding=1),
    Conv(2, 18, 7, 7, 12, padding=1, groups=3),
    Conv(1, 32, 9, 9, 64, stride=2, padding=1, groups=2),
    Conv(1, 12, 8, 9, 16, padding="same"),
    Conv(1, 12, 8, 9, 16, (4, 2), padding="same", dilation=(1, 2)),
    Conv(1, 12, 8, 9, 16, padding="valid"),
    Conv(1, 11, 6, 8, 15, padding=(0, 1, 2, 3)),
    Conv(1, 11, 6, 8, 15, stride=2, padding=(3, 0, 1, 2)),
    Conv(1, 10, 3, 3, 8, padding=5),
    Conv(1, 9, 12, 12, 8, (2, 2), stride=2),
    Conv(1, 9, 12, 12, 8, (2, 2), stride=3),
    Conv(1, 10, 9, 9, 7, (1, 5), padding=(0, 2)),
    Conv(1, 10, 9, 9, 7, (5, 1), padding=(2, 0)),
    Conv(1, 9, 13, 13, 8, (7, 7), padding=3),
    Conv(1, 9, 16, 17, 8, (11, 9), stride=2, padding=5),
    Conv(1, 9, 3, 40, 8, (3, 3), padding=1),
    Conv(5, 9, 1, 1, 8, (3, 3), padding=1),
    # few input channels
    Conv(1, 3, 20, 22, 16, padding=1),
    Conv(2, 3, 33, 31, 17, (7, 7), stride=2, padding=3),
    Conv(1, 3, 35, 39, 24, (11, 11), stride=4, padding=2),
    Conv(1, 1, 28, 28, 6, (5, 5), padding=2),
    Conv(2, 1, 9, 9, 20, (2, 4)),
    Conv(1, 8, 10, 10, 9, padding=1),
    Conv(3, 4, 6, 7, 10, stride=2, padding=(1, 0, 0, 1)),
    Conv(1, 3, 16, 16, 12, (4, 4), stride=4),
    Conv(1, 3, 12, 12, 12, (2, 2), stride=4),
    Conv(1, 3, 12, 12, 12, padding=2, dilation=2),
    Conv(1, 3, 12, 12, 12, padding=2, dilation=(2, 1)),
    Conv(1, 2, 3, 3, 5, padding=4),
    Conv(1, 3, 60, 130, 8, padding=1),
    # depthwise, by way of conv2d
    Conv(2, 19, 9, 10, 19, padding=1, groups=19),
    Conv(1, 8, 12, 11, 16, (5, 5), stride=2, padding=2, groups=8),
]
EMPTY = [
    Conv(0, 16, 8, 8, 12, padding=1),
    Conv(0, 3, 8, 8, 12, padding=1),
    Conv(0, 16, 8, 8, 12, (1, 1)),
    Conv(0, 8, 8, 8, 8, padding=1, groups=8),
]
# A few of each algorithm for what is the same in all shapes.
CORE = [CASES[i] for i in (2, 5, 12, 15, 19, 22, 28, 39, 44)]


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, dtype, memory_format):
    tensors = case.tensors(dtype, memory_format)
    grad = torch.randn_like(case.theirs(**tensors))
    y = compare(case.ours, case.theirs, tensors, grad, ulps=ulps_of_sum(case.depth, dtype))
    assert y.is_contiguous(memory_format=library.output_format(tensors["x"]))


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


# --------------------------------------------------------------------------------------- epilogue

EPILOGUE_CASES = [
    Conv(2, 10, 5, 7, 19, padding=1),
    Conv(1, 21, 6, 5, 35, (1, 1)),
    Conv(1, 3, 9, 9, 10, padding=1, stride=2),
    Conv(1, 12, 5, 5, 18, padding=1, groups=2),
    Conv(1, 18, 7, 6, 18, padding=1, groups=18),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("case", EPILOGUE_CASES, ids=str)
def test_epilogue(case, activation):
    """Every subset of bias, scale, shift and residual, with and without gradients."""
    t = case.tensors(torch.float32, torch.channels_last)
    like = case.theirs(**t)
    parts = {
        "bias": t.pop("bias"),
        "scale": torch.rand(case.k) + 0.5,
        "shift": torch.randn(case.k),
        "residual": torch.randn_like(like),
    }
    grad = torch.randn_like(like)

    def ours(**tensors: Any) -> Tensor:
        return case.ours(**tensors, activation=activation)

    def theirs(**tensors: Any) -> Tensor:
        return case.theirs(**tensors, activation=activation)

    for size in range(len(parts) + 1):
        for names in itertools.combinations(parts, size):
            chosen = t | {name: parts[name] for name in names}
            compare(ours, theirs, chosen)
            compare(ours, theirs, chosen, grad, ulps=16)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_fused_equals_split(activation):
    """The gradient-free call fuses what a call with gradients may compute apart."""
    case = EPILOGUE_CASES[0]
    t = case.tensors(torch.float64, torch.contiguous_format)
    t |= {"scale": torch.randn(case.k).double(), "residual": torch.randn(2, 19, 5, 7).double()}
    fused = case.ours(**t, activation=activation)
    apart = case.ours(**{n: v.requires_grad_() for n, v in t.items()}, activation=activation)
    torch.testing.assert_close(fused, apart.detach(), rtol=1e-12, atol=1e-12)


PAST_THE_CACHES = [  # outputs of 9 MB, 1 MB an image
    Conv(9, 16, 64, 64, 64, (1, 1)),
    Conv(9, 3, 128, 128, 64, stride=2, padding=1),
    Conv(9, 8, 64, 64, 64, padding=1, groups=2),
    Conv(9, 12, 66, 66, 60, (1, 1)),  # rows that begin inside cache lines
]


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("case", PAST_THE_CACHES, ids=str)
def test_large_outputs(case, activation):
    """What is written past the caches is what smaller outputs get, bit for bit, and right."""
    t = case.tensors(torch.float32, torch.channels_last)
    residual = torch.randn_like(case.theirs(**t))

    def run(first: int, last: int) -> Tensor:
        images = {"x": t["x"][first:last], "residual": residual[first:last]}
        return case.ours(**(t | images), activation=activation)

    whole = run(0, case.n)
    for i in range(case.n):
        assert torch.equal(whole[i : i + 1], run(i, i + 1))
    wide = {name: v[:1].double() if name == "x" else v.double() for name, v in t.items()}
    truth = case.theirs(**wide, residual=residual[:1].double(), activation=activation)
    torch.testing.assert_close(whole[:1].double(), truth, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ special values


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("case", EPILOGUE_CASES, ids=str)
def test_nan_and_infinity_propagate(case, value, activation):
    t = case.tensors(torch.float32, torch.contiguous_format)
    residual = torch.randn_like(case.theirs(**t))
    t["x"][0, 1, 2, 2] = value
    t["bias"][3] = value
    residual[0, -1, 0, 1] = value
    ours = case.ours(**t, residual=residual, activation=activation)
    wide = {name: v.double() for name, v in t.items()}
    truth = case.theirs(**wide, residual=residual.double(), activation=activation)
    assert not bool(torch.isfinite(case.theirs(**wide)).all())
    assert torch.equal(ours.isnan(), truth.isnan())
    assert torch.equal(ours.isinf(), truth.isinf())


@needs_poison
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
def test_packed_weight_changes_nothing(case, dtype):
    t = case.tensors(dtype, torch.channels_last)
    packed = F.pack_conv2d_weight(t["weight"], case.groups)
    assert torch.equal(case.ours(**t), case.ours(**t, packed=packed))


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
        (Conv(1, 16, 6, 6, 8, (1, 1)), "gemm_1x1"),
        (Conv(1, 16, 6, 6, 8, padding=1), "implicit_gemm"),
        (Conv(1, 16, 6, 6, 8, (1, 1), stride=2), "implicit_gemm"),
        (Conv(1, 3, 6, 6, 8, padding=1), "stem"),
        (Conv(1, 3, 6, 6, 8, padding=1, groups=1, dilation=2), "implicit_gemm"),
    ],
    ids=str,
)
def test_algorithm(case, algorithm):
    with nnarch.trace() as trace:
        case.ours(**case.tensors(torch.float32, torch.contiguous_format))
    (entry,) = trace
    assert (entry.op, entry.backend, entry.algorithm) == ("conv2d", "cpu", algorithm)


def test_huge_steps_need_no_memory():
    """A stride far past a kernel of few channels: nothing as wide as the stride may be copied."""
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(2, 3, 3, 3)
    for geometry in ((2**30, 2**30, 1), (1, 2**20, 2**20)):
        y = F.conv2d(x, weight, None, *geometry)
        torch.testing.assert_close(y, TF.conv2d(x, weight, None, *geometry))


# -------------------------------------------------------------------------------------- derivatives

GRADCHECK_CASES = [
    Conv(1, 3, 5, 4, 2, (1, 1)),
    Conv(2, 2, 5, 5, 3, stride=2, padding=(1, 0, 2, 1)),
    Conv(1, 9, 4, 5, 2, (2, 3), padding=1, dilation=(1, 2)),
    Conv(1, 4, 4, 4, 6, padding=1, groups=2),
    Conv(1, 3, 5, 5, 6, padding=1, groups=3),
]


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
def test_gradcheck(case):
    t = case.tensors(torch.float64, torch.contiguous_format)
    names, leaves = list(t), [v.requires_grad_() for v in t.values()]

    def function(*tensors: Tensor) -> Tensor:
        return case.ours(**dict(zip(names, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:], ids=str)
def test_gradcheck_through_the_epilogue(activation):
    case = Conv(1, 3, 4, 4, 3, padding=1)
    t = case.tensors(torch.float64, torch.contiguous_format)
    names = [*t, "scale", "shift", "residual"]
    leaves = [
        *t.values(), torch.rand(3).double() + 0.5, torch.randn(3).double(),
        torch.randn(1, 3, 4, 4).double(),
    ]  # fmt: skip
    for leaf in leaves:
        leaf.requires_grad_()

    def function(*tensors: Tensor) -> Tensor:
        return case.ours(**dict(zip(names, tensors, strict=True)), activation=activation)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


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
