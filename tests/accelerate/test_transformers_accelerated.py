"""Transformers of torch in accelerated models."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nnarch
import nnarch.nn


class Classifier(nn.Module):
    """Tokens to one of four classes."""

    def __init__(self, norm_first=False, activation="relu"):
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        layer = nn.TransformerEncoderLayer(
            24, 4, 48, batch_first=True, norm_first=norm_first, activation=activation
        )
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(24), enable_nested_tensor=False)
        self.head = nn.Linear(24, 4)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


class Attention(nn.Module):
    """As people write it by hand."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(24, 72)
        self.look = nn.MultiheadAttention(24, 4, batch_first=True)

    def forward(self, x):
        b, length, _ = x.shape
        q, k, v = self.qkv(x).view(b, length, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(x.shape)
        return self.look(y, x, x, need_weights=False)[0]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_layers_are_exchanged(norm_first, activation):
    model = Classifier(norm_first, activation)
    tokens = torch.randint(50, (3, 7))
    fast = nnarch.accelerate(model, tokens)
    kinds = {type(m) for m in fast.modules()}
    assert nnarch.nn.TransformerEncoder in kinds and nnarch.nn.MultiheadAttention in kinds
    assert nn.MultiheadAttention not in kinds and nn.TransformerEncoderLayer not in kinds
    with torch.no_grad():
        expected = model.eval()(tokens)
        for _ in range(3):  # the second call runs the recorded program
            torch.testing.assert_close(fast(tokens), expected, rtol=1e-4, atol=1e-5)
        weight = fast.body.get_submodule("encoder").layers[0].self_attn.in_proj_weight
        weight.mul_(2)  # nothing stale is used
        model.encoder.layers[0].self_attn.in_proj_weight.mul_(2)
        torch.testing.assert_close(fast(tokens), model(tokens), rtol=1e-4, atol=1e-5)
        other = torch.randint(50, (2, 9))
        torch.testing.assert_close(fast(other), model(other), rtol=1e-4, atol=1e-5)


def test_attention_by_hand():
    model = Attention()
    x = torch.randn(2, 5, 24)
    fast = nnarch.accelerate(model, x)
    assert type(fast.body.get_submodule("look")) is nnarch.nn.MultiheadAttention
    with nnarch.trace() as record:
        fast(x)
    assert [entry.op for entry in record].count("attention") == 2
    torch.testing.assert_close(fast(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_whole_transformer(batch_first):
    model = nn.Transformer(24, 4, 1, 1, 48, batch_first=batch_first)
    args = torch.randn(3, 3, 24), torch.randn(3, 3, 24)
    fast = nnarch.accelerate(model, args)
    assert any(type(m) is nnarch.nn.Transformer for m in fast.modules())
    torch.testing.assert_close(fast(*args), model.eval()(*args), rtol=1e-4, atol=1e-5)
    mask = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(3)}
    torch.testing.assert_close(fast(*args, **mask), model(*args, **mask), rtol=1e-4, atol=1e-5)


def test_attention_alone():
    model = nn.MultiheadAttention(24, 4)
    args = torch.randn(3, 2, 24), *[torch.randn(5, 2, 24)] * 2
    fast = nnarch.accelerate(model, args)
    with torch.no_grad():
        for found, expected in zip(fast(*args), model.eval()(*args), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_models_of_the_registry():
    model = nnarch.create_model(
        "transformer_base", vocabulary=40, d_model=24, heads=4, feedforward=48, nn=nn
    )
    args = torch.randint(1, 40, (2, 6)), torch.randint(1, 40, (2, 5))
    fast = nnarch.accelerate(model, args)
    assert any(type(m) is nnarch.nn.TransformerDecoderLayer for m in fast.modules())
