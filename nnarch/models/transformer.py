"""The Transformer: an encoder reads, a decoder writes, and attention is all between them.

Source: Vaswani, Shazeer, Parmar, Uszkoreit, Jones, Gomez, Kaiser and Polosukhin, 2017, Attention Is
All You Need. Where its text, its code (tensor2tensor) and its heirs (Marian, fairseq) differ,
:class:`TransformerConfig` has an option; the defaults are the paper's. Dropout is in the places
where torch.nn's layers have it: the paper's, and also on attention weights and inside the
feed-forward network.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import nnarch.functional
import nnarch.nn
from nnarch.models.decoding import beam_search, greedy
from nnarch.models.registry import register_model


@dataclass(frozen=True)
class TransformerConfig:
    """What a :class:`TransformerModel` is made of; the defaults are the paper's base model.

    Attributes:
        vocabulary: tokens, of source and target together.
        d_model, heads, feedforward: sizes.
        encoder_layers, decoder_layers: how many.
        dropout: probability.
        activation: of the feed-forward networks: "relu", "gelu" or "silu".
        norm_first: LayerNorm before each part and once more at the end, instead of behind each add.
        tied: whether source, target and output share one matrix; else each has its own.
        output_bias: whether a bias is added to the logits.
        scale_embedding: whether embeddings are multiplied by √d_model.
        positions: "interleaved" or "concatenated" sines and cosines.
        padding: the token that fills sentences up, which nothing attends to; None: no such token.
        start, end: the tokens that begin and end a target.
        label_smoothing: of :meth:`TransformerModel.loss`.
    """

    vocabulary: int = 37_000
    d_model: int = 512
    heads: int = 8
    feedforward: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    dropout: float = 0.1
    activation: str = "relu"
    norm_first: bool = False
    tied: bool = True
    output_bias: bool = False
    scale_embedding: bool = True
    positions: str = "interleaved"
    padding: int | None = 0
    start: int = 1
    end: int = 2
    label_smoothing: float = 0.1


class TransformerModel(Module):
    """Tokens of one language in, tokens of another out.

    Args:
        config: sizes and options.
        nn: the layer namespace.

    Raises:
        ValueError: an option value that is unknown; sizes that do not fit together.

    Attributes:
        embedding: [vocabulary, d_model], of the source, and of the target where tied.
        target_embedding: of the target; None where tied.
        positions: :class:`nnarch.nn.SinusoidalPositionalEncoding`.
        encoder, decoder: stacks with the parameter names of torch.nn.Transformer.
        output: d_model to the vocabulary; its weight is the embedding's where tied.
    """

    def __init__(
        self, config: TransformerConfig | None = None, *, nn: ModuleType = nnarch.nn
    ) -> None:
        super().__init__()
        self.config = config = config or TransformerConfig()
        d_model = config.d_model
        layer: dict[str, Any] = {
            "d_model": d_model,
            "nhead": config.heads,
            "dim_feedforward": config.feedforward,
            "dropout": config.dropout,
            "activation": _activation(config.activation, nn),
            "norm_first": config.norm_first,
            "batch_first": True,
        }
        self.embedding = nn.Embedding(config.vocabulary, d_model)
        self.target_embedding = None if config.tied else nn.Embedding(config.vocabulary, d_model)
        self.positions = nnarch.nn.SinusoidalPositionalEncoding(d_model, layout=config.positions)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**layer),
            config.encoder_layers,
            nn.LayerNorm(d_model) if config.norm_first else None,
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(**layer),
            config.decoder_layers,
            nn.LayerNorm(d_model) if config.norm_first else None,
        )
        self.output = nn.Linear(d_model, config.vocabulary, bias=config.output_bias)
        if config.tied:
            self.output.weight = self.embedding.weight
        # A stack is made of copies of one layer: without this all layers would start alike.
        for name, parameter in self.named_parameters():
            if "embedding" in name or name == "output.weight":
                torch.nn.init.normal_(parameter, std=d_model**-0.5)
            elif parameter.dim() > 1:
                torch.nn.init.xavier_uniform_(parameter)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits ``[B, T, vocabulary]`` of the token after each of ``target [B, T]``.

        Args:
            source: [B, S] tokens.
            target: [B, T] tokens, from the one that starts a sentence.
        """
        memory, padding = self.encode(source)
        return self.output(self.decode(target, memory, padding))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor | None]:
        """The encoder's output ``[B, S, d_model]``, and which of it is padding ``[B, S]``."""
        padding = self._padding(source)
        x = self._embed(source, self.embedding, 0)
        return self.encoder(x, src_key_padding_mask=padding), padding

    def decode(
        self, target: Tensor, memory: Tensor | None, padding: Tensor | None, cache: Any = None
    ) -> Tensor:
        """The decoder's output ``[B, T, d_model]``, which :attr:`output` turns into logits.

        Args:
            target: [B, T] tokens; with a cache, those that follow what it holds.
            memory, padding: what :meth:`encode` returned.
            cache: a :class:`nnarch.nn.DecoderCache`, for layers of nnarch.nn.
        """
        offset = 0 if cache is None else cache.length
        y = self._embed(target, self.target_embedding or self.embedding, offset)
        options: dict[str, Any] = {} if cache is None else {"cache": cache}
        if cache is None:  # with a cache, causality needs no mask; torch.nn's layers want one
            options["tgt_mask"] = causal(target.shape[1], y)
        return self.decoder(
            y, memory, memory_key_padding_mask=padding, tgt_is_causal=True, **options
        )

    def loss(self, source: Tensor, target: Tensor) -> Tensor:
        """The mean cross-entropy of every token of ``target [B, T]`` but its first, smoothed.

        Args:
            source: [B, S] tokens.
            target: [B, T] whole sentences: a start, the tokens, an end, padding.
        """
        memory, padding = self.encode(source)
        y = self.decode(target[:, :-1], memory, padding)
        wanted = target[:, 1:].flatten()
        options: dict[str, Any] = {
            "ignore_index": -100 if self.config.padding is None else self.config.padding,
            "label_smoothing": self.config.label_smoothing,
        }
        if type(self.output) is nnarch.nn.Linear:  # no logits in memory
            weight, bias = self.output.weight, self.output.bias
            return nnarch.functional.linear_cross_entropy(
                y.flatten(0, 1), weight, wanted, linear_bias=bias, **options
            )
        return torch.nn.functional.cross_entropy(self.output(y).flatten(0, 1), wanted, **options)

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        limit: int | None = None,
        *,
        beams: int = 1,
        length_penalty: float = 0.6,
        use_cache: bool = True,
    ) -> Tensor:
        """Translate: greedily, or by beam search.

        Args:
            source: [B, S] tokens.
            limit: longest output; S + 50 where None, as the paper has it.
            beams: hypotheses that are kept for each sentence; 1: the likeliest token each time.
            length_penalty: α of the paper's ((5 + length) / 6)^α, by which the log-probability of
                a hypothesis is divided.
            use_cache: whether keys and values of earlier tokens are kept. The tokens are the same
                without, only later. Layers other than nnarch.nn's know no cache.

        Returns:
            [B, up to limit] tokens behind the start, padded from the end of a sentence on (with
            the end token where there is no padding).
        """
        if beams < 1:
            raise ValueError(f"generate: beams must be at least 1, got {beams}")
        source = source.long()
        limit = source.shape[1] + 50 if limit is None else limit
        memory, padding = self.encode(source)
        step = _Stepper(self, memory, padding, use_cache)
        start = source.new_full((source.shape[0], 1), self.config.start)
        rules = (limit, self.config.end, self._filler)
        if beams == 1:
            return greedy(step, start, *rules)
        return beam_search(step, start, *rules, beams, length_penalty)

    @torch.no_grad()
    def attention_maps(self, source: Tensor, target: Tensor) -> Tensor:
        """Where the decoder looks: its weights on the source, [layers, B, heads, T, S].

        Args:
            source, target: as in :meth:`forward`.
        """
        found: list[Tensor] = []

        def ask(module: Module, args: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**options, "need_weights": True, "average_attn_weights": False}

        def keep(module: Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
            found.append(output[1])

        with ExitStack() as hooks:
            for layer in self.decoder.layers:
                attention = layer.multihead_attn
                hooks.callback(attention.register_forward_pre_hook(ask, with_kwargs=True).remove)
                hooks.callback(attention.register_forward_hook(keep).remove)
            self(source, target)
        return torch.stack(found)

    @property
    def _filler(self) -> int:
        return self.config.end if self.config.padding is None else self.config.padding

    def _padding(self, tokens: Tensor) -> Tensor | None:
        return None if self.config.padding is None else tokens == self.config.padding

    def _embed(self, tokens: Tensor, embedding: Module, offset: int) -> Tensor:
        x = embedding(tokens)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.d_model)
        return self.dropout(self.positions(x, offset))


