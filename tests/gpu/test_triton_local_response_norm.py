"""Local response normalization in Triton's interpreter, forward and backward."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DTYPES, FORMATS, VIEWS, check

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from nnarch import library  # noqa: E402
from nnarch.kernels.local_response_norm import reference  # noqa: E402
from nnarch.kernels.local_response_norm import triton_kernel as kernel  # noqa: E402

# size, scale, beta, k
NORMS = [
    (5, 0.2, 0.75, 2.0),
    (3, 0.3, 0.5, 1.0),
    (4, 0.1, 1.3, 0.5),
    (1, 0.7, 0.0, 1.0),
    (50, 0.1, 0.75, 1.0),  # more channels than there are
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_forward_and_backward(norm, memory_format, dtype):
    for relu in (False, True):
        x = torch.randn(2, 9, 5, 7).to(dtype).contiguous(memory_format=FORMATS[memory_format])
        y = check(kernel.local_response_norm, reference.local_response_norm, [x], *norm, relu)
        assert y.stride() == library.new_output(x, y.shape).stride()
        grad = torch.randn_like(x)
        tensors = [grad, x]
        ours, theirs = kernel.local_response_norm_grad, reference.local_response_norm_grad
        dx = check(ours, theirs, tensors, *norm, relu, ulps=16)
        assert dx.stride() == y.stride()


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    x, grad = view(torch.randn(2, 6, 5, 7)), view(torch.randn(2, 6, 5, 7))
    norm = (3, 0.3, 0.75, 1.0, False)
    check(kernel.local_response_norm, reference.local_response_norm, [x], *norm)
    ours, theirs = kernel.local_response_norm_grad, reference.local_response_norm_grad
    check(ours, theirs, [grad, x], *norm, ulps=16)


@pytest.mark.parametrize("size", [(2, 70, 9), (1, 5, 2, 3, 4), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_other_shapes(size):
    x = torch.randn(size)
    norm = (5, 0.3, 0.75, 1.0, False)
    check(kernel.local_response_norm, reference.local_response_norm, [x], *norm)
    check(kernel.local_response_norm_grad, reference.local_response_norm_grad, [x, x], *norm)


def test_zeros_infinities_and_nan():
    x = torch.randn(2, 8, 3, 4)
    x[0, 2, 1, 1], x[1, 3, 0, 0], x[0, :, 2, 2] = float("inf"), float("nan"), 0.0
    for k in (0.0, 1.0):
        actual = kernel.local_response_norm(x, 3, 0.5, 0.75, k, False)
        expected = reference.local_response_norm(x, 3, 0.5, 0.75, k, False)
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_int64_offsets(monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    monkeypatch.setattr(kernel, "needs_int64", lambda *_: True)
    x = torch.randn(2, 9, 5, 7)
    norm = (5, 0.3, 0.75, 1.0, True)
    check(kernel.local_response_norm, reference.local_response_norm, [x], *norm)
    check(kernel.local_response_norm_grad, reference.local_response_norm_grad, [x, x], *norm)


def test_what_is_refused():
    x = torch.randn(1, 4, 3, 3)
    with pytest.raises(NotImplementedError, match=r"local_response_norm for torch\.float64"):
        kernel.local_response_norm(x.double(), 3, 1.0, 0.75, 1.0, False)
    with pytest.raises(NotImplementedError, match="negative alpha or k"):
        kernel.local_response_norm_grad(x, x, 3, -1.0, 0.75, 1.0, False)
