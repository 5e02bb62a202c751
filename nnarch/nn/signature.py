"""Constructors that pass on what they are given, with the signature of torch.nn's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.nn import Module

Function = TypeVar("Function", bound=Callable[..., None])


def signature_of(twin: type[Module]) -> Callable[[Function], Function]:
    """For an ``__init__(self, *args, **kwargs)``: what `inspect.signature` says of it.

    ``torch.nn.utils.skip_init``, for one, looks for ``device`` there.

    Args:
        twin: the class of torch.nn whose constructor takes the arguments.
    """

    def mark(function: Function) -> Function:
        function.__wrapped__ = twin.__init__  # type: ignore[attr-defined]
        return function

    return mark
