"""How much rounding an algorithm may add to be faster."""

from __future__ import annotations

import ctypes

from nnarch import library

LEVELS = ("highest", "high", "medium")
_state = {"level": "high"}


def set_precision(level: str) -> None:
    """Choose which algorithms convolutions and recurrent layers may use, for the whole process.

    Args:
        level: "highest": sums of products only, as the definition has them. "high", the default:
            also Winograd's algorithm with tiles of 2×2 to 4×4 outputs (along the rows alone for
            7×7 depthwise kernels), and Strassen's for 1×1 kernels of modules in eval mode, whose
            errors are at most 5e-6 of the largest output (inputs of unit variance, He-scaled
            weights); and Strassen's for pairs of sequences of LSTMs and RNNs in eval mode (README
            of recurrent). "medium": also 5×5 and 6×6, with errors up to 1.2e-5 where they were
            measured (README of conv2d).

    Raises:
        ValueError: another level.
    """
    if level not in LEVELS:
        raise ValueError(f"set_precision: level must be one of {', '.join(LEVELS)}, got {level!r}")
    _state["level"] = level
    if library.native is not None:
        library.native.nnarch_set_precision(ctypes.c_int64(LEVELS.index(level)))


def get_precision() -> str:
    """The level that :func:`set_precision` chose."""
    return _state["level"]
