"""On a real GPU: attention, against torch's on the same GPU."""

import math

import pytest
import torch
from on_a_gpu import BACKEND, DEVICE, MARKS, assert_ran, by_dtype, check

import nnarch
from nnarch import functional as F
from nnarch import nn
from nnarch.kernels.attention.op import attention_op

pytestmark = MARKS


def dense(q, k, v, mask=None, causal=False, window=None, lengths=None, gqa=False):
    """Attention spelled out; a row that sees nothing gives zeros, as torch.nn has no one way to."""
    if gqa:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    rows, keys = q.shape[-2], k.shape[-2]
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    i, j = torch.arange(rows, device=q.device)[:, None], torch.arange(keys, device=q.device)
    seen = torch.ones(rows, keys, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen & (j <= i)
    if window is not None:
        seen = seen & (j >= i - window[0]) & (j <= i + window[1])
    if lengths is not None:
        seen = seen & (j < lengths[:, None, None, None])
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.where(seen.any(-1, keepdim=True), weights, 0).to(v.dtype) @ v


def inputs(b=2, heads=3, rows=65, keys=77, depth=40, groups=None, wide=None):
    groups = groups or heads
    return (
        torch.randn(b, heads, rows, depth),
        torch.randn(b, groups, keys, depth),
        torch.randn(b, groups, keys, wide or depth),
    )


ours = F.scaled_dot_product_attention


@by_dtype
def test_plain(dtype):
    check(ours, torch.nn.functional.scaled_dot_product_attention, inputs(), dtype, ulps=8)


@by_dtype
def test_causal_of_64_wide_heads(dtype):
    tensors = inputs(rows=130, keys=130, depth=64)

    def torchs(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    check(lambda *t: ours(*t, is_causal=True), torchs, tensors, dtype, ulps=8)


@by_dtype
def test_bool_mask_with_rows_that_see_nothing(dtype):
    mask = torch.rand(2, 1, 65, 77) < 0.5
    mask[:, :, [0, 33, 64]] = False
    check(lambda q, k, v, m: ours(q, k, v, m), dense, (*inputs(), mask), dtype, factor=4, ulps=16)
    q, k, v = (t.to(DEVICE, dtype) for t in inputs())
    assert (ours(q, k, v, mask.to(DEVICE))[:, :, [0, 33, 64]] == 0).all()


@by_dtype
def test_additive_mask_and_its_gradient(dtype):
    tensors = (*inputs(), torch.randn(3, 65, 77))
    check(lambda q, k, v, m: ours(q, k, v, m), dense, tensors, dtype, factor=4, ulps=16)


@by_dtype
def test_groups_window_lengths_and_an_unequal_value(dtype):
    tensors = (*inputs(heads=6, groups=2, depth=32, wide=48), torch.tensor([77, 50]))

    def mine(q, k, v, lengths):
        return ours(q, k, v, enable_gqa=True, window=(20, 30), key_lengths=lengths)

    def torchs(q, k, v, lengths):
        return dense(q, k, v, window=(20, 30), lengths=lengths, gqa=True)

    check(mine, torchs, tensors, dtype, factor=4, ulps=16)


@pytest.mark.parametrize("rows, keys", [(1, 1500), (3, 93)])
@by_dtype
def test_decoding(rows, keys, dtype):
    """Few queries on many keys, which are cut into parts, and heads that share a key."""
    tensors = inputs(2, 8, rows, keys, 64, groups=2)

    def mine(q, k, v):
        return ours(q, k, v, is_causal=True, query_offset=keys - rows, enable_gqa=True)

    def torchs(q, k, v):
        mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril(keys - rows)
        return dense(q, k, v, mask, gqa=True)

    check(mine, torchs, tensors, dtype, gradients=False, factor=4, ulps=8)


@by_dtype
def test_views_of_one_packed_tensor(dtype):
    """[B, L, 3, heads, D] as a projection leaves it: strided inputs, and strided gradients."""

    def split(function):
        def run(qkv):
            q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
            return function(q, k, v, is_causal=True).transpose(1, 2)

        return run

    torchs = split(torch.nn.functional.scaled_dot_product_attention)
    check(split(ours), torchs, [torch.randn(2, 70, 3, 4, 32)], dtype, ulps=8)


def test_the_widest_heads():
    tensors = inputs(1, 2, 33, 40, 256)
    check(ours, torch.nn.functional.scaled_dot_product_attention, tensors, torch.float16, ulps=8)


@by_dtype
def test_dropout_drops_what_the_cpu_drops(dtype):
    """A seed decides: values of one give every row the sum of its kept weights."""
    q, k, _ = inputs(keys=75)
    tensors = [t.to(dtype) for t in (0 * q, 0 * k, torch.eye(75).expand(2, 3, 75, 75))]
    found = []
    for device in ("cpu", DEVICE):
        seed = torch.tensor([12345678901234567], device=device)
        on = [t.to(device) for t in tensors]
        with nnarch.trace() as record:
            y, _ = attention_op(*on, None, None, seed, 0.3, 1.0, -(2**62), 2**62)
        found.append(y.cpu())
    assert_ran(record)
    assert torch.equal(found[0] == 0, found[1] == 0)
    assert 0.25 < (found[0] == 0).double().mean() < 0.35
    torch.testing.assert_close(found[0], found[1])


@by_dtype
def test_dropouts_gradient_is_that_of_its_mask(dtype):
    """With the weights' mask read out of the operation, torch's dense form has to agree."""
    q, k, v = inputs(rows=33, keys=50, depth=32)
    seed = torch.tensor([987654321])
    band = (0.25, 32**-0.5, -(2**62), 2**62)
    eye = torch.eye(50).expand(2, 3, 50, 50)
    kept = attention_op(0 * q, 0 * k, eye, None, None, seed, *band)[0] != 0

    def mine(q, k, v):
        return attention_op(q, k, v, None, None, seed.to(q.device), *band)[0]

    def torchs(q, k, v):
        weights = (q @ k.transpose(-1, -2) * 32**-0.5).softmax(-1)
        return (weights * kept.to(q.device) / 0.75).to(v.dtype) @ v

    check(mine, torchs, (q, k, v), dtype, factor=4, ulps=16)


def test_two_runs_are_bitwise_equal():
    tensors = [t.to(DEVICE, torch.float16).requires_grad_() for t in inputs(rows=300, keys=300)]
    runs = []
    for _ in range(2):
        y = ours(*tensors, is_causal=True)
        runs.append([y, *torch.autograd.grad(y.float().square().sum(), tensors)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


ATTENTIONS = {
    "self": {},
    "sizes of key and value": {"kdim": 24, "vdim": 40},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True, "bias": False},
}


@pytest.mark.parametrize("kind", ATTENTIONS)
@by_dtype
def test_multihead_attention(kind, dtype):
    options = {"batch_first": True, **ATTENTIONS[kind]}
    twin = torch.nn.MultiheadAttention(48, 4, **options)
    module = nn.MultiheadAttention(48, 4, **options)
    keys = [torch.randn(2, 21, options.get(n, 48)) for n in ("kdim", "vdim")]
    x, hidden = torch.randn(2, 21, 48), torch.arange(21) >= torch.tensor([[21], [15]])
    if kind == "self":

        def call(m, x):
            return m(x, x, x, key_padding_mask=hidden.to(x.device), need_weights=True)

        tensors = [x]
    else:

        def call(m, *t):
            return m(*t, key_padding_mask=hidden.to(t[0].device), need_weights=False)[0]

        tensors = [x, *keys]
    check(module, twin, tensors, dtype, call=call, factor=4, ulps=16)


def test_the_backend_is_named():
    with nnarch.trace() as record:
        ours(*(t.to(DEVICE) for t in inputs()))
    assert [(e.op, e.backend) for e in record] == [("attention", BACKEND)]
