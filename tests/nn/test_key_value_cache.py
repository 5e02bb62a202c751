"""Caches of keys and values: what comes out token by token is what comes out at once."""

from __future__ import annotations

import pytest
import torch

import nnarch.nn as nn

E, H, B, T, S = 12, 3, 2, 7, 4


def decoder(layers=2, **options):
    layer = nn.TransformerDecoderLayer(E, H, 20, 0.1, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    norm = nn.LayerNorm(E) if options.get("norm_first") else None
    return nn.TransformerDecoder(layer, layers, norm).eval()


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("capacity", [None, T])
@torch.no_grad()
def test_a_decoder_writes_the_same_with_a_cache(norm_first, batch_first, capacity):
    model = decoder(norm_first=norm_first, batch_first=batch_first)
    x, memory = torch.randn(B, T, E), torch.randn(B, S, E)
    padding = torch.tensor([[False] * S, [False, False, True, True]])
    dim = 1 if batch_first else 0
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    options = {"memory_key_padding_mask": padding, "tgt_is_causal": True}
    expected = model(x, memory, **options)
    cache, written = nn.DecoderCache(2, capacity), []
    for i, piece in enumerate(x.split([3, 1, 1, 2], dim)):
        written.append(model(piece, memory if i == 0 else None, cache=cache, **options))
    assert cache.length == T
    torch.testing.assert_close(torch.cat(written, dim), expected)


@torch.no_grad()
def test_beams_are_reordered():
    model = decoder(batch_first=True)
    x, memory = torch.randn(3, 5, E), torch.randn(3, S, E)
    rows = torch.tensor([2, 0, 0, 1])
    cache = nn.DecoderCache(2)
    model(x[:, :4], memory, tgt_is_causal=True, cache=cache)
    cache.reorder(rows)
    found = model(x[rows][:, 4:], None, tgt_is_causal=True, cache=cache)
    expected = model(x[rows], memory[rows], tgt_is_causal=True)[:, 4:]
    torch.testing.assert_close(found, expected)
    assert [layer.target.length for layer in cache.layers] == [5, 5]


@torch.no_grad()
def test_masks_count_the_stored_keys():
    module = nn.MultiheadAttention(E, H, batch_first=True).eval()
    x = torch.randn(B, T, E)
    mask, padding = torch.rand(T, T) < 0.3, torch.rand(B, T) < 0.3
    mask[:, 0] = padding[:, 0] = False
    mask |= torch.ones(T, T, dtype=torch.bool).triu(1)
    expected, weights = module(x, x, x, attn_mask=mask, key_padding_mask=padding)
    cache = nn.StaticCache(10)
    first, second = x[:, :4], x[:, 4:]
    module(first, first, first, cache=cache)
    found, found_weights = module(
        second, second, second, attn_mask=mask[4:], key_padding_mask=padding, cache=cache
    )
    torch.testing.assert_close(found, expected[:, 4:])
    torch.testing.assert_close(found_weights, weights[:, 4:])


def test_growth():
    cache = nn.GrowingCache()
    whole = torch.randn(B, H, 300, 5)
    for piece in whole.split(37, 2):
        key, value = cache.append(piece, 2 * piece)
    assert torch.equal(key, whole) and torch.equal(value, 2 * whole)
    assert repr(cache) == "GrowingCache(length=300)"
    held = cache._key.shape[2]
    assert 300 <= held <= 600


def test_a_static_cache_does_not_move():
    cache = nn.StaticCache(6)
    key, _ = cache.append(torch.randn(B, H, 4, 5), torch.randn(B, H, 4, 5))
    later, _ = cache.append(torch.randn(B, H, 2, 5), torch.randn(B, H, 2, 5))
    assert key.data_ptr() == later.data_ptr()
    with pytest.raises(ValueError, match="7 tokens do not fit into a capacity of 6"):
        cache.append(torch.randn(B, H, 1, 5), torch.randn(B, H, 1, 5))
    assert cache.length == 6


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        nn.StaticCache(0)
    cache = nn.GrowingCache()
    x = torch.randn(B, H, 2, 5)
    cache.append(x, x)
    with pytest.raises(ValueError, match=r"key must be \[2, 3, length, 5\]"):
        cache.append(x[:1], x[:1])
    with pytest.raises(ValueError, match="value must be torch"):
        cache.append(x, x.double())
    with pytest.raises(ValueError, match="equally long"):
        cache.append(x, x[:, :, :1])
    with pytest.raises(RuntimeError, match="caches are for inference"):
        cache.append(x.clone().requires_grad_(), x)
    assert cache.length == 2
    module = nn.MultiheadAttention(E, H, add_zero_attn=True)
    y = torch.randn(2, B, E)
    with torch.no_grad(), pytest.raises(ValueError, match="neither add_bias_kv nor add_zero_attn"):
        module(y, y, y, cache=nn.GrowingCache())
    with pytest.raises(ValueError, match="cache must be for 2 layers, got 3"):
        decoder()(y, y, cache=nn.DecoderCache(3))


def test_a_call_that_fails_leaves_the_cache():
    layer = nn.TransformerDecoderLayer(E, H, 16, 0.0, batch_first=True).eval()
    x, cache = torch.randn(B, 5, E), nn.LayerCache()
    with torch.no_grad():
        layer(x, x, cache=cache)
        with pytest.raises(ValueError, match="attn_mask must have shape"):
            layer(x[:, :1], None, memory_mask=torch.zeros(1, 99), cache=cache)
        assert cache.target.length == 5
        y = layer(x[:, :1], None, cache=cache)
        again = nn.LayerCache()
        layer(x, x, cache=again)
        torch.testing.assert_close(y, layer(x[:, :1], None, cache=again))
