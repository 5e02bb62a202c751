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
        input_size: of one input without the batch: (channels, height, width) of the images it was
            designed for, (steps, features) of series, (steps,) of tokens.
        num_classes: outputs.
        parameters: trainable values.
        macs: multiply-adds of convolutions, linear, recurrent and attention layers for one image or
            sequence.
            Papers that report "FLOPs" of classifiers mostly mean this number.
        top1: accuracy in percent on the data set that `reference` names, or None.
        reference: where `top1` comes from.
        vocabulary: inputs are tokens below this number; None: real values.
        inputs: how many inputs of `input_size` a call takes.
    """

    name: str
    paper: str
    input_size: tuple[int, ...]
    num_classes: int
    parameters: int
    macs: int
    top1: float | None = None
    reference: str = ""
    vocabulary: int | None = None
    inputs: int = 1

    @property
    def flops(self) -> int:
        """Floating-point operations for one image or sequence: a multiply-add is two."""
        return 2 * self.macs

    def example_inputs(self, batch: int = 1, device: str = "cpu") -> tuple[Tensor, ...]:
        """Random inputs for a call of the model: images, series or tokens."""
        size = (batch, *self.input_size)
        if self.vocabulary is None:
            return tuple(torch.randn(size, device=device) for _ in range(self.inputs))
        return tuple(
            torch.randint(self.vocabulary, size, device=device) for _ in range(self.inputs)
        )


_builders: dict[str, tuple[Builder, ModelInfo]] = {}
_REFUSED = re.compile(r"(?P<why>unexpected|multiple values for) keyword argument '(?P<option>\w+)'")


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
        TypeError: an option that the architecture does not have, or that its name settles.
    """
    builder, _ = _find("create_model", name)
    classes = options.get("num_classes", 1)
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise ValueError(f"create_model: num_classes must be a positive int, got {classes!r}")
    if not hasattr(options.get("nn", torch.nn), "Module"):
        raise TypeError(f"create_model: nn must be a namespace of layers, got {options['nn']!r}")
    try:
        return builder(**options)
    except TypeError as error:
        refused = _REFUSED.search(str(error))
        if refused is None or refused["option"] not in options:
            raise
        why = "has no option" if refused["why"] == "unexpected" else "settles by its name"
        raise TypeError(f"create_model: {name} {why} {refused['option']!r}") from None


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
