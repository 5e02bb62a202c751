"""What layer and RMS normalization say about arguments they cannot take."""

from __future__ import annotations

import pytest
import torch
from layer_norm_cases import stats_of

from nnarch import functional as F
from nnarch.kernels.layer_norm import op as ops

X = torch.randn(4, 6)
W = torch.rand(6)
STATS = stats_of(X, True)
BAD = [
    (lambda: F.layer_norm([1.0], (1,)), TypeError, "input must be a tensor.*list|DLPack"),
    (lambda: F.layer_norm(X.long(), (6,)), TypeError, "input must be floating.*int64"),
    (lambda: F.layer_norm(X, (5,)), ValueError, r"layer_norm.*normalized_shape \(5,\).*\(4, 6\)"),
    (lambda: F.rms_norm(X, (5,)), ValueError, r"rms_norm.*normalized_shape \(5,\).*\(4, 6\)"),
    (lambda: F.layer_norm(X, (2, 4, 6)), ValueError, r"normalized_shape \(2, 4, 6\)"),
    (lambda: F.layer_norm(X, ()), ValueError, "at least one dimension"),
    (lambda: F.layer_norm(X, 6), TypeError, "sequence of ints, got 6"),
    (lambda: F.layer_norm(X, (6.0,), W[:5]), (TypeError, ValueError), "normalized_shape|weight"),
    (lambda: F.layer_norm(X, (6,), W[:5]), ValueError, r"weight must have shape \(6,\).*\(5,\)"),
    (lambda: F.layer_norm(X, (4, 6), W), ValueError, r"weight must have shape \(4, 6\)"),
    (lambda: F.layer_norm(X, (6,), W, W[None]), ValueError, r"bias must have shape \(6,\)"),
    (lambda: F.layer_norm(X, (6,), W.double()), TypeError, "weight must be.*float32.*float64"),
    (lambda: F.layer_norm(X, (6,), W, eps="1"), TypeError, "eps must be a number, got '1'"),
    (lambda: F.layer_norm(X, (6,), residual=X[:3]), ValueError, "residual must have the shape"),
    (lambda: F.layer_norm(X, (6,), residual=3.0), TypeError, "residual must be a tensor"),
    (lambda: F.layer_norm(X, (6,), residual=X.long()), TypeError, "residual must be floating"),
    (lambda: F.layer_norm(X, (6,), dropout_p=1.5), ValueError, "between 0 and 1, got 1.5"),
    (lambda: F.layer_norm(X, (6,), dropout_p="x"), TypeError, "dropout_p must be a number"),
    (lambda: F.rms_norm(X, (6,), W, None, residual=X[:3]), ValueError, "rms_norm: residual"),
    (lambda: ops.layer_norm_train(X, W, None, None, None, 6, 1e-5, 0.5, False), ValueError, "seed"),
    (lambda: ops.layer_norm_train(X, W, None, None, W, 6, 1e-5, 0.5, False), TypeError, "int64"),
    (lambda: ops.layer_norm_op(X, W, W, None, 6, 1e-5, True), ValueError, "bias must be None"),
    (lambda: ops.layer_norm_backward(X, None, X, W, W[None], 6, 7), ValueError, "stats must have"),
    (lambda: ops.layer_norm_backward(X[:3], None, X, W, STATS, 6, 7), ValueError, "grad"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
