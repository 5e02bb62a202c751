"""Marian's checkpoints and configurations in our Transformer."""

from __future__ import annotations

import pytest
import torch

from nnarch.convert import load_marian, marian_config, marian_weights
from nnarch.models.transformer import TransformerConfig, TransformerModel
from nnarch.nn.positions import sinusoids

CONFIG = {
    "vocab_size": 40,
    "decoder_vocab_size": 40,
    "d_model": 16,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "activation_function": "swish",
    "scale_embedding": True,
    "pad_token_id": 39,
    "decoder_start_token_id": 39,
    "eos_token_id": 0,
}
# Helsinki-NLP's opus-mt models, as their config.json has it.
OPUS = CONFIG | {
    "vocab_size": 58_101,
    "decoder_vocab_size": 58_101,
    "d_model": 512,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 2048,
    "decoder_ffn_dim": 2048,
    "encoder_layers": 6,
    "decoder_layers": 6,
}


def as_marian(model: TransformerModel) -> dict[str, torch.Tensor]:
    """The weights of `model` under the names that a MarianMTModel has for them."""
    norms = {
        "encoder": {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"},
        "decoder": {
            "norm1": "self_attn_layer_norm",
            "norm2": "encoder_attn_layer_norm",
            "norm3": "final_layer_norm",
        },
    }
    found = {"final_logits_bias": model.output.bias[None], "lm_head.weight": model.output.weight}
    for side in ("encoder", "decoder"):
        tokens = model.target_embedding if side == "decoder" else None
        found[f"model.{side}.embed_tokens.weight"] = (tokens or model.embedding).weight
        found[f"model.{side}.embed_positions.weight"] = sinusoids(9, 16, "concatenated").float()
        for i, layer in enumerate(getattr(model, side).layers):
            base = f"model.{side}.layers.{i}."
            for ours, theirs in (("linear1", "fc1"), ("linear2", "fc2"), *norms[side].items()):
                for kind, value in getattr(layer, ours).named_parameters():
                    found[f"{base}{theirs}.{kind}"] = value
            for ours, theirs in (("self_attn", "self_attn"), ("multihead_attn", "encoder_attn")):
                attention = getattr(layer, ours, None)
                if attention is None:
                    continue
                for kind in ("weight", "bias"):
                    thirds = getattr(attention, f"in_proj_{kind}").chunk(3)
                    for letter, third in zip("qkv", thirds, strict=True):
                        found[f"{base}{theirs}.{letter}_proj.{kind}"] = third
                    found[f"{base}{theirs}.out_proj.{kind}"] = getattr(attention.out_proj, kind)
    if model.config.tied:
        found["model.shared.weight"] = model.embedding.weight
    return {name: value.detach().clone() for name, value in found.items()}


def make(seed, **config):
    torch.manual_seed(seed)
    model = TransformerModel(marian_config(CONFIG | config)).eval()
    for parameter in model.parameters():  # biases and norms, which start at zeros and ones
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_by_marians_names(tied):
    model, other = (make(seed, share_encoder_decoder_embeddings=tied) for seed in (0, 1))
    weights = as_marian(model)
    load_marian(other, weights)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    # A checkpoint with every tensor once.
    for name in ("lm_head.weight", "model.encoder.embed_tokens.weight"):
        if tied:
            del weights[name]
    assert marian_weights(weights).keys() == other.state_dict().keys()


def test_a_checkpoint_that_does_not_fit_changes_nothing():
    model, other = make(0), make(1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    weights = as_marian(model)
    for bad, message in (
        (
            {"model.encoder.layers.0.self_attn.k_proj.bias": None},
            "k_proj and v_proj bias, got q, v",
        ),
        ({"model.encoder.layers.1.fc2.weight": None}, "linear2.weight is missing"),
        ({"model.decoder.layernorm_embedding.weight": torch.ones(16)}, "is not in the model"),
        ({"model.decoder.embed_positions.weight": torch.randn(9, 16)}, "but is learned"),
        ({"final_logits_bias": torch.ones(1, 3)}, "output.bias is 3, the model has 40"),
    ):
        changed = {k: v for k, v in (weights | bad).items() if v is not None}
        with pytest.raises(ValueError, match=message):
            load_marian(other, changed)
        for name, value in before.items():
            assert torch.equal(value, other.state_dict()[name])


def test_configurations():
    config = marian_config(OPUS)
    assert config == TransformerConfig(
        vocabulary=58_101,
        activation="silu",
        output_bias=True,
        positions="concatenated",
        padding=39,
        start=39,
        end=0,
    )
    with torch.device("meta"):
        count = sum(p.numel() for p in TransformerModel(config).parameters())
    assert count == 73_886_208 + 58_101  # its output bias is a buffer there
    for option, value in (
        ("decoder_ffn_dim", 7),
        ("decoder_attention_heads", 2),
        ("decoder_vocab_size", 41),
        ("activation_function", "mish"),
    ):
        with pytest.raises(ValueError, match=f"marian_config: .*{value}"):
            marian_config(CONFIG | {option: value})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["swish", "relu", "gelu"])
def test_outputs_are_those_of_transformers(activation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MarianConfig(**CONFIG | {"activation_function": activation})
    theirs = transformers.MarianMTModel(config).eval()
    theirs.final_logits_bias.normal_()
    ours = TransformerModel(marian_config(config.to_dict())).eval()
    load_marian(ours, theirs.state_dict())
    source, target = torch.randint(1, 39, (3, 8)), torch.randint(1, 39, (3, 5))
    source[1, 5:] = 39
    with torch.no_grad():
        expected = theirs(
            input_ids=source, attention_mask=source != 39, decoder_input_ids=target
        ).logits
        torch.testing.assert_close(ours(source, target), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_count_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = transformers.MarianMTModel(transformers.MarianConfig(**OPUS))
    learned = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert learned == 73_886_208
