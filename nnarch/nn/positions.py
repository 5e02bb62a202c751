"""Positions of tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

_LAYOUTS = ("interleaved", "concatenated")
_BASE = 10_000.0


class SinusoidalPositionalEncoding(Module):
    """Adds fixed sines and cosines of the positions: wavelengths from 2π to 10000·2π.

    Nothing is learned, and nothing is in the state_dict.

    Args:
        d_model: features.
        max_length: positions that are computed at once; further ones follow when they are met.
        layout: "interleaved" has sine and cosine of one wavelength side by side, as the paper and
            tensor2tensor's readers know it; "concatenated" all sines before all cosines, as Marian
            has them.
        batch_first: whether inputs are [B, L, d_model]; else [L, B, d_model].
        device, dtype: of the table.

    Raises:
        ValueError: unknown layout, or sizes below 1.

    Source: Vaswani et al., 2017, Attention Is All You Need, section 3.5.
    """

    table: Tensor

    def __init__(
        self,
        d_model: int,
        max_length: int = 512,
        *,
        layout: str = "interleaved",
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if layout not in _LAYOUTS:
            raise ValueError(
                f"SinusoidalPositionalEncoding: layout must be one of {', '.join(_LAYOUTS)}, got "
                f"{layout!r}"
            )
        if d_model < 1 or max_length < 1:
            raise ValueError(
                "SinusoidalPositionalEncoding: d_model and max_length must be at least 1, got "
                f"{d_model} and {max_length}"
            )
        self.d_model = d_model
        self.layout = layout
        self.batch_first = batch_first
        table = sinusoids(max_length, d_model, layout)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.register_buffer("table", table.to(device=device, dtype=dtype), persistent=False)

    def forward(self, x: Tensor, offset: int = 0) -> Tensor:
        """Add the positions from `offset` on to ``x [B, L, d_model]``, or ``[L, d_model]``."""
        if x.dim() not in (2, 3) or x.shape[-1] != self.d_model:
            raise ValueError(
                f"SinusoidalPositionalEncoding: x must be [batch, length, {self.d_model}] or "
                f"[length, {self.d_model}], got {tuple(x.shape)}"
            )
        by_column = x.dim() == 3 and not self.batch_first
        length = x.shape[0] if by_column or x.dim() == 2 else x.shape[1]
        rows = self.rows(offset, length)
        return x + (rows[:, None] if by_column else rows)

    def rows(self, offset: int, length: int) -> Tensor:
        """The encodings ``[length, d_model]`` of the positions from `offset` on."""
        if offset < 0:
            raise ValueError(
                f"SinusoidalPositionalEncoding: offset must not be negative, got {offset}"
            )
        if offset + length > len(self.table):
            self.table = sinusoids(
                max(offset + length, 2 * len(self.table)), self.d_model, self.layout
            ).to(self.table)
        return self.table[offset : offset + length]

    def extra_repr(self) -> str:
        """The arguments, for repr()."""
        return f"{self.d_model}, layout={self.layout}"


def sinusoids(length: int, d_model: int, layout: str = "interleaved") -> Tensor:
    """Encodings ``[length, d_model]`` of the positions from 0 on, in float64.

    Args:
        length, d_model: sizes.
        layout: "interleaved" or "concatenated", as :class:`SinusoidalPositionalEncoding` has it.
    """
    sines = (d_model + 1) // 2
    rates = _BASE ** (-2 * torch.arange(sines, dtype=torch.float64) / d_model)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    sine, cosine = angles.sin(), angles.cos()[:, : d_model // 2]
    if layout == "concatenated":
        return torch.cat([sine, cosine], 1)
    table = torch.empty(length, d_model, dtype=torch.float64)
    table[:, 0::2], table[:, 1::2] = sine, cosine
    return table
