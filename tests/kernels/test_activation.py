"""Activation functions and their derivatives against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    FORMATS,
    VIEWS,
    act,
    compare,
    name_of,
    on_fresh_memory,
)
from torch.autograd import gradcheck, gradgradcheck

import nnarch
from nnarch import functional as F
from nnarch.kernels.activation import kinds

KINDS = [kind for kind in ACTIVATIONS if kind is not None]
# Empty, around a vector of any instruction set, and around a task of 16384 elements.
SIZES = [0, 1, 7, 16, 33, 1023, 16387]
SHAPES = [(), (0,), (5,), (3, 0, 2), (2, 3), (2, 3, 5), (2, 3, 4, 5), (1, 5, 1, 1), (2, 1, 2, 3, 2)]


def ours(x, kind):
    name, alpha = kind if isinstance(kind, tuple) else (kind, None)
    return F.activation(x, name, alpha=alpha)


def theirs(x, kind):
    """torch's function, but exact in float64, where torch rounds 1/6 to float32 and drops tails."""
    if x.dtype == torch.float64 and kind == "hardsigmoid":
        return (x + 3).clamp(0, 6) / 6
    if x.dtype == torch.float64 and kind == "hardswish":
        return x * theirs(x, "hardsigmoid")
    if x.dtype == torch.float64 and kind == "gelu":
        return x * 0.5 * torch.erfc(-x / math.sqrt(2))
    if x.dtype == torch.float64 and kind == "gelu_tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return act(x, kind)


def inputs(size, dtype):
    """Numbers around 0 and far from it, on both sides."""
    x = torch.randn(size) * 3
    x[::5] *= 10
    x = x.to(dtype)
    x[x.abs() == 3] = 2.5  # a corner of hardswish, where clamp has another derivative
    return x


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_forward_and_gradient(kind, dtype):
    for size in SIZES:
        x, grad = inputs(size, dtype), torch.randn(size).to(dtype)
        compare(lambda x: ours(x, kind), lambda x: theirs(x, kind), {"x": x}, grad)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_magnitude(kind):
    """Relative to each value, not to the largest: small results are accurate too.

    gelu, as torch's, is a difference of equals far below zero: accurate there relative to x.
    """
    exponents = torch.arange(-60, 7, 0.01, dtype=torch.float64)
    x = torch.cat([2.0**exponents, -(2.0**exponents)]).float()
    mine, truth = ours(x, kind).double(), theirs(x.double(), kind)
    torchs = theirs(x, kind).double()
    error, torch_error = (mine - truth).abs(), (torchs - truth).abs()
    flushed = 2e-38 * x.double().abs().clamp(min=1)  # denormals, and x times a denormal
    tail = 1e-7 * x.double().abs() if kind == "gelu" else 0
    # exp's argument in gelu_tanh, up to 87, is rounded by 4e-6.
    relative = 1e-5 if kind == "gelu_tanh" else 3e-6
    assert bool((error <= 2 * torch_error + relative * truth.abs() + flushed + tail).all())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_special_values(kind, dtype):
    """Infinities, NaN, huge numbers and the corners of every kind, with torch's derivatives.

    torch's in float64: its float32 gelu makes NaN of infinity.
    """
    special = [math.inf, -math.inf, math.nan, 0.0, -0.0, 1e30, -1e30, 3.0, -3.0, 6.0, 88.8, -88.8]
    x = torch.tensor(special * 3, dtype=dtype)
    leaf, twin = x.clone().requires_grad_(), x.double().requires_grad_()
    y, z = ours(leaf, kind), act(twin, kind)
    torch.testing.assert_close(y, z.to(dtype), equal_nan=True)
    y.backward(torch.ones_like(y))
    z.backward(torch.ones_like(z))
    finite = x.abs() < 1e20  # torch multiplies infinity by zero in some derivatives far out
    torch.testing.assert_close(leaf.grad[finite], twin.grad[finite].to(dtype))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_derivatives_stay_finite(kind):
    """First and second derivatives of huge inputs are not infinity times zero."""
    x = torch.tensor([1e4, -1e4, 1e15, -1e15, 1e30, -1e30], requires_grad=True)
    (first,) = torch.autograd.grad(ours(x, kind).sum(), x, create_graph=True)
    assert bool(torch.isfinite(first).all())
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.zeros_like(x))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(kind, backend):
    x = (torch.randn(37, dtype=torch.float64) * 2).requires_grad_()
    with nnarch.use_backend(backend):
        assert gradcheck(lambda x: ours(x, kind), x)
        assert gradgradcheck(lambda x: ours(x, kind), x)


def test_negative_slope_alone():
    """leaky_relu may have a negative slope where its input can be kept."""
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        F.activation(x, "leaky_relu", alpha=-0.5), torch.nn.functional.leaky_relu(x, -0.5)
    )
    assert gradcheck(lambda x: F.activation(x, "leaky_relu", alpha=-0.5), x)


