"""Losses of logits so large that a sum of two of them loses what they differ by."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import name_of
from torch.nn import functional as TF

from nnarch import functional as F


@pytest.mark.parametrize("classes", [4, 200])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_large_logits(dtype, reduction, classes):
    """A sample whose logits are all masked has log(classes) as its loss, whatever hides them."""
    high = torch.tensor([1e17] * 2 + [0.0] * (classes - 2), dtype=dtype)
    rows = [torch.full((classes,), v, dtype=dtype) for v in (-3.4e38, 1e12, 1e5, -7.0)]
    x, target = torch.stack([*rows, high]), torch.tensor([1, 0, 2, 3, 1])
    options = {"reduction": reduction, "label_smoothing": 0.0}
    for layout in (x, x.t().contiguous().t()):
        ours, exact = layout.clone().requires_grad_(), layout.double().requires_grad_()
        loss = F.cross_entropy(ours, target, **options)
        expected = TF.cross_entropy(exact, target, **options)
        loss.sum().backward()
        expected.sum().backward()
        ulp = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(loss.double(), expected, rtol=ulp, atol=0)
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=ulp, atol=ulp / classes)


def test_large_logits_of_a_product():
    """The same where the logits are made on the way."""
    x, weight = torch.zeros(3, 2), torch.zeros(6, 2)
    bias = torch.full((6,), -1e30).requires_grad_()
    loss = F.linear_cross_entropy(x, weight, torch.tensor([0, 2, 5]), linear_bias=bias)
    loss.backward()
    torch.testing.assert_close(loss, torch.tensor(6.0).log())
    hits = torch.tensor([1, 0, 1, 0, 0, 1]) / 3
    torch.testing.assert_close(bias.grad, torch.full((6,), 1 / 6) - hits)
