"""Dropout without a mask in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from nnarch import functional as F


class Dropout(torch.nn.Dropout):
    """Zeroes elements with probability p in training, as torch.nn.Dropout.

    Args:
        p: probability of an element to be zeroed, 0 to 1.
        inplace: whether to overwrite the input.

    Raises:
        ValueError: p outside [0, 1].

    Source: Srivastava et al., 2014, Dropout.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of a tensor of any shape; in eval mode return it."""
        return F.dropout(input, self.p, self.training, self.inplace)