def test_third_derivative_raises():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(ours(x, "silu").sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="activation_grad_grad is not differentiable"):
        second.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, backend):
    x = torch.randn(shape, requires_grad=True)
    with nnarch.use_backend(backend):
        y = F.activation(x, "gelu")
        y.sum().backward()
    torch.testing.assert_close(y, torch.nn.functional.gelu(x))
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_memory_format_is_kept(memory_format):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
    y = F.activation(x, "silu")
    assert y.is_contiguous(memory_format=memory_format)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(2, 3, 4, 5))
    assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    strange = VIEWS[view]
    for shape in ((4, 3), (2, 3, 4, 5)):
        x, grad = strange(torch.randn(shape)), strange(torch.randn(shape))
        compare(lambda x: ours(x, "tanh"), lambda x: act(x, "tanh"), {"x": x}, grad)


def test_output_is_no_alias():
    x = torch.randn(4)
    y = F.activation(x, None)
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("kind", [None, *KINDS], ids=str)
def test_one_and_two_threads_agree(kind):
    x, grad = torch.randn(100_003), torch.randn(100_003)
    code, alpha = kinds.encode(kind)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = torch.ops.nnarch.activation(x, code, alpha)
            slope = torch.ops.nnarch.activation_grad(grad, x, code, alpha)
            bend = torch.ops.nnarch.activation_grad_grad(grad, grad, x, code, alpha)
            results.append((y, slope, bend))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("code", kinds.NAMES, ids=lambda code: str(kinds.NAMES[code]))
def test_operations_match_their_reference(code):
    """Each operation alone, on any saved value, native against its definition."""
    alpha = 0.3 if code == kinds.LEAKY_RELU else 0.0
    gradgrad, grad, z = torch.randn(3, 201, dtype=torch.float64)
    ops = torch.ops.nnarch
    saved = ops.activation(z, code, alpha) if code in kinds.INVERTIBLE else z
    calls = (
        lambda: ops.activation(z, code, alpha),
        lambda: ops.activation_grad(grad, saved, code, alpha),
        lambda: ops.activation_grad_grad(gradgrad, grad, saved, code, alpha),
    )
    for call in calls:
        with nnarch.use_backend("reference"):
            definition = call()
        torch.testing.assert_close(on_fresh_memory(call), definition)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_opcheck(memory_format):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randn(2, 3, 4, 5).requires_grad_()
    ops = torch.ops.nnarch
    for code in (kinds.RELU, kinds.GELU):
        torch.library.opcheck(ops.activation.default, (x, code, 0.0))
        torch.library.opcheck(ops.activation_grad.default, (grad, x, code, 0.0))
        plain = (grad.detach(), grad.detach(), x.detach())
        torch.library.opcheck(ops.activation_grad_grad.default, (*plain, code, 0.0))


BAD = [
    (lambda x: F.activation(x, "swish"), ValueError, "activation must be one of .*'relu'.*'swish'"),
    (lambda x: F.activation(x, "relu", alpha=1), ValueError, "'relu' takes no alpha, got 1"),
    (lambda x: F.activation(x, 3), TypeError, "None, a name or a pair .*got 3"),
    (lambda x: F.activation(x.long(), "relu"), TypeError, "x must be floating point.*int64"),
    (
        lambda x: F.activation([1.0], "relu"),
        TypeError,
        "DLPack, got list",
    ),
    (lambda x: torch.ops.nnarch.activation(x, 11, 0.0), RuntimeError, "unknown code"),
    (lambda x: kinds.encode(("leaky_relu", -1.0)), ValueError, "must not be negative, got -1.0"),
    (lambda x: kinds.encode(("leaky_relu", "1")), TypeError, "must be a number, got '1'"),
    (lambda x: kinds.encode(("relu", 0.1), "conv2d"), ValueError, "^conv2d: activation 'relu'"),
    (lambda x: kinds.encode((["relu"], 0.1)), ValueError, "must be one of"),
    (lambda x: kinds.encode(["relu", 1, 2]), TypeError, "a name or a pair"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3))


def test_bad_gradient():
    from nnarch.kernels.activation.op import activation_grad

    x = torch.randn(3)
    with pytest.raises(ValueError, match=r"activation_grad: grad must have the shape of saved"):
        activation_grad(torch.randn(4), x, kinds.RELU, 0.0)
    with pytest.raises(TypeError, match=r"grad must be torch.float32 as saved, got torch.float64"):
        activation_grad(x.double(), x, kinds.RELU, 0.0)


def test_encode():
    assert kinds.encode(None) == (kinds.NONE, 0.0)
    assert kinds.encode("leaky_relu") == (kinds.LEAKY_RELU, 0.01)
    assert kinds.encode(("leaky_relu", 1)) == (kinds.LEAKY_RELU, 1.0)
    assert [kinds.encode(name)[0] for name in kinds.CODES] == list(range(11))


def test_needs_split():
    x, leaf = torch.randn(3), torch.randn(3, requires_grad=True)
    assert kinds.needs_split(kinds.GELU, x, None, leaf)
    assert not kinds.needs_split(kinds.RELU, x, None, leaf)
    assert not kinds.needs_split(kinds.GELU, x, None)
    with torch.no_grad():
        assert not kinds.needs_split(kinds.GELU, leaf)
