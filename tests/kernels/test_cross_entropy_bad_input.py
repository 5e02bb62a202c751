"""What cross_entropy and linear_cross_entropy refuse."""

from __future__ import annotations

import pytest
import torch

from nnarch import functional as F

INF = float("inf")
X, T = torch.ones(3, 5), torch.zeros(3, dtype=torch.int64)
BAD = [
    (ValueError, r"cross_entropy: target must be a class from 0 to 4 .*got 5", (X, T + 5), {}),
    (ValueError, r"cross_entropy: target must be a class .*got -1", (X, T - 1), {}),
    (ValueError, r"target must have the shape \(3,\) .*got \(2,\)", (X, T[:2]), {}),
    (ValueError, r"target must have the shape \(3, 5\)", (X, X[:, :4]), {}),
    (TypeError, "cross_entropy: target must be integers, got torch.bool", (X, T.bool()), {}),
    (TypeError, "cross_entropy: target must be a tensor, got list", (X, [0, 0, 0]), {}),
    (TypeError, "cross_entropy: input must be floating", (X.int(), T), {}),
    (ValueError, "cross_entropy: input must be .*scalar", (torch.tensor(1.0), T), {}),
    (ValueError, r"cross_entropy: x must be .*classes, got \(3, 0\)", (X[:, :0], T), {}),
    (ValueError, r"class_weight must have the shape \(5,\)", (X, T, torch.ones(4)), {}),
    (TypeError, "cross_entropy: weight must be a tensor", (X, T, [1.0]), {}),
    (ValueError, "cross_entropy: reduction .*'avg'", (X, T), {"reduction": "avg"}),
    (ValueError, "cross_entropy: label_smoothing .*1.5", (X, T), {"label_smoothing": 1.5}),
    (ValueError, "cross_entropy: z_loss .*inf", (X, T), {"z_loss": INF}),
    (TypeError, "cross_entropy: ignore_index must be an int", (X, T), {"ignore_index": 1.5}),
    (ValueError, "cross_entropy: target must be on cpu", (X, T.to("meta")), {}),
]


@pytest.mark.parametrize("error, message, args, options", BAD, ids=[b[1][:40] for b in BAD])
def test_bad_input(error, message, args, options):
    with pytest.raises(error, match=message):
        F.cross_entropy(*args, **options)


def test_a_weight_has_no_gradient():
    with pytest.raises(NotImplementedError, match="cross_entropy: weight has no gradient"):
        F.cross_entropy(X, T, torch.ones(5, requires_grad=True))


ROWS, W = torch.ones(3, 4), torch.ones(5, 4)
OP = "linear_cross_entropy: "
BAD_LINEAR = [
    (ValueError, OP + "target must be a class from 0 to 4 .*got 5", (ROWS, W, T + 5), {}),
    (ValueError, OP + r"x must be \[..., D\] and target", (ROWS, W, T[:2]), {}),
    (TypeError, OP + "target must be a tensor, got list", (ROWS, W, [0]), {}),
    (ValueError, OP + r"the last size of x \(4\)", (ROWS, W[:, :3], T), {}),
    (ValueError, OP + r"x must be \[samples, D\] and weight \[V, D\]", (ROWS, W[0], T), {}),
    (ValueError, OP + "weight must have classes", (ROWS, W[:0], T), {}),
    (TypeError, OP + "weight must be torch.float32 as x", (ROWS, W.double(), T), {}),
    (TypeError, OP + "x must be floating point", (ROWS.int(), W, T), {}),
    (
        ValueError,
        OP + r"bias must have the shape \(5,\)",
        (ROWS, W, T),
        {"linear_bias": torch.ones(4)},
    ),
    (TypeError, OP + "bias must be a tensor", (ROWS, W, T), {"linear_bias": 1.0}),
    (ValueError, OP + "class_weight", (ROWS, W, T), {"weight": torch.ones(4)}),
    (ValueError, OP + "reduction .*None", (ROWS, W, T), {"reduction": None}),
    (ValueError, OP + "label_smoothing .*-0.1", (ROWS, W, T), {"label_smoothing": -0.1}),
    (TypeError, OP + "ignore_index", (ROWS, W, T), {"ignore_index": "none"}),
    (ValueError, OP + "weight must be on cpu", (ROWS, W.to("meta"), T), {}),
]


@pytest.mark.parametrize(
    "error, message, args, options", BAD_LINEAR, ids=[b[1][22:60] for b in BAD_LINEAR]
)
def test_bad_input_of_the_linear_form(error, message, args, options):
    with pytest.raises(error, match=message):
        F.linear_cross_entropy(*args, **options)


def test_a_missing_gradient_is_refused():
    """The public function always asks for what is needed."""
    x, weight = ROWS.clone().requires_grad_(), W.clone().requires_grad_()
    numbers = (-100, 0.0, 0.0, 1)
    loss = torch.ops.nnarch.linear_cross_entropy(x, weight, None, T, None, *numbers, 1)[0]
    with pytest.raises(NotImplementedError, match="not prepared"):
        loss.backward()
