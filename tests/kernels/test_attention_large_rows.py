"""Rows that a mask's large number hides whole: all their weights are the same. A log-sum-exp of one
number has lost the logarithm of the sum."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import check_under_isa

from nnarch import functional as F
from nnarch import nn

SHAPES = {  # B, H, G, L, S, D
    "tiles": (2, 4, 4, 130, 200, 24),
    "few queries": (2, 4, 2, 2, 70, 16),
    "one key": (1, 2, 2, 3, 1, 8),
    "shared heads": (1, 6, 2, 9, 67, 130),
}
HIDDEN = {torch.float32: (-3.4028234663852886e38, -1e12), torch.float64: (-1e300, -1e25)}


def _plain(q, k, v, mask, low=None):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + mask
    if low is not None:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        scores = scores.masked_fill(j > i + low, float("-inf"))
    weights = scores.softmax(-1)
    return weights @ v, weights


def _problem(shape, dtype, hidden):
    b, h, g, n, s, d = SHAPES[shape]
    torch.manual_seed(0)
    tensors = [torch.randn(b, *x, d, dtype=dtype) for x in ((h, n), (g, s), (g, s))]
    mask = torch.randn(b, 1, n, s, dtype=dtype)
    mask[:, :, ::2] = hidden  # whole rows
    mask[:, :, 1, s // 2 :] = hidden
    return [t.requires_grad_() for t in (*tensors, mask)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", HIDDEN, ids=str)
def test_gradients_and_weights(dtype, shape):
    tolerance = 2e-5 if dtype == torch.float32 else 1e-8
    for hidden in HIDDEN[dtype]:
        leaves = _problem(shape, dtype, hidden)
        q, k, v, mask = leaves
        out, lse = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, return_lse=True)
        weights = F.attention_weights(q, k, lse, mask)
        expected = _plain(*leaves)
        grads = [torch.randn_like(t) for t in (out, weights)]
        for mine, theirs in (
            ((out, weights), expected),
            (
                torch.autograd.grad((out,), leaves, grads[0], retain_graph=True),
                torch.autograd.grad(expected[:1], leaves, grads[0], retain_graph=True),
            ),
            (
                torch.autograd.grad((weights,), (q, k), grads[1]),
                torch.autograd.grad(expected[1:], (q, k), grads[1]),
            ),
        ):
            for a, b in zip(mine, theirs, strict=True):
                assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def test_causal():
    leaves = _problem("tiles", torch.float32, -1e12)
    out = F.scaled_dot_product_attention(*leaves[:3], leaves[3], is_causal=True)
    expected, _ = _plain(*leaves, low=0)
    grad = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
        strict=True,
    ):
        assert float((a - b).abs().max()) <= 2e-5 * float(b.abs().max())


def test_multihead_attention_gives_weights_that_add_up_to_one():
    torch.manual_seed(0)
    ours, theirs = nn.MultiheadAttention(16, 4), torch.nn.MultiheadAttention(16, 4)
    ours.load_state_dict(theirs.state_dict())
    x, mask = torch.randn(7, 2, 16), torch.zeros(7, 7)
    mask[2] = torch.finfo(torch.float32).min
    for average in (False, True):
        mine, wanted = (
            module(x, x, x, attn_mask=mask, average_attn_weights=average)
            for module in (ours, theirs)
        )
        for a, b in zip(mine, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _all_shapes():
    test_causal()
    for dtype in HIDDEN:
        for shape in SHAPES:
            test_gradients_and_weights(dtype, shape)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, _all_shapes)
