"""What a benchmark case is: a layer or a model, its input, its work, the ratio it must reach."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# The largest relative error (L2) that counts as correct. In half precision: eight roundings.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}


@dataclass(frozen=True)
class Target:
    """Ratios to the best peer: the least that counts as done, and what the roofline allows."""

    must: float
    aim: float


@dataclass(frozen=True)
class Case:
    """One measured piece of work.

    Args:
        name: unique, without spaces: what `--only` matches and the CSV stores. By convention it
            ends in "_fb" where the backward is timed too, "_train" for a training step.
        group: the family it is listed under; also names its target.
        layer: builds the module from a layer namespace (``torch.nn`` or ``nnarch.nn``), so one
            line defines nnarch's side, torch's side and, in float64, the truth.
        shape: of the input.
        label: for people; the name by default.
        ours: how nnarch runs it, given the torch module with its weights, where that is more than
            the same layer out of ``nnarch.nn``: a fused call, :func:`nnarch.accelerate`.
        rivals: the peers of work that is no torch layer, by the name of their provider: each builds
            a call from the torch module. Only they are measured then, beside nnarch.
        backward: times forward and backward together, in training mode.
        input_grad: whether the backward also produces the gradient of the input.
        flops: of one forward; counted by torch where this is None.
        reads: bytes that a pass reads beside input and parameters, such as a cache of keys.
        target: ratios to reach; the group's by default.
        tolerance: largest relative error (L2) against float64 that still counts as correct; the
            dtype's by default.
        model: name of the whole model, None for a layer.
        quick: whether `--quick` includes it.
        seed: of weights and inputs.
        dtype: of input, weights and output. The truth starts from the rounded numbers.
        device: where they are.
    """

    name: str
    group: str
    layer: Callable[[Any], nn.Module]
    shape: tuple[int, ...]
    label: str = ""
    ours: Callable[[nn.Module], Callable[..., torch.Tensor]] | None = None
    rivals: Mapping[str, Callable[[nn.Module], Callable[..., torch.Tensor]]] = field(
        default_factory=dict
    )
    backward: bool = False
    input_grad: bool = True
    flops: int | None = None
    reads: int = 0
    target: Target | None = None
    tolerance: float | None = None
    model: str | None = None
    quick: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def allowed_error(self) -> float:
        """The tolerance: its own, or its dtype's."""
        return TOLERANCES[self.dtype] if self.tolerance is None else self.tolerance

    @property
    def title(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name

    @property
    def total_flops(self) -> int:
        """Operations of a call; the two gradients of a layer cost a forward each."""
        return self._forward_work[0] * (3 if self.backward else 1)

    @property
    def total_bytes(self) -> int:
        """Bytes that have to move: every tensor that a pass needs or makes, once a pass."""
        _, x, weights, y = self._forward_work
        if self.backward:  # reads dy, x and the weights again; writes dx and dw
            return self.dtype.itemsize * (3 * x + 3 * weights + 2 * y) + 2 * self.reads
        return self.dtype.itemsize * (x + weights + y) + self.reads

    def build(self) -> tuple[nn.Module, torch.Tensor]:
        """The torch module, in the mode it is measured in, and its input; the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            with torch.device(self.device):
                module = self.layer(nn).train(self.backward)
                x = torch.randn(self.shape)
            module = module.to(self.device)
        if not self.backward:
            _settle_batch_norm(module, x)
        return module.to(self.dtype), x.to(self.dtype)

    @functools.cached_property
    def _forward_work(self) -> tuple[int, int, int, int]:
        """Operations, and the elements of input, parameters and output; nothing is computed."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            module = self.layer(nn).train(self.backward)
            y = module(torch.empty(self.shape))
        flops = counter.get_total_flops() if self.flops is None else self.flops
        weights = sum(parameter.numel() for parameter in module.parameters())
        return flops, math.prod(self.shape), weights, y.numel()


def _settle_batch_norm(module: nn.Module, x: torch.Tensor) -> None:
    """Give untrained BatchNorm layers the statistics of `x`, so that a deep model in eval mode
    neither overflows nor fades into denormals."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        module(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
