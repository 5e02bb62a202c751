"""A training run that can be killed at any moment and goes on as if nothing had happened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Checkpoint:
    """The state of a run in one file: what has a state_dict, torch's random numbers, plain values.

    The file is replaced whole, so that a run which dies while it saves keeps its last state. A run
    that resumes is equal bit for bit to one that was never stopped, provided that it draws all its
    random numbers from torch's generator and that it saves between two steps.

    Args:
        path: of the file.
        parts: models, optimizers, schedulers, by name.
    """

    def __init__(self, path: Path, **parts: Any) -> None:
        self.path = path
        self.parts = parts

    def save(self, **values: Any) -> None:
        """Write the state of all parts and `values` (numbers, strings, tensors, lists of them)."""
        state = {
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": torch.get_rng_state(),
            "values": values,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self.path)

    def load(self) -> Mapping[str, Any] | None:
        """Put every part back to the saved state and return the values; None without a file."""
        if not self.path.exists():
            return None
        state = torch.load(self.path, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["random"])
        return state["values"]
