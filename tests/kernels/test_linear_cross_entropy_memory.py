"""The memory that linear_cross_entropy takes: less than its logits."""

from __future__ import annotations

import pytest
import torch
from alone import alone, measures_memory, peak
from torch import Tensor

from nnarch import functional as F


def _fused(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.linear_cross_entropy(x, weight, target, reduction=reduction)


def _plain(x: Tensor, weight: Tensor, target: Tensor, reduction: str) -> Tensor:
    return torch.nn.functional.cross_entropy(x @ weight.t(), target, reduction=reduction)


def _growth(loss, reduction: str) -> int:
    """Bytes by which the peak of memory grows in a step; its logits would be 412 MB."""
    n, d, v = 2048, 32, 50257
    x, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    target = torch.randint(0, v, (n,))
    loss(x[:8], weight, target[:8], reduction).sum().backward()  # loads what is loaded once
    before = peak()
    loss(x, weight, target, reduction).sum().backward()
    return peak() - before


@measures_memory
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_logits_in_memory(reduction):
    """2048 samples and 50257 classes, forward and backward, in a quarter of the logits' memory."""
    assert alone(_growth, _fused, reduction) < 100e6


@measures_memory
def test_the_measurement_sees_logits():
    assert alone(_growth, _plain, "mean") > 400e6
