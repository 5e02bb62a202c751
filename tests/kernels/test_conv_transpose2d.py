"""conv_transpose2d against torch in float64: algorithms, dtypes, formats, strides, epilogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_cases import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    FORMATS,
    VIEWS,
    check_under_isa,
    compare,
    equal_to_torch,
    name_of,
    on_fresh_memory,
    small_integers,
    ulps_of_sum,
)
from op_samples import tensor
from torch import Tensor
from torch.nn import functional as TF
from transposed_cases import CASES, CORE, EMPTY, Transposed

import nnarch
from nnarch import functional as F
from nnarch import library
from nnarch.kernels.activation import kinds

# Sums of products only: Winograd has tests and tolerances of its own (test_winograd_phases.py).
pytestmark = pytest.mark.usefixtures("highest_precision")


def _samples() -> list[tuple[Any, ...]]:
    steps = ([2, 1], [1, 0], [1, 1], [1, 2])
    x, weight = tensor(2, 12, 5, 6), tensor(12, 9, 3, 4)
    size = TF.conv_transpose2d(x, weight, None, *steps[:3], 2, steps[3]).shape
    epilogue = (tensor(18), torch.rand(18) + 0.5, tensor(18), tensor(*size))
    one, few = tensor(3, 12, 1, 1), tensor(12, 2, 4, 4)
    return [
        (x, weight, *epilogue, None, *steps, 2, kinds.RELU, 0.0),
        (x, weight, *[None] * 5, *steps, 2, kinds.SILU, 0.0),
        (one, weight, epilogue[0], *[None] * 4, [1, 1], [0, 0], [0, 0], [1, 1], 2, 0, 0.0),
        (x, few, tensor(2), *[None] * 4, [2, 2], [1, 1], [0, 0], [1, 1], 1, kinds.TANH, 0.0),
    ]


SAMPLES = {
    "conv_transpose2d": _samples,
    "conv_transpose2d_pack": lambda: [
        (tensor(12, 9, 3, 4), [2, 1], [1, 2], 2, 0),
        (tensor(12, 9, 4, 4), [2, 2], [1, 1], 2, 1),
        (tensor(12, 20, 4, 4), [2, 2], [1, 1], 1, 4),
        (tensor(12, 2, 4, 4), [2, 2], [1, 1], 1, 7),
    ],
}


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, dtype, memory_format):
    tensors = case.tensors(dtype, memory_format)
    grad = torch.randn_like(case.theirs(**tensors))
    y = compare(case.ours, case.theirs, tensors, grad, ulps=ulps_of_sum(case.depth, dtype))
    assert y.is_contiguous(memory_format=library.output_format(tensors["x"], tensors["weight"]))


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


def test_unbatched():
    case = Transposed(1, 12, 5, 6, 18, (4, 4), 2, 1)
    t = case.tensors(torch.float32, torch.contiguous_format)
    residual = torch.randn(18, 10, 12)
    y = F.conv_transpose2d(t["x"][0], t["weight"], t["bias"], 2, 1, residual=residual)
    batch = F.conv_transpose2d(t["x"], t["weight"], t["bias"], 2, 1, residual=residual[None])
    assert torch.equal(y, batch[0])


def test_the_gradient_of_a_convolutions_input_is_the_same_operation():
    """One mechanism: the same bits."""
    x, weight = torch.randn(2, 20, 6, 7), torch.randn(20, 24, 4, 4)
    y = F.conv_transpose2d(x, weight, None, 2, 1)
    dx = torch.ops.nnarch.conv2d_input_grad(x, weight, y.shape, [2, 2], [1] * 4, [1, 1], 1)
    assert torch.equal(y, dx)


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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_channels_last_weights(case):
    """Whatever the weight's memory format, the output is the same and its gradient follows."""
    t = {n: small_integers(v) for n, v in case.tensors(torch.float32, FORMATS[1]).items()}
    t["weight"] = t["weight"].contiguous(memory_format=torch.channels_last)
    grad = small_integers(case.theirs(**t))
    equal_to_torch(case.ours, case.theirs, t, grad)
    assert torch.equal(case.ours(**t, packed=case.packed(t["weight"])), case.theirs(**t))


