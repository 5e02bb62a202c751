"""On a real GPU: Transformer layers and models, against torch's on the same GPU."""

import dataclasses

import pytest
import torch
from on_a_gpu import DEVICE, MARKS, assert_ran, by_dtype, check

import nnarch
from nnarch import nn
from nnarch.models.transformer import TransformerConfig, TransformerModel

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:enable_nested_tensor")]

SIZES = {"d_model": 48, "nhead": 4, "dim_feedforward": 100, "dropout": 0.0, "batch_first": True}


@pytest.mark.parametrize(
    "options", [{"activation": "gelu"}, {"norm_first": True}], ids=["gelu", "norm first"]
)
@by_dtype
def test_encoder_layer(options, dtype):
    ours, twin = (n.TransformerEncoderLayer(**SIZES, **options) for n in (nn, torch.nn))
    hidden = torch.arange(19) >= torch.tensor([[19], [11], [3]])

    def call(module, x):
        return module(x, src_key_padding_mask=hidden.to(x.device))

    check(ours, twin, [torch.randn(3, 19, 48)], dtype, call=call, factor=4, ulps=32)


@by_dtype
def test_encoder_without_gradients(dtype):
    ours, twin = (
        n.TransformerEncoder(
            n.TransformerEncoderLayer(**SIZES), 2, n.LayerNorm(48), enable_nested_tensor=False
        )
        for n in (nn, torch.nn)
    )
    tensors = [torch.randn(3, 19, 48)]
    check(ours.eval(), twin.eval(), tensors, dtype, gradients=False, factor=4, ulps=32)


@by_dtype
def test_decoder_layer(dtype):
    ours, twin = (n.TransformerDecoderLayer(**SIZES) for n in (nn, torch.nn))

    def call(module, x, memory):
        mask = torch.nn.Transformer.generate_square_subsequent_mask(
            17, device=x.device, dtype=x.dtype
        )
        return module(x, memory, tgt_mask=mask, tgt_is_causal=True)

    tensors = [torch.randn(3, 17, 48), torch.randn(3, 23, 48)]
    check(ours, twin, tensors, dtype, call=call, factor=4, ulps=32)


def test_transformer():
    options = {**SIZES, "num_encoder_layers": 2, "num_decoder_layers": 2}
    ours, twin = (n.Transformer(**options) for n in (nn, torch.nn))

    def call(module, x, y):
        mask = module.generate_square_subsequent_mask(17, device=x.device, dtype=x.dtype)
        return module(x, y, tgt_mask=mask)

    tensors = [torch.randn(3, 23, 48), torch.randn(3, 17, 48)]
    check(ours, twin, tensors, torch.float32, call=call, factor=4, ulps=64)


MODEL = TransformerConfig(
    vocabulary=101,
    d_model=48,
    heads=4,
    feedforward=96,
    encoder_layers=2,
    decoder_layers=2,
    dropout=0.0,
)


def sentences():
    """Sources and targets with padding."""
    source, target = torch.randint(3, 101, (5, 13)), torch.randint(3, 101, (5, 11))
    source[1, 8:] = source[3, 2:] = 0
    target[:, 0], target[2, 6], target[2, 7:] = 1, 2, 0
    return source, target


@pytest.mark.parametrize("variant", [{}, {"norm_first": True, "activation": "silu"}], ids=str)
def test_the_model_and_its_loss(variant):
    config = dataclasses.replace(MODEL, **variant)
    ours, twin = (TransformerModel(config, nn=n) for n in (nn, torch.nn))

    def call(module, source, target):
        return module(source, target), module.loss(source, target)

    check(ours, twin, sentences(), torch.float32, call=call, factor=4, ulps=64)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_changes_no_token(beams):
    """In float64 no two likely tokens are as close as rounding; the kernels have float32."""
    model = TransformerModel(MODEL).to(DEVICE).eval()
    with torch.no_grad():  # far apart, so that rounding decides nothing
        model.embedding.weight.mul_(4)
    source = sentences()[0].to(DEVICE)
    with nnarch.trace() as record:
        kept = model.generate(source, 20, beams=beams)
    assert_ran(record)
    assert torch.equal(kept, model.generate(source, 20, beams=beams, use_cache=False))
    if beams == 1:
        assert torch.equal(kept.cpu(), model.cpu().generate(source.cpu(), 20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_in_autocast_learns(dtype):
    model = TransformerModel(dataclasses.replace(MODEL, dropout=0.1)).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    source = torch.randint(3, 101, (32, 9), device=DEVICE)
    target = torch.cat([torch.ones_like(source[:, :1]), source], 1)  # copy the source
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype), nnarch.trace() as record:
            loss = model.loss(source, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert_ran(record)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[-1] < 0.9 * losses[0], losses
