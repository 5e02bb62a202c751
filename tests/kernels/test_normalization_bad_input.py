"""What normalization refuses, and says."""

from __future__ import annotations

import pytest
import torch

from nnarch import functional as F
from nnarch.kernels.activation import kinds
from nnarch.kernels.normalization import op as ops

X = torch.randn(2, 3, 4)
V = torch.ones(3)
BAD = [
    (lambda: F.batch_norm(X, None, None), ValueError, "must be given when training is False"),
    (lambda: F.batch_norm(X[:1, :, 0], None, None, training=True), ValueError,
     r"expected more than 1 value per channel when training, got input shape \(1, 3\)"),
    (lambda: F.batch_norm(X[0, 0], V, V), ValueError, r"input must be \[N, C, ...\], got"),
    (lambda: F.batch_norm(X.long(), V, V), TypeError, "input must be floating point"),
    (lambda: F.batch_norm(X, torch.ones(4), V), ValueError, r"running_mean must have shape \(3,\)"),
    (lambda: F.batch_norm(X, V, V.double()), TypeError, "running_var must be torch.float32"),
    (lambda: F.batch_norm(X, V, V, torch.ones(2)), ValueError, "weight must have shape"),
    (lambda: F.batch_norm(X, V, V, V, torch.ones(1)), ValueError, "bias must have shape"),
    (lambda: F.batch_norm(X, None, None, torch.ones(2), training=True), ValueError, "weight must"),
    (lambda: F.batch_norm(X, None, None, V.double(), training=True), TypeError, "weight must be"),
    (lambda: F.batch_norm(X, V, V, residual=X[:1]), ValueError, "residual must have the shape"),
    (lambda: F.batch_norm(X, None, None, training=True, residual=X.double()), TypeError,
     "batch_norm: residual must be torch.float32 as input, got torch.float64"),
    (lambda: F.batch_norm(X, V, V, activation="relu7"), ValueError, "^batch_norm: activation must"),
    (lambda: ops.batch_norm_train(X[:0], None, None, None, 1e-5, 0, 0.0), ValueError,
     "must not be empty"),
    (lambda: ops.channel_sum(V), ValueError, "channel_sum: x must be"),
    (lambda: ops.channel_dot(X, X[:1]), ValueError, "b must have the shape of a"),
    (lambda: ops.batch_norm_backward(X, X, None, V, V, X, kinds.GELU, 0.0), ValueError,
     "'gelu' needs its input"),
    (lambda: ops.batch_norm_backward(X, X, None, V, V, None, kinds.RELU, 0.0), ValueError,
     "'relu' needs its output y"),
    (lambda: ops.batch_norm_backward(X, X, None, V, V[:1], None, 0, 0.0), ValueError, "invstd"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_failed_call_changes_no_statistics():
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError):
        F.batch_norm(X, mean, var, torch.ones(2), training=True)
    assert torch.equal(mean, torch.zeros(3)) and torch.equal(var, torch.ones(3))


def test_unsupported_derivatives_raise():
    x = torch.randn(4, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="batch_norm_train with gelu has no gradient"):
        torch.ops.nnarch.batch_norm_train(x, None, None, None, 1e-5, kinds.GELU, 0.0)
    y, mean, invstd = (t.detach() for t in ops.batch_norm_train(x, None, None, None, 1e-5, 1, 0.0))
    with pytest.raises(NotImplementedError, match="once_differentiable"):
        torch.ops.nnarch.batch_norm_backward(x, x, None, mean, invstd, y, kinds.RELU, 0.0)