class _Stepper:
    """The logits of the next token, step by step.

    Args:
        model: the Transformer.
        memory, padding: of the encoder.
        use_cache: whether a step computes its own token only.
    """

    def __init__(
        self, model: TransformerModel, memory: Tensor, padding: Tensor | None, use_cache: bool
    ) -> None:
        self.model, self.memory, self.padding = model, memory, padding
        ours = isinstance(model.decoder, nnarch.nn.TransformerDecoder)
        layers = model.config.decoder_layers
        self.cache = nnarch.nn.DecoderCache(layers) if use_cache and ours else None
        self.tokens: Tensor | None = None

    def __call__(self, token: Tensor) -> Tensor:
        """[B, vocabulary] after the tokens [B, 1] that are the last."""
        if self.cache is None:
            self.tokens = token if self.tokens is None else torch.cat([self.tokens, token], 1)
            token = self.tokens
        y = self.model.decode(token, self.memory, self.padding, self.cache)
        return self.model.output(y[:, -1])

    def repeat(self, times: int) -> None:
        """Continue with every row so many times; before the first step."""
        self.memory = self.memory.repeat_interleave(times, 0)
        if self.padding is not None:
            self.padding = self.padding.repeat_interleave(times, 0)

    def reorder(self, rows: Tensor) -> None:
        """Continue with these rows; each comes from the same source as the one in its place."""
        if self.cache is not None:
            self.cache.reorder(rows, memory=False)
        elif self.tokens is not None:
            self.tokens = self.tokens.index_select(0, rows)


