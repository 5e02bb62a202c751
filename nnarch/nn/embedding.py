"""Embedding, and the input layers of Transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import functional as F
from nnarch.nn.checks import check_dtype
from nnarch.nn.signature import signature_of


class Embedding(torch.nn.Embedding):
    """A table of rows, with the constructor and state_dict of torch.nn.Embedding.

    Args:
        num_embeddings, embedding_dim: rows and columns of the table.
        padding_idx: a row that starts as zeros and gets no gradient.
        max_norm, norm_type: rows that are read are scaled down to this norm, in place.
        scale_grad_by_freq: divide a row's gradient by how often it was read.
        sparse: whether the gradient of the table is a sparse tensor.

    Raises:
        ValueError: a dtype without kernels, or sparse together with scale_grad_by_freq.
    """

    @signature_of(torch.nn.Embedding)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_dtype("Embedding", self.weight.dtype)
        if self.sparse and self.scale_grad_by_freq:
            raise ValueError("Embedding: sparse cannot be combined with scale_grad_by_freq")

    def forward(self, input: Tensor) -> Tensor:
        """Look up ``input [...]``, giving ``[..., embedding_dim]``."""
        return F.embedding(
            input,
            self.weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
