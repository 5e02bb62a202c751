"""The registry: every architecture by name, with its paper, its size and its known accuracy."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

Builder = Callable[..., Module]


@dataclass(frozen=True)
class ModelInfo:
    """Facts about an architecture as its builder makes it by default.

    Attributes:
        name: what :func:`create_model` takes.
        paper: authors, year and title.
        input_size: one example: (channels, height, width) of the images it was designed for, or
            (steps, …) of a sequence.
        num_classes: outputs, the last size of what the model returns.
        parameters: trainable values.
        macs: multiply-adds of the convolutions, linear and recurrent layers for one example. Papers
            that report "FLOPs" of classifiers mostly mean this number.
        top1: accuracy in percent on the data set that `reference` names, or None.
        reference: where `top1` comes from.
        input_dtype: torch.int64 for models that read tokens.
        batch_dim: the dimension of the input that counts examples; 1 for sequences, [T, B, …].
        input_count: inputs of that size that the model takes.
    """

    name: str
    paper: str
    input_size: tuple[int, ...]
    num_classes: int
    parameters: int
    macs: int
    top1: float | None = None
    reference: str = ""
    input_dtype: torch.dtype = torch.float32
    batch_dim: int = 0
    input_count: int = 1

    def example_inputs(
        self, batch: int = 1, device: torch.device | str = "meta"
    ) -> tuple[Tensor, ...]:
        """Zeros in the shapes that the model takes; on the meta device, where they have no values,
        they are what :func:`summary` needs."""
        size = (*self.input_size[: self.batch_dim], batch, *self.input_size[self.batch_dim :])
        return tuple(
            torch.zeros(size, dtype=self.input_dtype, device=device)
            for _ in range(self.input_count)
        )

    @property
    def flops(self) -> int:
        """Floating-point operations for one example: a multiply-add is two."""
        return 2 * self.macs


_builders: dict[str, tuple[Builder, ModelInfo]] = {}


def register_model(**facts: Any) -> Callable[[Builder], Builder]:
    """Enter a builder function under its own name; `facts` are fields of :class:`ModelInfo`."""

    def register(builder: Builder) -> Builder:
        name = builder.__name__
        if name in _builders:
            raise ValueError(f"register_model: {name!r} is registered twice")
        _builders[name] = (builder, ModelInfo(name=name, **facts))
        return builder

    return register


def create_model(name: str, **options: Any) -> Module:
    """Build an architecture with freshly initialised weights.

    Args:
        name: one of :func:`list_models`.
        **options: the builder's arguments: ``num_classes=``, ``nn=`` (the layer namespace;
            ``torch.nn`` builds the reference twin), and what the architecture offers.

    Returns:
        The model in training mode, as a constructor would.

    Raises:
        ValueError: unknown name, or an option value that the builder refuses.
        TypeError: an option that the builder does not have.
    """
    return _find("create_model", name)[0](**options)


def list_models(pattern: str = "*") -> list[str]:
    """The names that match a shell pattern such as ``"resnet*"``, sorted."""
    return sorted(fnmatch.filter(_builders, pattern), key=_natural_order)


def model_info(name: str) -> ModelInfo:
    """Paper, size and known accuracy of an architecture.

    Raises:
        ValueError: unknown name.
    """
    return _find("model_info", name)[1]


def _find(function: str, name: str) -> tuple[Builder, ModelInfo]:
    try:
        return _builders[name]
    except (KeyError, TypeError):
        close = difflib.get_close_matches(str(name), _builders)
        hint = f"did you mean {' or '.join(close)}?" if close else "list_models() shows all names"
        raise ValueError(f"{function}: no model is called {name!r}; {hint}") from None


def _natural_order(name: str) -> list[str | int]:
    """A sort key that puts resnet18 before resnet101."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
