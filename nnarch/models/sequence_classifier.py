"""Recurrent classifier: one label for a whole sequence of tokens.

Source: Graves and Schmidhuber, 2005, Framewise Phoneme Classification with Bidirectional LSTM; here
the states that both directions end in are read, once a sequence. The default sizes are those of
Keras's example on movie reviews.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pack_padded_sequence

import nnarch.nn
from nnarch.models.recurrent import recurrent_layer
from nnarch.models.registry import register_model


class SequenceClassifier(Module):
    """Embedding, recurrent layers in both directions, and a linear layer on their last states.

    Args:
        cell: "lstm", "gru" or "rnn".
        vocabulary: tokens, numbered from 0.
        num_classes: labels.
        embedding, hidden: features of a token, and of the state of one direction.
        layers: recurrent layers.
        bidirectional: whether to read from both ends.
        dropout: probability of a zero between layers and before the last one, in training.
        nn: the layer namespace.

    Raises:
        ValueError: unknown cell.
    """

    def __init__(
        self,
        cell: str = "lstm",
        *,
        vocabulary: int = 20_000,
        num_classes: int = 2,
        embedding: int = 128,
        hidden: int = 64,
        layers: int = 2,
        bidirectional: bool = True,
        dropout: float = 0.0,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = recurrent_layer(cell, nn)(
            embedding,
            hidden,
            layers,
            dropout=dropout if layers > 1 else 0.0,
            bidirectional=bidirectional,
        )
        self.has_cell = cell == "lstm"  # beside h, in its state
        self.dropout = nn.Dropout(dropout)
        self.directions = 2 if bidirectional else 1
        self.classifier = nn.Linear(self.directions * hidden, num_classes)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits ``[B, num_classes]`` of ``tokens [T, B]``, of which sequence b has ``lengths[b]``;
        all T where that is None."""
        x = self.embedding(tokens)
        if lengths is not None:  # what lies behind the end of a sequence costs nothing
            x = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        _, state = self.rnn(x)
        h = state[0] if self.has_cell else state
        last = h[-self.directions :].transpose(0, 1).flatten(1)
        return self.classifier(self.dropout(last))


_FACTS = {
    "paper": "Graves and Schmidhuber, 2005, Framewise Phoneme Classification with Bidirectional "
    "LSTM and Other Neural Network Architectures",
    "input_size": (200,),
    "num_classes": 2,
    "input_dtype": torch.int64,
    "batch_dim": 1,
}


@register_model(**_FACTS, parameters=2_758_914, macs=39_321_856)
def lstm_classifier(**options: Any) -> SequenceClassifier:
    """LSTM; `options` are those of :class:`SequenceClassifier`."""
    return SequenceClassifier("lstm", **options)


@register_model(**_FACTS, parameters=2_709_250, macs=29_491_456)
def gru_classifier(**options: Any) -> SequenceClassifier:
    """GRU; `options` are those of :class:`SequenceClassifier`."""
    return SequenceClassifier("gru", **options)


@register_model(**_FACTS, parameters=2_609_922, macs=9_830_656)
def rnn_classifier(**options: Any) -> SequenceClassifier:
    """Elman network; `options` are those of :class:`SequenceClassifier`."""
    return SequenceClassifier("rnn", **options)
