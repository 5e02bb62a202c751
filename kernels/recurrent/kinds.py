"""The recurrent cells: their codes in schemas, their gates, and what a forward keeps."""

from __future__ import annotations

RNN_TANH, RNN_RELU, LSTM, GRU = range(4)

NAMES = ("rnn_tanh", "rnn_relu", "lstm", "gru")
"""By code."""

GATES = (1, 1, 4, 3)
"""Rows of a weight over the hidden size: gates i, f, g, o of the LSTM, r, z, n of the GRU."""

NORM_ROWS = 18
"""Rows of H in `norm`: gain 4 and bias 4 of the input's product, the same of the state's product,
gain and bias of the cell."""


def reserve_width(kind: int, normalized: bool) -> int:
    """How many values of H a forward keeps for the backward, a row of the sequence.

    RNN: none, its output is enough. LSTM: i, f, g, o after their activation, then c. A normalized
    LSTM: these, then both products before normalization, of the input (4) and of the state (4).
    GRU: r, z, n after their activation, then the state's part of n, W_hn·h + b_hn.
    """
    if kind == LSTM:
        return 13 if normalized else 5
    return 4 if kind == GRU else 0
