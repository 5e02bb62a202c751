"""Local response normalization: the constructor of torch.nn, our kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from nnarch import functional as F


class LocalResponseNorm(torch.nn.LocalResponseNorm):
    """Channels over a power of their neighbours' energy; see torch.nn.LocalResponseNorm.

    alpha weighs the mean of the squares, as in torch and Caffe; :func:`nnarch.functional.
    local_response_norm` also takes the paper's, which weighs their sum.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`."""
        return F.local_response_norm(input, self.size, self.alpha, self.beta, self.k)
