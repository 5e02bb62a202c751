"""One step of a recurrent cell, with the argument order of torch's functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnarch import arrays

from . import autocast, kinds
from .cell_op import step


@arrays.public
def recurrent_cell(
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    packed: Tensor | None,
    kind: int,
) -> tuple[Tensor, Tensor]:
    """One step of any cell: the new h, and the new c (empty but for the LSTM)."""
    if autocast.is_on():
        tensors = (input, h, c, w_ih, w_hh, b_ih, b_hh)
        input, h, c, w_ih, w_hh, b_ih, b_hh = autocast.cast(kind, autocast.CELLS, *tensors)
    return step(input, h, c, w_ih, w_hh, b_ih, b_hh, packed, kind)


def lstm_cell(
    input: Tensor,
    hx: Any,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM, as torch.lstm_cell.

    Args:
        input: [B, I].
        hx: h [B, H] and c [B, H].
        w_ih, w_hh: [4H, I] and [4H, H], gates i, f, g, o.
        b_ih, b_hh: [4H] or None.
        packed: what :func:`pack_recurrent_weights` made of the weights; or None.

    Returns:
        The new h and c.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    return recurrent_cell(input, *hx, w_ih, w_hh, b_ih, b_hh, packed, kinds.LSTM)


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    packed: Tensor | None = None,
) -> Tensor:
    """One step of a GRU, as torch.gru_cell.

    Args:
        input: [B, I].
        hx: [B, H].
        w_ih, w_hh: [3H, I] and [3H, H], gates r, z, n.
        b_ih, b_hh: [3H] or None.
        packed: what :func:`pack_recurrent_weights` made of the weights; or None.

    Returns:
        The new h.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    return recurrent_cell(input, hx, None, w_ih, w_hh, b_ih, b_hh, packed, kinds.GRU)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    packed: Tensor | None = None,
) -> Tensor:
    """One step of an Elman network, as torch.rnn_tanh_cell and torch.rnn_relu_cell.

    Args:
        input: [B, I].
        hx: [B, H].
        w_ih, w_hh: [H, I] and [H, H].
        b_ih, b_hh: [H] or None.
        nonlinearity: "tanh" or "relu".
        packed: what :func:`pack_recurrent_weights` made of the weights; or None.

    Returns:
        The new h.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    kind = kinds.RNN_TANH if nonlinearity == "tanh" else kinds.RNN_RELU
    return recurrent_cell(input, hx, None, w_ih, w_hh, b_ih, b_hh, packed, kind)[0]
