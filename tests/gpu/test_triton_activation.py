"""The Triton activation kernels in the interpreter, with both derivatives, against float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate
from torch.nn import functional as F

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from triton_cases import DTYPES  # noqa: E402

from nnarch import library  # noqa: E402
from nnarch.kernels.activation import kinds, reference, triton_kernel  # noqa: E402

ALPHA = 0.1
FUNCTIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, ALPHA),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty returns NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(dtype, size=1031):
    """Around every kink and far into both tails, but on no kink."""
    x = torch.linspace(-9.03, 9.07, size)
    return torch.cat((x, torch.tensor([-80.0, 80.0, -1e-4, 1e-4]))).to(dtype)


def saved_of(name, x):
    """What the gradient is computed from: the output of invertible kinds, the input of others."""
    return FUNCTIONS[name](x) if kinds.CODES[name] in kinds.INVERTIBLE else x


def derivative(name, saved):
    """act' as a function of `saved`, in terms that autograd can differentiate once more."""
    if name == "tanh":
        return 1 - saved * saved
    if name == "sigmoid":
        return saved * (1 - saved)
    if name in ("relu", "leaky_relu", "relu6", "hardsigmoid"):
        high = {"relu6": 6.0, "hardsigmoid": 1.0}.get(name, float("inf"))
        low = {"leaky_relu": ALPHA}.get(name, 0.0)
        slope = {"hardsigmoid": 1 / 6}.get(name, 1.0)
        flat = torch.full_like(saved, low)
        return torch.where((saved > 0) & (saved < high), slope, flat) + 0 * saved
    x = saved if saved.requires_grad else saved.detach().requires_grad_()
    return torch.autograd.grad(FUNCTIONS[name](x).sum(), x, create_graph=saved.requires_grad)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward(name, dtype):
    x = inputs(dtype)
    y = triton_kernel.activation(x, kinds.CODES[name], ALPHA)
    assert_as_accurate(y, FUNCTIONS[name](x), FUNCTIONS[name](x.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_derivative(name, dtype):
    saved = saved_of(name, inputs(dtype))
    grad = torch.randn(saved.shape).to(dtype)
    dx = triton_kernel.activation_grad(grad, saved, kinds.CODES[name], ALPHA)
    truth = grad.double() * derivative(name, saved.double())
    assert_as_accurate(dx, truth.to(dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_derivative(name, dtype):
    saved = saved_of(name, inputs(dtype))
    grad, gradgrad = torch.randn(2, *saved.shape).to(dtype)
    d_saved = triton_kernel.activation_grad_grad(gradgrad, grad, saved, kinds.CODES[name], ALPHA)
    exact = saved.double().requires_grad_()
    (slope,) = torch.autograd.grad(derivative(name, exact).sum(), exact)
    truth = gradgrad.double() * grad.double() * slope
    # Near its zeros a second derivative is a difference of terms of size 1.
    assert_as_accurate(d_saved, truth.to(dtype), truth, ulps=16)


def test_no_activation_copies():
    x = torch.randn(7, 5)
    y = triton_kernel.activation(x, kinds.NONE, 0.0)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    assert torch.equal(triton_kernel.activation_grad(x, y, kinds.NONE, 0.0), x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_not_finite(name):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0])
    y = triton_kernel.activation(x, kinds.CODES[name], ALPHA)
    # In float64: some builds of torch have NaN for gelu(inf) in float32.
    expected = FUNCTIONS[name](x.double()).float()
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("name", ["relu", "relu6", "leaky_relu", "tanh"])
def test_gradient_through_nan(name):
    saved = torch.tensor([float("nan"), 0.0, 0.5])
    grad = torch.ones(3)
    dx = triton_kernel.activation_grad(grad, saved, kinds.CODES[name], ALPHA)
    expected = reference.activation_grad(grad, saved, kinds.CODES[name], ALPHA)
    torch.testing.assert_close(dx, expected, equal_nan=True)


LAYOUTS = {
    "0-d": lambda: torch.randn(()),
    "2-d transposed": lambda: torch.randn(13, 7).T,
    "3-d": lambda: torch.randn(2, 3, 5),
    "channels_last": lambda: torch.randn(2, 3, 5, 7).contiguous(memory_format=torch.channels_last),
    "channel slice": lambda: torch.randn(2, 9, 5, 7)[:, 2:5],
    "column slice": lambda: torch.randn(2, 3, 5, 17)[..., 3::2],
    "expanded scalar": lambda: torch.randn(1).expand(2, 3, 5, 7),
    "expanded planes": lambda: torch.randn(2, 3, 1, 1).expand(2, 3, 5, 7),
    "every dimension apart": lambda: torch.randn(4, 6, 10, 14)[::2, ::2, ::2, ::2],
    "5-d permuted": lambda: torch.randn(2, 3, 4, 5, 2).permute(4, 2, 0, 3, 1),
    "empty": lambda: torch.randn(2, 0, 5, 7),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(make):
    x = make()
    y = triton_kernel.activation(x, kinds.CODES["silu"], 0.0)
    torch.testing.assert_close(y, F.silu(x))
    assert y.stride() == library.new_output(x, x.shape).stride()


@pytest.mark.parametrize("saved_layout", ["channels_last", "column slice", "expanded planes"])
@pytest.mark.parametrize(
    "grad_layout", ["expanded scalar", "every dimension apart", "channels_last"]
)
def test_mixed_strides(grad_layout, saved_layout):
    grad, saved, gradgrad = LAYOUTS[grad_layout](), LAYOUTS[saved_layout](), torch.randn(2, 3, 5, 7)
    code = kinds.CODES["tanh"]
    dx = triton_kernel.activation_grad(grad, saved, code, 0.0)
    torch.testing.assert_close(dx, grad * (1 - saved * saved))
    assert dx.stride() == library.new_output(saved, saved.shape).stride()
    d_saved = triton_kernel.activation_grad_grad(gradgrad, grad, saved, code, 0.0)
    torch.testing.assert_close(d_saved, gradgrad * grad * -2 * saved)


def test_merged_dims():
    out = torch.empty(2, 3, 5, 7)
    assert triton_kernel.merged_dims(out, [out]) == ([210], [[1]])
    last = out.contiguous(memory_format=torch.channels_last)
    assert triton_kernel.merged_dims(last, [last]) == ([210], [[1]])
    assert triton_kernel.merged_dims(out, [last]) == ([2, 3, 35], [[105, 1, 3]])
    expanded = torch.empty(2, 3, 1, 1).expand(2, 3, 5, 7)
    assert triton_kernel.merged_dims(out, [out, expanded]) == ([6, 35], [[35, 1], [1, 0]])


def test_int64_offsets(monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    monkeypatch.setattr(triton_kernel, "needs_int64", lambda *_: True)
    x = torch.randn(3, 5, 7).transpose(0, 1)
    torch.testing.assert_close(triton_kernel.activation(x, kinds.CODES["gelu"], 0.0), F.gelu(x))


def test_unsupported_dtype_names_operation_and_dtype():
    with pytest.raises(NotImplementedError, match=r"activation_grad for torch\.float64"):
        triton_kernel.activation_grad(torch.zeros(2), torch.zeros(2).double(), 1, 0.0)
