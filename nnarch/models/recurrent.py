"""What the models of recurrent layers share: the choice of the cell."""

from __future__ import annotations

from types import ModuleType
from typing import Any

CELLS = ("lstm", "gru", "rnn")


def recurrent_layer(cell: str, nn: ModuleType) -> Any:
    """The layer class of a cell: nn.LSTM, nn.GRU or nn.RNN.

    Raises:
        ValueError: `cell` is none of "lstm", "gru" and "rnn".
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    return getattr(nn, cell.upper())
