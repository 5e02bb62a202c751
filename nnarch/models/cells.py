"""The recurrent layers that a model can be built of, by name."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch.nn import Module

CELLS = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}
"""What `cell=` takes, and the class in a layer namespace."""

PAPERS = {
    "rnn": "Elman, 1990, Finding Structure in Time",
    "lstm": "Hochreiter and Schmidhuber, 1997, Long Short-Term Memory",
    "gru": "Cho et al., 2014, Learning Phrase Representations using RNN Encoder-Decoder",
}


def recurrent(cell: str, nn: ModuleType, *sizes: int, **options: Any) -> Module:
    """Recurrent layers of the kind `cell` from the namespace `nn`.

    Raises:
        ValueError: unknown cell.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    return getattr(nn, CELLS[cell])(*sizes, **options)
