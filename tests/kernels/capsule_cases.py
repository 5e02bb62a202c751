"""Capsules to route, and the routing as people write it."""

from __future__ import annotations

import torch
from test_squash import plain_squash
from torch import Tensor

from nnarch import functional as F


def capsules(b: int, i: int, k: int, o: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; votes of about length one, so that the routing has something to do."""
    return (
        torch.randn(b, i, k),
        torch.randn(o, i, d, k) * max(1, k) ** -0.5,
        torch.randn(o, d) * 0.3,
    )


def plain_routing(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, iterations=3, detach=False
):
    """Routing as people write it: votes by einsum, a loop over the iterations."""
    votes = torch.einsum("oidk,bik->boid", weight, x)
    fixed = votes.detach() if detach else votes
    logits = votes.new_zeros(votes.shape[:3])
    v = votes.new_zeros(())
    for n in range(iterations):
        c = logits.softmax(1).unsqueeze(-1)
        c = c.detach() if detach else c
        s = (c * (votes if n == iterations - 1 else fixed)).sum(2)
        v = plain_squash(s if bias is None else s + bias)
        logits = logits + (fixed * v.unsqueeze(2)).sum(-1)
    return v


def our_routing(**options):
    return lambda x, weight, bias=None: F.capsule_routing(x, weight, bias=bias, **options)
