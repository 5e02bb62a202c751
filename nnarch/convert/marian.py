"""Weights and configurations of Marian's translation models, as transformers keeps them.

==========================================  ====================================================
transformers' MarianMTModel                 nnarch.models.transformer.TransformerModel
==========================================  ====================================================
model.shared.weight                         embedding.weight, output.weight
model.encoder.embed_tokens.weight, …        embedding.weight, target_embedding.weight (untied)
….self_attn.{q,k,v}_proj.{weight,bias}      ….self_attn.in_proj_{weight,bias}, one below another
….self_attn.out_proj                        ….self_attn.out_proj
….encoder_attn                              ….multihead_attn, likewise
….self_attn_layer_norm                      ….norm1
….encoder_attn_layer_norm                   ….norm2
….fc1, fc2                                  ….linear1, linear2
….final_layer_norm                          ….norm2 of the encoder, norm3 of the decoder
final_logits_bias                           output.bias
….embed_positions.weight                    none: sines and cosines, checked and left out
==========================================  ====================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnarch.convert.checkpoint import load_weights
from nnarch.models.transformer import TransformerConfig
from nnarch.nn.positions import sinusoids

_LAYER = re.compile(r"model\.((?:en|de)coder)\.layers\.(\d+)\.(.+)")
_PARTS = {
    "self_attn.out_proj": "self_attn.out_proj",
    "encoder_attn.out_proj": "multihead_attn.out_proj",
    "self_attn_layer_norm": "norm1",
    "encoder_attn_layer_norm": "norm2",
    "fc1": "linear1",
    "fc2": "linear2",
}
_PROJECTION = re.compile(r"(self|encoder)_attn\.([qkv])_proj\.(weight|bias)")
_ATTENTION = {"self": "self_attn", "encoder": "multihead_attn"}
_LAST_NORM = {"encoder": "norm2", "decoder": "norm3"}
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu"}
_POSITION_TOLERANCE = 1e-4


def marian_config(config: Mapping[str, Any]) -> TransformerConfig:
    """The configuration of a Marian model, as its ``config.json`` has it, for our Transformer.

    Args:
        config: the keys of transformers' MarianConfig.

    Raises:
        ValueError: an option that our Transformer does not have.
    """
    for one, other in (
        ("encoder_attention_heads", "decoder_attention_heads"),
        ("encoder_ffn_dim", "decoder_ffn_dim"),
    ):
        if config[one] != config[other]:
            raise ValueError(
                f"marian_config: {one} and {other} must be equal, got {config[one]} and "
                f"{config[other]}"
            )
    activation = config["activation_function"]
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"marian_config: activation_function must be one of {', '.join(_ACTIVATIONS)}, got "
            f"{activation!r}"
        )
    vocabulary = config["vocab_size"]
    if config.get("decoder_vocab_size") not in (None, vocabulary):
        raise ValueError(
            f"marian_config: source and target must have one vocabulary, got {vocabulary} and "
            f"{config['decoder_vocab_size']} tokens"
        )
    return TransformerConfig(
        vocabulary=vocabulary,
        d_model=config["d_model"],
        heads=config["encoder_attention_heads"],
        feedforward=config["encoder_ffn_dim"],
        encoder_layers=config["encoder_layers"],
        decoder_layers=config["decoder_layers"],
        dropout=config.get("dropout", 0.1),
        activation=_ACTIVATIONS[activation],
        tied=config.get("share_encoder_decoder_embeddings", True),
        output_bias=True,
        scale_embedding=config.get("scale_embedding", False),
        positions="concatenated",
        padding=config["pad_token_id"],
        start=config["decoder_start_token_id"],
        end=config["eos_token_id"],
    )


def load_marian(model: Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of a MarianMTModel into `model`, all or none.

    Args:
        model: a :class:`nnarch.models.transformer.TransformerModel` with Marian's options, as
            :func:`marian_config` gives them.
        weights: ``MarianMTModel.state_dict()``, or what
            :func:`nnarch.convert.read_checkpoint` read.

    Raises:
        ValueError: other weights than `model` needs; the message says which, and `model` is left
            as it was.
    """
    load_weights(model, marian_weights(weights), source="the Marian model")


def marian_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a MarianMTModel by the names of our Transformer.

    Names that Marian does not have are kept, so that loading reports them.

    Raises:
        ValueError: a projection without its two companions, or positions that are no sines.
    """
    found: dict[str, Tensor] = {}
    projections: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name, value in weights.items():
        layer = _LAYER.fullmatch(name)
        projection = _PROJECTION.fullmatch(layer[3]) if layer else None
        if layer is None:
            if name.endswith("embed_positions.weight"):
                _check_positions(name, value)
            elif not _is_shared(name, weights):
                found[_outside_layers(name)] = value
        elif projection is None:
            part, _, kind = layer[3].rpartition(".")
            ours = _LAST_NORM[layer[1]] if part == "final_layer_norm" else _PARTS.get(part, part)
            found[f"{layer[1]}.layers.{layer[2]}.{ours}.{kind}"] = value
        else:
            which, letter, kind = projection.groups()
            place = f"{layer[1]}.layers.{layer[2]}.{_ATTENTION[which]}"
            projections.setdefault((place, kind), {})[letter] = value
    for (place, kind), parts in projections.items():
        if parts.keys() != set("qkv"):
            raise ValueError(
                f"marian_weights: {place} must have q_proj, k_proj and v_proj {kind}, got "
                f"{', '.join(sorted(parts))}"
            )
        found[f"{place}.in_proj_{kind}"] = torch.cat([parts[letter] for letter in "qkv"])
    if "final_logits_bias" in weights:
        found["output.bias"] = weights["final_logits_bias"].flatten()
        del found["final_logits_bias"]
    # Tied weights are stored once, or as often as they are used.
    embedding = found.get("embedding.weight")
    if embedding is not None:
        found.setdefault("output.weight", found.get("target_embedding.weight", embedding))
    return found


def _is_shared(name: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether `name` is a second name of the matrix that all share."""
    return name.endswith("embed_tokens.weight") and "model.shared.weight" in weights


def _outside_layers(name: str) -> str:
    return {
        "model.shared.weight": "embedding.weight",
        "model.encoder.embed_tokens.weight": "embedding.weight",
        "model.decoder.embed_tokens.weight": "target_embedding.weight",
        "lm_head.weight": "output.weight",
    }.get(name, name)


def _check_positions(name: str, table: Tensor) -> None:
    expected = sinusoids(*table.shape, layout="concatenated")
    if (table.double() - expected).abs().max() > _POSITION_TOLERANCE:
        raise ValueError(f"marian_weights: {name} must hold sines and cosines, but is learned")
