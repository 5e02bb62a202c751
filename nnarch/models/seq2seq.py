"""Sequence to sequence: one recurrent network reads, another writes from the state it ends in.

Source: Sutskever, Vinyals and Le, 2014, Sequence to Sequence Learning with Neural Networks; for the
GRU, Cho and others, 2014, Learning Phrase Representations using RNN Encoder-Decoder. The source is
read backwards, as the first paper found best (`reverse_source`).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import nnarch.nn
from nnarch.models.recurrent import recurrent_layer
from nnarch.models.registry import register_model


class Seq2Seq(Module):
    """Encoder, decoder, and a projection to the target's vocabulary.

    Args:
        cell: "lstm", "gru" or "rnn".
        source_vocabulary, target_vocabulary: tokens, numbered from 0.
        embedding, hidden: features of a token and of the state.
        layers: recurrent layers of each network.
        dropout: probability of a zero between layers, in training.
        reverse_source: whether the encoder reads from the last token to the first.
        nn: the layer namespace.

    Raises:
        ValueError: unknown cell.
    """

    def __init__(
        self,
        cell: str = "lstm",
        *,
        source_vocabulary: int = 10_000,
        target_vocabulary: int = 10_000,
        embedding: int = 256,
        hidden: int = 512,
        layers: int = 2,
        dropout: float = 0.0,
        reverse_source: bool = True,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        layer, between = recurrent_layer(cell, nn), dropout if layers > 1 else 0.0
        self.source_embedding = nn.Embedding(source_vocabulary, embedding)
        self.encoder = layer(embedding, hidden, layers, dropout=between)
        self.target_embedding = nn.Embedding(target_vocabulary, embedding)
        self.decoder = layer(embedding, hidden, layers, dropout=between)
        self.projection = nn.Linear(hidden, target_vocabulary)
        self.reverse_source = reverse_source

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits ``[T, B, target_vocabulary]`` of what follows each of ``target [T, B]``, which
        begins with a start token, after ``source [S, B]``."""
        y, _ = self.decoder(self.target_embedding(target), self.encode(source))
        return self.projection(y)

    def encode(self, source: Tensor) -> Any:
        """The state after ``source [S, B]``."""
        x = self.source_embedding(source)
        return self.encoder(x.flip(0) if self.reverse_source else x)[1]

    @torch.no_grad()
    def generate(self, source: Tensor, start: int, length: int) -> Tensor:
        """The most probable token after each, ``[length, B]``, beginning with token `start`."""
        state = self.encode(source)
        token = source.new_full((1, source.shape[1]), start)
        written = []
        for _ in range(length):
            y, state = self.decoder(self.target_embedding(token), state)
            token = self.projection(y).argmax(-1)
            written.append(token)
        return torch.cat(written)


_FACTS = {
    "paper": "Sutskever, Vinyals and Le, 2014, Sequence to Sequence Learning with Neural Networks",
    "input_size": (20,),
    "num_classes": 10_000,
    "input_dtype": torch.int64,
    "batch_dim": 1,
    "input_count": 2,
}


@register_model(**_FACTS, parameters=17_606_416, macs=249_200_640)
def lstm_seq2seq(**options: Any) -> Seq2Seq:
    """LSTM; `options` are those of :class:`Seq2Seq`."""
    return Seq2Seq("lstm", **options)


@register_model(**_FACTS, parameters=15_767_312, macs=212_500_480)
def gru_seq2seq(**options: Any) -> Seq2Seq:
    """GRU; `options` are those of :class:`Seq2Seq`."""
    return Seq2Seq("gru", **options)


@register_model(**_FACTS, parameters=12_089_104, macs=139_100_160)
def rnn_seq2seq(**options: Any) -> Seq2Seq:
    """Elman network; `options` are those of :class:`Seq2Seq`."""
    return Seq2Seq("rnn", **options)
