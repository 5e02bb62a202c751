"""What pooling refuses: errors that name the operation, the argument, what was expected and got."""

from __future__ import annotations

import pytest
import torch

from nnarch import functional as F
from nnarch.kernels.pooling import op

X = torch.randn(1, 2, 6, 7)
P = torch.zeros(1, 2, 3, 3, dtype=torch.int64)
G = torch.randn(1, 2, 3, 3)
BAD = [
    (lambda: F.max_pool2d(X[0, 0], 2), ValueError, r"must be \[C, H, W\].*got shape \(6, 7\)"),
    (lambda: F.max_pool2d(X[:, :0], 2), ValueError, r"no size but N being 0, got shape \(1, 0,"),
    (lambda: F.avg_pool2d(X[..., :0], 2), ValueError, r"avg_pool2d: input must.*\(1, 2, 6, 0\)"),
    (lambda: F.max_pool2d(X.long(), 2), TypeError, "input must be floating point, got torch.int64"),
    (lambda: F.avg_pool2d([1.0], 2), TypeError, "avg_pool2d: input must be a tensor.*got list"),
    (lambda: F.max_pool2d(X, 2.5), TypeError, "kernel_size must be an int or a pair.*got 2.5"),
    (lambda: F.max_pool2d(X, (2, 2, 2)), TypeError, r"kernel_size must be.*got \(2, 2, 2\)"),
    (lambda: F.max_pool2d(X, 2, "2"), TypeError, "stride must be an int or a pair.*got '2'"),
    (lambda: F.max_pool2d(X, 2, 0), ValueError, r"stride must be at least 1.*got \(0, 0\)"),
    (lambda: F.max_pool2d(X, -1), ValueError, r"kernel_size must be at least 1.*got \(-1, -1\)"),
    (lambda: F.max_pool2d(X, 2, 2, 0, 0), ValueError, r"dilation must be at least 1.*\(0, 0\)"),
    (lambda: F.max_pool2d(X, 2, 2, (0, 2)), ValueError, r"padding must be at most half.*\(0, 2\)"),
    (lambda: F.avg_pool2d(X, 2, 2, -1), ValueError, r"padding must be at least 0.*\(-1, -1\)"),
    (lambda: F.max_pool2d(X, (7, 1)), ValueError, r"input of \(6, 7\) is too small for kernel"),
    (lambda: F.max_pool2d(X, 3, 1, 0, 4), ValueError, r"too small for kernel_size.*dilation"),
    (lambda: F.max_pool2d(X, 2**40, 1, 2**39), ValueError, r"kernel_size must be.*below 2\*\*31"),
    (lambda: F.max_pool2d(X, 2, 2**31), ValueError, r"stride must be.*below 2\*\*31"),
    (lambda: F.avg_pool2d(X, 2, divisor_override=0), ValueError, "divisor_override must.*got 0"),
    (lambda: F.avg_pool2d(X, 2, divisor_override=1.5), TypeError, "divisor_override must.*got 1.5"),
    (lambda: F.adaptive_avg_pool2d(X, -1), ValueError, r"output_size must not be negative.*\(-1"),
    (lambda: F.adaptive_avg_pool2d(X, (1, 2, 3)), TypeError, r"output_size must be.*\(1, 2, 3\)"),
    (lambda: F.adaptive_max_pool2d(X, "1"), TypeError, "output_size must be an int or a pair"),
    (lambda: F.adaptive_max_pool2d(X[0, 0], None), ValueError, "adaptive_max_pool2d: input must"),
    (lambda: F.adaptive_avg_pool2d(None, None), TypeError, "DLPack, got NoneType"),
    (lambda: op.max_pool2d_input_grad(G, P.int(), X.shape), TypeError, "indices must be.*int64"),
    (lambda: op.max_pool2d_input_grad(G, P[..., :2], X.shape), ValueError, "the shape of grad"),
    (lambda: op.max_pool2d_input_grad(G, P + 42, X.shape), ValueError, r"lie in.*got 42 to 42"),
    (lambda: op.max_pool2d_input_grad(G, P - 2, X.shape), ValueError, "lie in.*got -2 to -2"),
    (lambda: op.max_pool2d_input_grad(G, P, (1, 3, 6, 7)), ValueError, "input_size must be"),
    (lambda: op.max_pool2d_gather(X, P + 42), ValueError, "max_pool2d_gather: indices must lie"),
    (lambda: op.max_pool2d_gather(X, P[:, :1]), ValueError, "max_pool2d_gather: indices must be"),
    (lambda: op.avg_pool2d_input_grad(G, X.shape, (3, 3), (1, 1), (0, 0), False, True, None),
     ValueError, r"grad must have height and width \(4, 5\)"),
    (lambda: op.adaptive_avg_pool2d_input_grad(G, (1, 2, 0, 3)), ValueError, "must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
