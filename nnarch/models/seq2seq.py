"""Sequence to sequence: an encoder reads, a decoder writes, attention looks back.

Sources: Sutskever, Vinyals and Le, 2014, Sequence to Sequence Learning with Neural Networks; Luong,
Pham and Manning, 2015, Effective Approaches to Attention-based Neural Machine Translation, for the
attention ("dot" scores, global).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import nnarch.nn
from nnarch.models.cells import PAPERS, recurrent
from nnarch.models.decoding import greedy
from nnarch.models.registry import register_model


class Seq2Seq(Module):
    """Two stacks of recurrent layers; the decoder starts from the encoder's last state.

    Args:
        cell: "rnn", "lstm" or "gru".
        vocabulary: tokens of the source and of the target.
        embedding, hidden: sizes.
        layers: of the encoder and of the decoder.
        attention: whether every output also sees an average of the encoder's outputs, weighted by
            their products with the decoder's.
        dropout: after embeddings, between layers and before the output.
        nn: the layer namespace.

    Raises:
        ValueError: unknown cell.
    """

    def __init__(
        self,
        cell: str = "lstm",
        *,
        vocabulary: int = 10_000,
        embedding: int = 256,
        hidden: int = 512,
        layers: int = 2,
        attention: bool = True,
        dropout: float = 0.0,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        between = dropout if layers > 1 else 0.0
        self.source_embedding = nn.Embedding(vocabulary, embedding)
        self.encoder = recurrent(cell, nn, embedding, hidden, layers, dropout=between)
        self.target_embedding = nn.Embedding(vocabulary, embedding)
        self.decoder = recurrent(cell, nn, embedding, hidden, layers, dropout=between)
        self.combine = nn.Linear(2 * hidden, hidden, bias=False) if attention else None
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, source: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, vocabulary]`` of the token after each of ``target [B, T]``.

        Args:
            source: [B, S] tokens.
            target: [B, T] tokens, from the one that starts a sentence.
            lengths: [B], how many tokens of each source count; None: all.
        """
        memory, mask, state = self.encode(source, lengths)
        return self.decode(target, memory, mask, state)[0]

    def encode(
        self, source: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Any]:
        """The encoder's outputs [B, S, hidden], which of them are padding [B, S], its state."""
        x: Any = self.dropout(self.source_embedding(source.t()))
        if lengths is None:
            memory, state = self.encoder(x)
            return memory.transpose(0, 1), None, state
        packed, state = self.encoder(pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False))
        memory, _ = pad_packed_sequence(packed, batch_first=True, total_length=source.shape[1])
        places = torch.arange(source.shape[1], device=source.device)
        return memory, places >= lengths.to(source.device)[:, None], state

    def decode(
        self, target: Tensor, memory: Tensor, mask: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        """Logits [B, T, vocabulary] and the state after them, from where `state` is."""
        y, state = self.decoder(self.dropout(self.target_embedding(target.t())), state)
        y = y.transpose(0, 1)
        if self.combine is not None:
            y = self.combine(torch.cat([self._attend(y, memory, mask), y], 2)).tanh()
        return self.output(self.dropout(y)), state

    def _attend(self, y: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        scores = y @ memory.transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None], float("-inf"))
        return scores.softmax(2) @ memory

    @torch.no_grad()
    def generate(
        self, source: Tensor, start: int, end: int, limit: int, lengths: Tensor | None = None
    ) -> Tensor:
        """The likeliest token at every step: [B, up to limit], filled with `end` after the first.

        Args:
            source: [B, S] tokens.
            start: the token that starts a sentence.
            end: the token that ends it.
            limit: longest output.
            lengths: of the sources, as in :meth:`forward`.
        """
        memory, mask, state = self.encode(source, lengths)

        def step(token: Tensor) -> Tensor:
            nonlocal state
            logits, state = self.decode(token, memory, mask, state)
            return logits[:, -1]

        return greedy(step, source.new_full((source.shape[0], 1), start), limit, end, filler=end)


_FACTS = {"input_size": (20,), "inputs": 2, "vocabulary": 10_000, "num_classes": 10_000}
_LUONG = "Luong et al., 2015, Effective Approaches to Attention-based Neural Machine Translation"


@register_model(**_FACTS, paper=PAPERS["rnn"], parameters=12_613_392, macs=149_585_920)
def rnn_seq2seq(**options: Any) -> Seq2Seq:
    """Elman networks; `options` are those of :class:`Seq2Seq`."""
    return Seq2Seq("rnn", **options)


@register_model(**_FACTS, paper=_LUONG, parameters=18_130_704, macs=259_686_400)
def lstm_seq2seq(**options: Any) -> Seq2Seq:
    """LSTMs; `options` are those of :class:`Seq2Seq`."""
    return Seq2Seq("lstm", **options)


@register_model(**_FACTS, paper=PAPERS["gru"], parameters=16_291_600, macs=222_986_240)
def gru_seq2seq(**options: Any) -> Seq2Seq:
    """GRUs; `options` are those of :class:`Seq2Seq`."""
    return Seq2Seq("gru", **options)
