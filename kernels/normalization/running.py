"""The running statistics of batch normalization, updated in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnarch import library
from nnarch.direct import DECLINED, WANTS_GRADIENT

from . import checks

_BelowAutograd = torch._C._AutoDispatchBelowAutograd

# In place, hence no declared operation: those change none of their arguments.
_native_update = library.define_native(
    "batch_norm_update(Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor mean, "
    "Tensor invstd, float momentum, float eps, int count) -> ()"
)
_HAS_UPDATE = "batch_norm_update" in library.native_op_names()
_direct_update = library.direct_native(_native_update)


def update_of(input: Tensor, mean: Tensor | None, var: Tensor | None) -> Callable[..., None] | None:
    """How a batch's statistics are mixed into the running ones; None where there are none.

    Raises:
        ValueError, TypeError: statistics that do not fit `input`.
    """
    given = [s for s in (mean, var) if s is not None]
    if not given:
        return None
    if _is_plain(given):
        if input.is_cpu and _HAS_UPDATE and _are_statistics_of(input, given):
            return _update_natively  # it checks for itself, before it writes
        if input.is_cuda and _gpu_update() is not None:
            checks.running_statistics(input, mean, var)
            return _update_on_a_gpu
    checks.running_statistics(input, mean, var)
    return _update_in_torch


def _is_plain(given: list[Tensor]) -> bool:
    """Whether nothing but a kernel has to see the update."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return all(type(s) is Tensor and not s.requires_grad and not s.is_inference() for s in given)


def _are_statistics_of(input: Tensor, given: list[Tensor]) -> bool:
    """Whether they have the dtype in which the statistics of `input` are computed."""
    dtype = torch.float32 if input.dtype in (torch.float16, torch.bfloat16) else input.dtype
    return all(s.dtype == dtype for s in given)


def _update_natively(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *arguments: Any,
) -> None:
    try:
        with _BelowAutograd():
            _native_update._op(running_mean, running_var, *arguments)
    except RuntimeError:
        checks.running_statistics(input, running_mean, running_var)
        raise
    _count_change(running_mean, running_var)


@functools.cache
def _gpu_update() -> Callable[..., Any] | None:
    """The same in Triton, by launch plans; None without Triton."""
    try:
        from nnarch.kernels.gpu.plans import planned
        from nnarch.kernels.normalization.triton_running import update
    except ImportError:
        return None
    return planned(update, _direct_update)


def _update_on_a_gpu(
    _: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *arguments: Any
) -> None:
    result = _direct_update(running_mean, running_var, *arguments)
    if result is DECLINED or result is WANTS_GRADIENT:
        update = _gpu_update()
        assert update is not None
        update(running_mean, running_var, *arguments)
    _count_change(running_mean, running_var)


def _count_change(*statistics: Tensor | None) -> None:
    """What keeps something made of these looks at their versions."""
    torch._C._increment_version([s for s in statistics if s is not None])


@torch.no_grad()
def _update_in_torch(
    _: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    momentum: float,
    eps: float,
    count: int,
) -> None:
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    if running_var is not None:
        biased = invstd.double().pow(-2).sub_(eps).clamp_min_(0)
        # In-place addition rounds to the dtype of running_var.
        running_var.mul_(1 - momentum).add_(biased, alpha=momentum * count / (count - 1))
