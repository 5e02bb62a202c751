"""Layers of the cases on a GPU, in torch's form and in nnarch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nnarch.benchmarking.attention_cases import attention_function


class Attention(nn.Module):
    """Queries [B·H, L, D] on keys and values that are parameters: they have gradients of their own.

    Three dimensions, since four would be made channels_last.

    Args:
        namespace: ``torch.nn`` or ``nnarch.nn``.
        batch, heads: of the queries.
        groups: heads of keys and values.
        keys, depth: S and D.
        causal: whether a position sees only those up to itself.
        masked: whether a bool mask hides a tenth of the pairs.
    """

    def __init__(
        self,
        namespace: Any,
        batch: int,
        heads: int,
        groups: int,
        keys: int,
        depth: int,
        causal: bool,
        masked: bool,
    ) -> None:
        super().__init__()
        self.attend, self.causal = attention_function(namespace), causal
        self.size = (batch, groups, keys, depth)
        self.heads = heads
        self.k = nn.Parameter(torch.randn(batch * groups, keys, depth))
        self.v = nn.Parameter(torch.randn(batch * groups, keys, depth))
        self.register_buffer("mask", torch.rand(keys, keys) < 0.9 if masked else None)

    def forward(self, x: Tensor) -> Tensor:
        """[B·H, L, D] to [B, H, L, D], in whatever layout: a copy would be timed too."""
        batch, groups = self.size[:2]
        q = x.view(batch, self.heads, *x.shape[1:])
        mask: Any = self.mask
        if mask is not None:
            mask = mask[None, None]
        k, v = self.k.view(self.size), self.v.view(self.size)
        grouped = groups != self.heads
        return self.attend(q, k, v, mask, is_causal=self.causal, enable_gqa=grouped)


class Lookup(nn.Module):
    """Rows of a table, the same in every call; the input's numbers are not used."""

    def __init__(self, namespace: Any, rows: int, columns: int, tokens: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.randint(0, rows, (tokens,)))
        self.table = namespace.Embedding(rows, columns)

    def forward(self, x: Tensor) -> Tensor:
        """[1, D] to [tokens, D]."""
        tokens: Any = self.tokens
        return self.table(tokens)


class LossOfLogits(nn.Module):
    """Logits in, the mean loss out."""

    def __init__(self, namespace: Any, rows: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("target", torch.randint(0, classes, (rows,)))
        self.loss = namespace.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        """[N, V] to a number."""
        return self.loss(x, self.target)


class _LinearThenLoss(nn.Module):
    """What a model does without the fused loss."""

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(depth, classes, bias=False)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.linear(x), target)


class LossOfLinear(nn.Module):
    """Hidden states in, the mean loss of a language model's head out."""

    def __init__(self, namespace: Any, rows: int, depth: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("target", torch.randint(0, classes, (rows,)))
        if namespace is nn:
            self.loss: nn.Module = _LinearThenLoss(depth, classes)
        else:
            self.loss = namespace.LinearCrossEntropyLoss(depth, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] to a number."""
        return self.loss(x, self.target)