@pytest.mark.parametrize("case", CORE, ids=str)
def test_sum_backward(case):
    """`.sum()` sends back a gradient of strides 0."""
    t = {n: v.requires_grad_() for n, v in case.tensors(torch.float64, FORMATS[0]).items()}
    case.ours(**t).sum().backward()
    mine = [v.grad for v in t.values()]
    theirs = torch.autograd.grad(case.theirs(**t).sum(), list(t.values()))
    torch.testing.assert_close(mine, list(theirs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reads_no_uninitialised_memory(case):
    """The same bits on memory full of NaN and on memory that was used before."""
    t = case.tensors(torch.float32, torch.contiguous_format)
    packed = case.packed(t["weight"])
    fresh_packed = on_fresh_memory(lambda: case.packed(t["weight"]))
    assert packed is fresh_packed is None or torch.equal(packed, fresh_packed)
    usual = case.ours(**t, packed=packed, activation="silu")
    fresh = on_fresh_memory(lambda: case.ours(**t, packed=packed, activation="silu"))
    assert torch.equal(usual, fresh)
    assert bool(torch.isfinite(fresh).all())


@pytest.mark.parametrize("channels", [24, 40, 64])
def test_images_that_end_inside_a_cache_line(channels):
    """Large outputs are written past the caches only where every row of a phase begins a line."""
    x = torch.randn(5, 16, 75, 77).to(memory_format=torch.channels_last)
    weight = torch.randn(16, channels, 3, 3)
    y = F.conv_transpose2d(x, weight, None, 2, 1)  # 149 × 153 pixels
    torch.testing.assert_close(y, TF.conv_transpose2d(x, weight, None, 2, 1), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------- packed weights


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CORE, ids=str)
def test_packed_weight_changes_nothing(case, dtype):
    t = case.tensors(dtype, torch.channels_last)
    assert torch.equal(case.ours(**t), case.ours(**t, packed=case.packed(t["weight"])))


@pytest.mark.parametrize("case", [c for c in CORE if c.k != c.groups], ids=str)
def test_layout_0_serves_every_input(case):
    t = {n: small_integers(v) for n, v in case.tensors(torch.float32, FORMATS[0]).items()}
    assert torch.equal(case.ours(**t, packed=case.packed(t["weight"], 0)), case.theirs(**t))


def test_other_backends_ignore_packed_weights():
    case = CORE[0]
    t = case.tensors(torch.float32, torch.contiguous_format)
    with nnarch.use_backend("reference"):
        assert torch.equal(case.ours(**t, packed=case.packed(t["weight"])), case.ours(**t))


def test_a_packed_weight_of_another_convolution_is_refused():
    one = Transposed(2, 24, 1, 1, 20, (4, 4))
    image = Transposed(2, 24, 4, 4, 20, (4, 4), 2, 1)
    weight = torch.randn(24, 20, 4, 4)
    assert (one.layout(weight), image.layout(weight)) == (1, 0)
    x = torch.randn(2, 24, 4, 4)
    for packed in (
        one.packed(weight),  # for inputs of one pixel
        image.packed(weight[:12], 0),
        image.packed(weight)[:-1],
        image.packed(weight)[1:],
        torch.full((5,), float("nan")),
        torch.empty(0),
    ):
        with pytest.raises(ValueError, match="conv_transpose2d: packed does not belong"):
            image.ours(x=x, weight=weight, packed=packed)


# -------------------------------------------------------------------------------------- algorithms


@pytest.mark.parametrize(
    ("case", "algorithm"),
    [
        (Transposed(2, 16, 5, 6, 20, (4, 4), 2, 1), "implicit_gemm_phases"),
        (Transposed(2, 16, 5, 6, 20), "implicit_gemm"),
        (Transposed(2, 16, 1, 1, 20, (4, 4)), "gemm_1x1"),
        (Transposed(2, 16, 5, 6, 1, (4, 4), 2, 1), "gemm_taps"),
    ],
    ids=str,
)
def test_algorithm(case, algorithm):
    with nnarch.trace() as trace:
        case.ours(**case.tensors(torch.float32, torch.contiguous_format))
    (entry,) = trace
    assert (entry.op, entry.backend, entry.algorithm) == ("conv_transpose2d", "cpu", algorithm)


@pytest.mark.parametrize("channels", [2, 20])
def test_long_strides_need_no_memory_but_the_output(channels):
    x, weight = torch.ones(1, 2, 2, 2), torch.ones(2, channels, 1, 2)
    y = F.conv_transpose2d(x, weight, None, (1, 1000), 0, 0, 1, (1, 900))
    assert torch.equal(y, TF.conv_transpose2d(x, weight, None, (1, 1000), 0, 0, 1, (1, 900)))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_under_every_instruction_set(isa):
    check_under_isa(isa, check_all)


def check_all() -> None:
    """Every case once, exactly; runs in a process of its own."""
    nnarch.set_precision("highest")
    for case in CASES:
        for memory_format in FORMATS:
            t = case.tensors(torch.float32, memory_format)
            t = {name: small_integers(value) for name, value in t.items()}
            grad = small_integers(case.theirs(**t))
            equal_to_torch(case.ours, case.theirs, t, grad)
            assert torch.equal(case.ours(**t, packed=case.packed(t["weight"])), case.theirs(**t))


# -------------------------------------------------------------------------------------- derivatives

GRADCHECK_CASES = [
    Transposed(1, 3, 3, 4, 2, (1, 1)),
    Transposed(2, 2, 3, 3, 3, (4, 4), 2, 1),
    Transposed(1, 3, 3, 2, 18, (2, 3), 2, 1, (1, 1), 1, (1, 2)),
    Transposed(1, 2, 2, 3, 17, (2, 2), 1, 0, 2, 1, 3),
    Transposed(1, 4, 3, 3, 6, (3, 3), 2, 1, 1, 2),
    Transposed(1, 4, 3, 3, 4, (3, 3), 2, 1, 1, 4),
    Transposed(2, 3, 1, 1, 18, (2, 3)),
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
    case = Transposed(1, 3, 3, 3, 3, (2, 2), 2)
    t = case.tensors(torch.float64, torch.contiguous_format)
    t |= {"scale": torch.rand(3).double() + 0.5, "shift": torch.randn(3).double()}
    t["residual"] = torch.randn(1, 3, 6, 6).double()
    names, leaves = list(t), [v.requires_grad_() for v in t.values()]

    def function(*tensors: Tensor) -> Tensor:
        return case.ours(**dict(zip(names, tensors, strict=True)), activation=activation)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_gradient_of_one_input(wanted):
    case = Transposed(1, 9, 4, 4, 18, (4, 4), 2, 1)
    t = case.tensors(torch.float64, torch.contiguous_format)
    t[wanted].requires_grad_()
    (mine,) = torch.autograd.grad(case.ours(**t).square().sum(), t[wanted])
    (theirs,) = torch.autograd.grad(case.theirs(**t).square().sum(), t[wanted])
    torch.testing.assert_close(mine, theirs)
