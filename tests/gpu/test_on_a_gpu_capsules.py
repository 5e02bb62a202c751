"""On a real GPU: squash and capsule routing, against the papers' equations in plain torch."""

import pytest
import torch
from on_a_gpu import DEVICE, MARKS, by_dtype, check

from nnarch import functional as F
from nnarch import nn

pytestmark = MARKS


def squash(x, dim=-1):
    length = x.square().sum(dim, keepdim=True)
    return x * length.sqrt() / (1 + length)


def routing(x, weight, iterations=3, bias=None, detach=False):
    """Sabour et al., 2017, procedure 1."""
    votes = torch.einsum("oidk,bik->boid", weight, x)
    logits = torch.zeros_like(votes[..., 0])
    for i in range(iterations):
        c = logits.softmax(1)
        s = torch.einsum("boi,boid->bod", c.detach() if detach else c, votes)
        v = squash(s if bias is None else s + bias)
        if i + 1 < iterations:
            told = votes.detach() if detach else votes
            logits = logits + torch.einsum("boid,bod->boi", told, v.detach() if detach else v)
    return v


def capsules(b=3, i=150, k=8, o=10, d=16):
    return torch.randn(b, i, k) / 2, torch.randn(o, i, d, k) / 12


@pytest.mark.parametrize("dim", [-1, 1])
@by_dtype
def test_squash(dim, dtype):
    check(
        lambda x: F.squash(x, dim), lambda x: squash(x, dim), [torch.randn(3, 7, 5, 9)], dtype,
        factor=4, ulps=8,
    )  # fmt: skip


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("detach", [False, True], ids=["", "detached"])
@by_dtype
def test_routing(detach, bias, dtype):
    def mine(x, w, *b):
        return F.capsule_routing(x, w, bias=b[0] if b else None, detach_routing=detach)

    def plain(x, w, *b):
        return routing(x, w, bias=b[0] if b else None, detach=detach)

    tensors = [*capsules(), *([torch.randn(10, 16) / 4] if bias else [])]
    check(mine, plain, tensors, dtype, factor=4, ulps=16)


def test_routing_of_sizes_that_are_no_powers_of_two():
    x, weight = capsules(2, 41, 5, 3, 7)
    check(F.capsule_routing, routing, [x, weight], torch.float32, factor=4, ulps=16)


@by_dtype
def test_convolutional_capsules(dtype):
    module = nn.ConvCapsules2d(4, 6, 5, 8, 3, stride=2, padding=1, bias=True)

    class Plain(nn.ConvCapsules2d):
        def forward(self, x):
            n, i, k, h, w = x.shape
            windows = torch.nn.functional.unfold(x.flatten(1, 2), 3, padding=1, stride=2)
            # [N, I·K·9, P] to [N·P, I·9, K], the kernel's places behind the capsules
            windows = windows.view(n, i, k, 9, -1).permute(0, 4, 1, 3, 2)
            weight = self.weight.flatten(1, 3)
            v = routing(windows.reshape(-1, i * 9, k), weight, bias=self.bias)
            v = v.view(n, -1, *v.shape[1:]).permute(0, 2, 3, 1)
            return v.reshape(*v.shape[:3], (h + 1) // 2, (w + 1) // 2)

    twin = Plain(4, 6, 5, 8, 3, stride=2, padding=1, bias=True)
    check(module, twin, [torch.randn(2, 4, 6, 9, 7) / 2], dtype, factor=4, ulps=16)


def test_two_runs_are_bitwise_equal():
    leaves = [t.to(DEVICE).requires_grad_() for t in capsules(5, 1152)]
    runs = []
    for _ in range(2):
        y = F.capsule_routing(*leaves)
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
