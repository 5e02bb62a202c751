"""Recurrent language models: the next token from all before it.

Source: Zaremba, Sutskever and Vinyals, 2014, Recurrent Neural Network Regularization, whose medium
LSTM for the Penn Treebank is the default; Mikolov and others, 2010, Recurrent Neural Network Based
Language Model, for the plain network.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module

import nnarch.nn
from nnarch.models.cells import PAPERS, recurrent
from nnarch.models.registry import register_model


class RecurrentLanguageModel(Module):
    """Embedding, recurrent layers, a linear map to the vocabulary.

    Args:
        cell: "rnn", "lstm" or "gru".
        vocabulary: number of tokens.
        embedding, hidden: sizes.
        layers: recurrent layers.
        dropout: after the embedding, between layers and before the output, as Zaremba has it.
        tied: whether the output shares the embedding's weight (Press and Wolf, 2017); needs equal
            sizes.
        nn: the layer namespace.

    Raises:
        ValueError: unknown cell, or `tied` with unequal sizes.
    """

    def __init__(
        self,
        cell: str = "lstm",
        *,
        vocabulary: int = 10_000,
        embedding: int = 650,
        hidden: int = 650,
        layers: int = 2,
        dropout: float = 0.0,
        tied: bool = False,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        if tied and embedding != hidden:
            raise ValueError(f"tied weights need embedding = hidden, got {embedding} and {hidden}")
        self.embedding = nn.Embedding(vocabulary, embedding)
        between = dropout if layers > 1 else 0.0
        self.recurrent = recurrent(cell, nn, embedding, hidden, layers, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, vocabulary)
        if tied:
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits ``[B, T, vocabulary]`` of the token after each of ``tokens [B, T]``; the state.

        `state` is what an earlier call returned, to read on from there; None starts anew.
        """
        x = self.dropout(self.embedding(tokens.t()))
        x, state = self.recurrent(x, state)
        return self.output(self.dropout(x)).transpose(0, 1), state


_FACTS = {"input_size": (35,), "vocabulary": 10_000, "num_classes": 10_000}
_MIKOLOV = "Mikolov et al., 2010, Recurrent Neural Network Based Language Model"
_ZAREMBA = "Zaremba et al., 2014, Recurrent Neural Network Regularization"


@register_model(**_FACTS, paper=_MIKOLOV, parameters=14_702_600, macs=286_650_000)
def rnn_language_model(**options: Any) -> RecurrentLanguageModel:
    """An Elman network; `options` are those of :class:`RecurrentLanguageModel`."""
    return RecurrentLanguageModel("rnn", **options)


@register_model(**_FACTS, paper=_ZAREMBA, parameters=19_780_400, macs=464_100_000)
def lstm_language_model(**options: Any) -> RecurrentLanguageModel:
    """An LSTM; `options` are those of :class:`RecurrentLanguageModel`."""
    return RecurrentLanguageModel("lstm", **options)


@register_model(**_FACTS, paper=PAPERS["gru"], parameters=18_087_800, macs=404_950_000)
def gru_language_model(**options: Any) -> RecurrentLanguageModel:
    """A GRU; `options` are those of :class:`RecurrentLanguageModel`."""
    return RecurrentLanguageModel("gru", **options)
