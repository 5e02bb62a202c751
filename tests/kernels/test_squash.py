"""Squash of capsules against plain torch in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, VIEWS, compare, name_of
from torch import Tensor
from torch.autograd import gradcheck

from nnarch import functional as F
from nnarch.kernels.capsule_routing.op import squash_grad

SAMPLES = {
    "squash": lambda: [(torch.randn(3, 5, 8), -1), (torch.randn(2, 4, 3, 5), 1)],
    "squash_grad": lambda: [
        (torch.randn(3, 5, 8), torch.randn(3, 5, 8), -1),
        (torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5), 1),
    ],
}


def plain_squash(s: Tensor, dim: int = -1) -> Tensor:
    energy = (s * s).sum(dim, keepdim=True)
    return s * (energy.sqrt() / (1 + energy))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((4, 9, 8), -1), ((3, 50, 7), 1), ((5,), 0), ((2, 3, 4, 35), 2), ((7, 70), 1), ((2, 5, 1), 1)],
    ids=str,
)
def test_squash(shape, dim, dtype):
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    ulps = 64 if dtype == torch.float64 else 8
    compare(lambda x: F.squash(x, dim), lambda x: plain_squash(x, dim), {"x": x}, grad, ulps=ulps)
    assert F.squash(torch.zeros(shape, dtype=dtype), dim).eq(0).all()


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1])
def test_squash_of_channels_last(dim):
    x = torch.randn(2, 12, 5, 7).contiguous(memory_format=torch.channels_last)
    y = compare(
        lambda x: F.squash(x, dim),
        lambda x: plain_squash(x, dim),
        {"x": x},
        torch.randn(x.shape),
        ulps=8,
    )
    assert y.stride() == x.stride()


@pytest.mark.parametrize("view", VIEWS)
def test_squash_of_views(view):
    x, grad = VIEWS[view](torch.randn(3, 6, 9)), VIEWS[view](torch.randn(3, 6, 9))
    for dim in (1, 2):
        compare(
            lambda x, d=dim: F.squash(x, d),
            lambda x, d=dim: plain_squash(x, d),
            {"x": x},
            grad,
            ulps=8,
        )


@pytest.mark.parametrize("inner", [1, 3])
def test_squash_is_safe_at_zero(inner):
    x = torch.zeros(4, 8, inner)
    x[1] = torch.randn(8, inner)
    x.requires_grad_()
    y = F.squash(x, 1)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert bool((dx[[0, 2, 3]] == 0).all())
    assert bool(dx.isfinite().all())
    assert bool((y.norm(dim=1) < 1).all())


@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("scale", [1e-12, 1e9, 1e17])
def test_the_gradient_of_long_vectors(scale, inner):
    x = torch.randn(4, 8, inner) * scale
    compare(lambda x: F.squash(x, 1), lambda x: plain_squash(x, 1), {"x": x}, torch.randn_like(x))


def test_squash_gradcheck():
    for shape, dim in (((3, 4, 5), -1), ((2, 5, 3), 1)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x, dim=dim: F.squash(x, dim), x)


X = torch.randn(2, 9, 5)
BAD = [
    (lambda: F.squash(X, 3), ValueError, "dim must be one of the 3 dimensions.*got 3"),
    (lambda: F.squash(X, "a"), TypeError, "dim must be an int, got 'a'"),
    (lambda: F.squash(X.int()), TypeError, "x must be floating.*int32"),
    (lambda: squash_grad(X[:1], X, 1), ValueError, r"grad must have the shape.*got \(1, 9, 5\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
