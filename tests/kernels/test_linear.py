"""linear against torch in float64: every algorithm, dtype, stride and epilogue."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    VIEWS,
    compare,
    equal_to_torch,
    exact_product,
    machine_with,
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

# (rows, depth, outputs). Up to 8 rows go past the weights in fours, of which tasks have 64 to 256;
# up to 96 are packed in the place of unpacked weights, unless they leave a vector all but empty; up
# to 512 go against weights packed in passing by panels of 8 to 32 columns, in parts of 1024 terms;
# more pack the whole weight. dx of up to 192 rows multiplies with the weight as it lies.
SIZES = [
    (1, 1, 1),
    (1, 7, 5),
    (1, 129, 65),
    (1, 2048, 127),
    (2, 33, 64),
    (3, 100, 63),
    (4, 257, 30),
    (5, 1, 1),
    (5, 16, 16),
    (6, 17, 19),
    (8, 300, 70),
    (9, 130, 45),
    (33, 1600, 129),
    (96, 320, 150),
    (150, 33, 260),
    (13, 96, 257),
    (97, 31, 48),
    (31, 1031, 17),
    (7, 3100, 23),
    (256, 40, 33),
    (512, 20, 9),
    (49, 600, 70),
    (100, 2500, 70),
    (200, 70, 2500),
    (513, 20, 9),
    (600, 67, 131),
    (270, 1100, 400),  # dw: two blocks of rows, of columns and of outputs
]
CORE = [SIZES[i] for i in (2, 6, 11, 15, 17, 22)]


def tensors(m: int, c: int, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """x, weight and bias, with outputs near 1."""
    named = {
        "x": torch.randn(m, c), "weight": torch.randn(k, c) / c**0.5, "bias": torch.randn(k)
    }  # fmt: skip
    return {name: t.to(dtype) for name, t in named.items()}


def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None, **epilogue: Any) -> Tensor:
    return F.linear(x, weight, bias, **epilogue)


def theirs(x: Tensor, weight: Tensor, bias: Tensor | None = None, **epilogue: Any) -> Tensor:
    names = ("scale", "shift", "residual", "activation")
    y = TF.linear(x, weight, bias)
    return torch_epilogue(y, *(epilogue.get(name) for name in names), dim=-1)


def longest_sum(size: tuple[int, int, int]) -> int:
    """Products in the longest sum of the output and the gradients."""
    return max(size)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients(size, dtype):
    m, _, k = size
    named = tensors(*size, dtype)
    grad = torch.randn(m, k).to(dtype)
    compare(ours, theirs, named, grad, ulps=ulps_of_sum(longest_sum(size), dtype))


@needs_long_double
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float64_against_long_double(size):
    """In float64 torch is no truth: the sums are taken again with 64 bits."""
    t = tensors(*size, torch.float64)
    x, weight = t["x"], t["weight"]
    truth = exact_product(x, weight.t())
    ulps = ulps_of_running_sum(size[1])
    assert_as_accurate(ours(x, weight), theirs(x, weight), truth, ulps=ulps)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", CORE, ids=str)
def test_reference_backend(size, dtype):
    def reference(**named: Any) -> Tensor:
        with nnarch.use_backend("reference"):
            return ours(**named)

    compare(reference, theirs, tensors(*size, dtype))


@pytest.mark.parametrize("shape", [(7,), (2, 7), (3, 1, 7), (2, 3, 4, 7), (0, 7), (2, 0, 7)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions(shape, backend):
    t = tensors(1, 7, 5, torch.float64)
    t["x"] = torch.randn(shape, dtype=torch.float64)
    leaves = {name: v.requires_grad_() for name, v in t.items()}
    residual = torch.randn(*shape[:-1], 5, dtype=torch.float64, requires_grad=True)
    leaves["residual"] = residual
    with nnarch.use_backend(backend):
        y = ours(**leaves, activation="silu")
        mine = torch.autograd.grad(y.sum(), list(leaves.values()))
    z = theirs(**leaves, activation="silu")
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(mine, torch.autograd.grad(z.sum(), list(leaves.values())))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(3, 0, 5), (600, 0, 5), (3, 4, 0), (0, 4, 5), (0, 0, 0)])
def test_empty(size, backend):
    """A sum of nothing is the bias alone."""
    leaves = {n: torch.randn(s, requires_grad=True) for n, s in zip(
        ("x", "weight", "bias"), ((size[0], size[1]), (size[2], size[1]), (size[2],)), strict=True
    )}  # fmt: skip
    with nnarch.use_backend(backend):
        y = on_fresh_memory(lambda: ours(**leaves))
        gradients = torch.autograd.grad(y.sum(), list(leaves.values()))
    assert torch.equal(y, leaves["bias"].expand(size[0], size[2]))
    assert [g.shape for g in gradients] == [t.shape for t in leaves.values()]


# ---------------------------------------------------------------------------------------- strides


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("size", CORE, ids=str)
def test_views(size, dtype, view):
    """Every operand with strides that are not the usual ones, gradient included."""
    m, _, k = size
    t = tensors(*size, dtype)
    like = torch.empty(m, k, dtype=dtype)
    t |= {"scale": t["bias"], "shift": t["bias"], "residual": like}
    strange = {name: VIEWS[view](small_integers(value)) for name, value in t.items()}
    equal_to_torch(ours, theirs, strange, VIEWS[view](small_integers(like)))


@pytest.mark.parametrize("size", CORE, ids=str)
def test_sum_backward(size):
    """`.sum()` sends back a gradient of strides 0."""
    t = {n: v.requires_grad_() for n, v in tensors(*size, torch.float64).items()}
    ours(**t).sum().backward()
    truth = torch.autograd.grad(theirs(**t).sum(), list(t.values()))
    torch.testing.assert_close([v.grad for v in t.values()], list(truth))


# --------------------------------------------------------------------------------------- epilogue

EPILOGUE_SIZES = [(1, 20, 35), (3, 9, 66), (14, 11, 37), (520, 5, 19)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("size", EPILOGUE_SIZES, ids=str)
def test_epilogue(size, activation):
    """Every subset of bias, scale, shift and residual, with and without gradients."""
    m, _, k = size
    t = tensors(*size, torch.float32)
    parts = {
        "bias": t.pop("bias"),
        "scale": torch.rand(k) + 0.5,
        "shift": torch.randn(k),
        "residual": torch.randn(m, k),
    }
    grad = torch.randn(m, k)

    def mine(**named: Any) -> Tensor:
        return ours(**named, activation=activation)

    def truth(**named: Any) -> Tensor:
        return theirs(**named, activation=activation)

    for count in range(len(parts) + 1):
        for names in itertools.combinations(parts, count):
            chosen = t | {name: parts[name] for name in names}
            compare(mine, truth, chosen)
            compare(mine, truth, chosen, grad, ulps=16)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", EPILOGUE_SIZES, ids=str)
def test_nan_and_infinity_propagate(size, value, activation):
    t = tensors(*size, torch.float32)
    t["x"][0, 1] = value
    t["bias"][3] = value
    wide = {name: v.double() for name, v in t.items()}
    mine, truth = ours(**t, activation=activation), theirs(**wide, activation=activation)
    assert not bool(torch.isfinite(theirs(**wide)).all())
    assert torch.equal(mine.isnan(), truth.isnan())
    assert torch.equal(mine.isinf(), truth.isinf())


@needs_poison
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reads_no_uninitialised_memory(size):
    """The same bits on memory full of NaN and on memory that was used before."""
    t = tensors(*size, torch.float32)
    packed = on_fresh_memory(lambda: F.pack_linear_weight(t["weight"]))
    assert torch.equal(packed, F.pack_linear_weight(t["weight"]))
    for chosen in (None, packed):
        fresh = on_fresh_memory(lambda p=chosen: ours(**t, packed=p, activation="silu"))
        assert torch.equal(fresh, ours(**t, packed=chosen, activation="silu"))
        assert bool(torch.isfinite(fresh).all())


# ---------------------------------------------------------------------------------- packed weights


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_packed_weight(size, dtype):
    t = tensors(*size, dtype)
    packed = F.pack_linear_weight(t["weight"])
    compare(
        lambda **named: ours(**named, packed=packed),
        theirs,
        t,
        ulps=ulps_of_sum(longest_sum(size), dtype),
    )


@pytest.mark.parametrize(
    ("rows", "packed", "algorithm"),
    [
        (1, False, "gemv"),
        (4, True, "gemv"),
        (8, False, "gemv"),
        (9, False, "turned"),
        (96, False, "turned"),
        (97, False, "gemm"),
        (512, False, "gemm"),
        (5, True, "gemm_packed"),
        (513, False, "gemm_packed"),
    ],
)
def test_algorithm(rows, packed, algorithm):
    t = tensors(rows, 12, 10, torch.float32)
    weights = F.pack_linear_weight(t["weight"]) if packed else None
    with machine_with(l2_kib=1024), nnarch.trace() as trace:
        ours(**t, packed=weights)
    (entry,) = trace
    assert (entry.op, entry.backend, entry.algorithm) == ("linear", "cpu", algorithm)


@pytest.mark.parametrize("rows", [8, 40, 90, 150])
def test_threads_change_no_bit(rows):
    """Forward and dx of every way past unpacked weights."""
    x, w, g = torch.randn(rows, 300), torch.randn(700, 300), torch.randn(rows, 700)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append((F.linear(x, w), F.linear(g, w.t())))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# -------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("size", [(2, 3, 4), (6, 5, 3)], ids=str)
def test_gradcheck(size, activation):
    m, _, k = size
    t = tensors(*size, torch.float64)
    names = [*t, "scale", "shift", "residual"]
    leaves = [
        *t.values(), torch.rand(k).double() + 0.5, torch.randn(k).double(),
        torch.randn(m, k).double(),
    ]  # fmt: skip
    for leaf in leaves:
        leaf.requires_grad_()

    def function(*values: Tensor) -> Tensor:
        return ours(**dict(zip(names, values, strict=True)), activation=activation)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_gradient_of_one_input(wanted):
    t = tensors(6, 9, 5, torch.float64)
    t[wanted].requires_grad_()
    (mine,) = torch.autograd.grad(ours(**t).square().sum(), t[wanted])
    (truth,) = torch.autograd.grad(theirs(**t).square().sum(), t[wanted])
    torch.testing.assert_close(mine, truth)


@pytest.mark.parametrize("depth", [640, 768, 1000, 1024, 2048])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("seed", [0, 2, 4])
def test_long_sums(depth, activation, seed):
    """Sums of 1024 products in a row had 4.7 times the error of torch's."""
    torch.manual_seed(seed)
    x, w, bias = (
        torch.randn(196, depth),
        torch.randn(250, depth) * (2 / depth) ** 0.5,
        torch.rand(250),
    )
    finish = torch.relu if activation else torch.clone
    truth = finish(TF.linear(x.double(), w.double(), bias.double()))
    assert_as_accurate(
        F.linear(x, w, bias, activation=activation), finish(TF.linear(x, w, bias)), truth
    )