def causal(length: int, like: Tensor) -> Tensor:
    """[T, T]: -inf where a token may not see another, else 0."""
    return torch.nn.Transformer.generate_square_subsequent_mask(length, like.device, like.dtype)


def noam_rate(step: int, d_model: int = 512, warmup: int = 4000, factor: float = 1.0) -> float:
    """The learning rate of the paper's section 5.3: it rises linearly, then falls as 1/√step.

    Args:
        step: from 1 on; 0 is read as 1.
        d_model: of the model.
        warmup: steps that it rises for.
        factor: multiplies it.
    """
    step = max(step, 1)
    return factor * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)


def noam_schedule(
    optimizer: torch.optim.Optimizer,
    d_model: int = 512,
    warmup: int = 4000,
    factor: float = 1.0,
) -> torch.optim.lr_scheduler.LambdaLR:
    """:func:`noam_rate` as a scheduler, for an optimizer whose own learning rate is 1."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: noam_rate(step + 1, d_model, warmup, factor)
    )


def _activation(name: str, nn: ModuleType) -> Any:
    if name in ("relu", "gelu"):
        return name
    if name == "silu":
        return torch.nn.functional.silu
    raise ValueError(f"activation must be one of relu, gelu, silu, got {name!r}")


_FACTS: dict[str, Any] = {
    "paper": "Vaswani et al., 2017, Attention Is All You Need",
    "input_size": (32,),
    "inputs": 2,
    "vocabulary": 37_000,
    "num_classes": 37_000,
}


def _build(config: TransformerConfig, nn: ModuleType, options: dict[str, Any]) -> TransformerModel:
    return TransformerModel(replace(config, **options), nn=nn)


@register_model(**_FACTS, parameters=63_082_496, macs=2_034_368_512)
def transformer_base(*, nn: ModuleType = nnarch.nn, **options: Any) -> TransformerModel:
    """The paper's base model; `options` are fields of :class:`TransformerConfig`."""
    return _build(TransformerConfig(), nn, options)


@register_model(**_FACTS, parameters=214_245_376, macs=6_887_309_312)
def transformer_big(*, nn: ModuleType = nnarch.nn, **options: Any) -> TransformerModel:
    """The paper's big model, with its dropout of 0.3; `options` as for the base model."""
    config = TransformerConfig(d_model=1024, heads=16, feedforward=4096, dropout=0.3)
    return _build(config, nn, options)
