"""Recurrent language model: each token's distribution from all tokens before it.

Source: Zaremba, Sutskever and Vinyals, 2014, Recurrent Neural Network Regularization, whose small
model has the sizes that are the defaults here: dropout between layers, never across time.

Parameter names are those of PyTorch's word_language_model example: encoder, rnn, decoder.
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


class LanguageModel(Module):
    """Embedding, recurrent layers, and a projection to the vocabulary.

    Args:
        cell: "lstm", "gru" or "rnn".
        vocabulary: tokens, numbered from 0.
        embedding, hidden: features of a token and of the state.
        layers: recurrent layers.
        dropout: probability of a zero on the way into, between and out of the layers, in training.
        tied: whether the projection has the embedding's weight; then both sizes must be equal.
        nn: the layer namespace.

    Raises:
        ValueError: unknown cell, or tied weights of unequal sizes.
    """

    def __init__(
        self,
        cell: str = "lstm",
        *,
        vocabulary: int = 10_000,
        embedding: int = 200,
        hidden: int = 200,
        layers: int = 2,
        dropout: float = 0.0,
        tied: bool = False,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        if tied and embedding != hidden:
            raise ValueError(
                f"LanguageModel: tied weights need embedding == hidden, got {embedding}, {hidden}"
            )
        between = dropout if layers > 1 else 0.0
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocabulary, embedding)
        self.rnn = recurrent_layer(cell, nn)(embedding, hidden, layers, dropout=between)
        self.decoder = nn.Linear(hidden, vocabulary)
        torch.nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        torch.nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        torch.nn.init.zeros_(self.decoder.bias)
        if tied:
            self.decoder.weight = self.encoder.weight

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits ``[T, B, vocabulary]`` of each next token after ``tokens [T, B]``, and the state
        from which the next tokens go on; `state` is that of the tokens before."""
        y, state = self.rnn(self.drop(self.encoder(tokens)), state)
        return self.decoder(self.drop(y)), state


_FACTS = {
    "paper": "Zaremba et al., 2014, Recurrent Neural Network Regularization",
    "input_size": (20,),
    "num_classes": 10_000,
    "input_dtype": torch.int64,
    "batch_dim": 1,
}


@register_model(**_FACTS, parameters=4_653_200, macs=52_800_000)
def lstm_language_model(**options: Any) -> LanguageModel:
    """LSTM; `options` are those of :class:`LanguageModel`."""
    return LanguageModel("lstm", **options)


@register_model(**_FACTS, parameters=4_492_400, macs=49_600_000)
def gru_language_model(**options: Any) -> LanguageModel:
    """GRU; `options` are those of :class:`LanguageModel`."""
    return LanguageModel("gru", **options)


@register_model(**_FACTS, parameters=4_170_800, macs=43_200_000)
def rnn_language_model(**options: Any) -> LanguageModel:
    """Elman network; `options` are those of :class:`LanguageModel`."""
    return LanguageModel("rnn", **options)
