"""Correctness before speed: every rival's output against the same computation in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from nnarch.benchmarking.case import Case

# The largest element may be off by this many times what the whole tensor may be off by.
_PEAK_FACTOR = 10.0
# Peers on a GPU may sum in fewer bits than we do. Their users get that time all the same.
PEER_SLACK = 8.0


@dataclass(frozen=True)
class Verdict:
    """How far an output is from the truth.

    Args:
        error: relative L2 error, the worst of all tensors compared.
        reason: "" where the output is right, else what is wrong with it.
    """

    error: float
    reason: str = ""

    @property
    def right(self) -> bool:
        """Whether the output may be timed."""
        return not self.reason


class Problem:
    """A case made concrete: torch module, input, output gradient, and the truth in float64.

    Args:
        case: what to build.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.module, self.x = case.build()

    def fresh(self, memory_format: torch.memory_format | None) -> tuple[nn.Module, torch.Tensor]:
        """A copy of module and input that a rival may own, in the memory format it prefers."""
        module, x = copy.deepcopy(self.module), self.x.clone()
        _flatten_recurrent(module)
        if memory_format is not None and x.dim() == 4:
            module = in_format(module, memory_format)
            x = x.contiguous(memory_format=memory_format)
        x.requires_grad_(self.case.backward and self.case.input_grad)
        return module, x

    def output_gradient(self, y: torch.Tensor) -> torch.Tensor:
        """The gradient to pull back, the same numbers for every rival, in the layout of `y`."""
        generator = torch.Generator(y.device).manual_seed(self.case.seed + 1)
        gradient = torch.randn(y.shape, generator=generator, device=y.device)
        return torch.empty_like(y).copy_(gradient.to(self.case.dtype))

    @cached_property
    def truth(self) -> tuple[torch.Tensor, ...]:
        """The output, and the gradients where the case has a backward, in float64, on the case's
        device."""
        with _without_search():
            return self._compute_truth()

    def _compute_truth(self) -> tuple[torch.Tensor, ...]:
        module, x = copy.deepcopy(self.module).double(), self.x.double()
        if not self.case.backward:
            with torch.no_grad():
                return (module(x),)
        x.requires_grad_(self.case.input_grad)
        y = module(x)
        y.backward(self.output_gradient(y))
        return (y.detach(), *gradients(module, x))

    def judge(self, outputs: Sequence[torch.Tensor], slack: float = 1.0) -> Verdict:
        """Compare what a rival computed with the truth; errors may be `slack` times as large."""
        if len(outputs) != len(self.truth):
            return Verdict(float("nan"), f"{len(outputs)} tensors, expected {len(self.truth)}")
        worst = 0.0
        for got, expected in zip(outputs, self.truth, strict=True):
            if got.shape != expected.shape:
                return Verdict(
                    float("nan"), f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
                )
            off = (got.double() - expected).abs()
            relative = float(off.norm() / expected.norm().clamp_min(1e-300))
            peak = float(off.max() / expected.abs().max().clamp_min(1e-300))
            # Written so that a NaN counts as wrong.
            allowed = slack * self.case.allowed_error
            if not (relative <= allowed and peak <= _PEAK_FACTOR * allowed):
                return Verdict(relative, f"off by {relative:.1e} (L2), {peak:.1e} (max)")
            worst = max(worst, relative)
        return Verdict(worst)


@contextmanager
def _without_search() -> Iterator[None]:
    """cuDNN's search for its fastest algorithm, which is slow in float64, is left out."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _flatten_recurrent(module: nn.Module) -> None:
    """Put the weights of recurrent layers side by side again, which a copy does not keep: cuDNN
    would copy them in every call."""
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            layer.flatten_parameters()


def in_format(module: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """The module with its 4-D parameters in a memory format, in place."""
    return cast(Any, module).to(memory_format=memory_format)  # torch's annotations lack this form


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The gradients a backward left behind: of the input, then of every parameter."""
    leaves = ([x] if x.requires_grad else []) + list(module.parameters())
    missing = torch.tensor(float("nan"))
    return [missing if leaf.grad is None else leaf.grad for leaf in leaves]
