"""A launch plan: what a launcher did, as steps that run again with other tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from nnarch import library


@dataclass(frozen=True)
class Place:
    """A tensor by where it lies: bytes after the start of an argument or of an allocation."""

    slot: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def of(self, base: torch.Tensor) -> torch.Tensor:
        """The tensor, given the one at its slot."""
        same = base.shape == self.size and base.stride() == self.stride
        if same and self.offset == 0 and base.dtype == self.dtype:
            return base
        if base.dtype != self.dtype:
            base = base.view(-1).view(self.dtype)
        start = base.storage_offset() + self.offset // self.dtype.itemsize
        return base.as_strided(self.size, self.stride, start)


class Step:
    """Part of a plan. `tensors` and `pointers` hold the arguments and what steps before made."""

    def run(self, tensors: list[torch.Tensor], pointers: list[int]) -> None:
        raise NotImplementedError


@dataclass(frozen=True)
class Allocate(Step):
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def run(self, tensors: list[torch.Tensor], pointers: list[int]) -> None:
        new = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        tensors.append(new)
        pointers.append(new.data_ptr())


@dataclass(frozen=True)
class TorchCall(Step):
    """An operation of torch's, such as a copy to another layout or zeros."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    places: list[tuple[int, Place | list[Place]]]  # which arguments are tensors, or lists of them
    makes: list[Allocate]  # new tensors; where none, it writes one of its arguments

    def run(self, tensors: list[torch.Tensor], pointers: list[int]) -> None:
        args = list(self.args)
        for position, place in self.places:
            if isinstance(place, Place):
                args[position] = place.of(tensors[place.slot])
            else:
                args[position] = [p.of(tensors[p.slot]) for p in place]
        result = self.function(*args, **self.kwargs)
        if self.makes:
            for new in result if isinstance(result, (list, tuple)) else (result,):
                tensors.append(new)
                pointers.append(new.data_ptr())


@dataclass(frozen=True)
class KernelLaunch(Step):
    """A kernel. The interpreter takes tensors for pointers."""

    start: Callable[..., Any]
    compiled: Any  # what Triton made of it; None in the interpreter
    grid: tuple[int, ...]
    names: list[str]  # of all arguments, in the kernel's order
    values: list[Any]
    places: list[tuple[int, Place]]  # which of them are tensors
    described: list[tuple[int, Place, Any]]  # and tensor descriptors, which hold no tensor here

    def run(self, tensors: list[torch.Tensor], pointers: list[int]) -> None:
        values = self.values.copy()
        for position, place, descriptor in self.described:
            values[position] = found = copy.copy(descriptor)
            found.base = place.of(tensors[place.slot])
        if self.compiled is None:
            for position, place in self.places:
                values[position] = place.of(tensors[place.slot])
            self.start(*values)
            return
        for position, place in self.places:
            values[position] = pointers[place.slot] + place.offset
        stream = torch._C._cuda_getCurrentRawStream(tensors[0].device.index)
        self.start(*values, stream=stream)


@dataclass
class Plan:
    """What a launcher did."""

    steps: list[Step] = field(default_factory=list)
    results: Any = None
    algorithm: str = ""

    def run(self, tensors: list[torch.Tensor], pointers: list[int]) -> Any:
        """Do it again with other tensors of the same kind; both lists grow."""
        for step in self.steps:
            step.run(tensors, pointers)
        library.ran.algorithm = self.algorithm
        results = self.results
        if isinstance(results, Place):
            return results.of(tensors[results.slot])
        return tuple(place and place.of(tensors[place.slot]) for place in results)
