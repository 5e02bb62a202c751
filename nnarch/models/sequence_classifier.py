"""Classifiers of token sequences: recurrent layers in both directions, their last states, a class.

Source: Graves and Schmidhuber, 2005, Framewise Phoneme Classification with Bidirectional LSTM.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor, cat
from torch.nn import Module
from torch.nn.utils.rnn import pack_padded_sequence

import nnarch.nn
from nnarch.models.cells import PAPERS, recurrent
from nnarch.models.registry import register_model


class SequenceClassifier(Module):
    """Embedding, recurrent layers, a linear map of the last states.

    Args:
        cell: "rnn", "lstm" or "gru".
        vocabulary: number of tokens.
        num_classes: outputs.
        embedding, hidden: sizes; `hidden` of each direction.
        layers: recurrent layers.
        bidirectional: whether the sequence is read backwards as well.
        dropout: between layers and before the output.
        nn: the layer namespace.

    Raises:
        ValueError: unknown cell.
    """

    def __init__(
        self,
        cell: str = "lstm",
        *,
        vocabulary: int = 10_000,
        num_classes: int = 2,
        embedding: int = 128,
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        self.directions = 2 if bidirectional else 1
        self.has_cell_state = cell == "lstm"
        self.embedding = nn.Embedding(vocabulary, embedding)
        between = dropout if layers > 1 else 0.0
        self.recurrent = recurrent(
            cell, nn, embedding, hidden, layers, dropout=between, bidirectional=bidirectional
        )
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden * self.directions, num_classes)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits ``[B, num_classes]`` of ``tokens [B, T]``.

        `lengths` [B] says how many tokens of each sequence count, in any order; None: all.
        """
        x: Any = self.embedding(tokens.t())
        if lengths is not None:
            x = pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        _, state = self.recurrent(x)
        h = state[0] if self.has_cell_state else state
        last = h[-self.directions :]  # the top layer's
        return self.output(self.dropout(cat(last.unbind(), 1)))


_FACTS = {"input_size": (200,), "vocabulary": 10_000, "num_classes": 2}
_GRAVES = "Graves and Schmidhuber, 2005, Framewise Phoneme Classification with Bidirectional LSTM"


@register_model(**_FACTS, paper=PAPERS["rnn"], parameters=1_346_562, macs=13_107_712)
def rnn_classifier(**options: Any) -> SequenceClassifier:
    """Elman networks; `options` are those of :class:`SequenceClassifier`."""
    return SequenceClassifier("rnn", **options)


@register_model(**_FACTS, paper=_GRAVES, parameters=1_544_706, macs=52_429_312)
def lstm_classifier(**options: Any) -> SequenceClassifier:
    """LSTMs; `options` are those of :class:`SequenceClassifier`."""
    return SequenceClassifier("lstm", **options)


@register_model(**_FACTS, paper=PAPERS["gru"], parameters=1_478_658, macs=39_322_112)
def gru_classifier(**options: Any) -> SequenceClassifier:
    """GRUs; `options` are those of :class:`SequenceClassifier`."""
    return SequenceClassifier("gru", **options)
