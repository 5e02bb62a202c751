"""Sums over all positions: the loss, and what a mean divides by. One launch, two of many positions.

A program adds PER_PROGRAM positions; where there are several, one more adds their parts in order:
the same bits in every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.launch import cdiv, device_guard, flat_grid, launch
from nnarch.kernels.gpu.tiles import tile

PER_PROGRAM = 8192
_TILE = tile(BLOCK=1024, num_warps=4)


@triton.jit
def _sum_kernel(
    value_ptr,  # [count] float32
    sum_ptr,  # [programs]
    count,
    per_program,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * per_program
    end = tl.minimum(first + per_program, count)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(value_ptr + i, mask=i < end, other=0.0)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total, 0).to(sum_ptr.dtype.element_ty))


@triton.jit
def _divisors_kernel(
    target_ptr,  # [positions] int64
    weight_ptr,  # [classes] or None
    weights_ptr,  # [programs] float32: the weights of the targets that are not ignored, or None
    count_ptr,  # [programs] float32: how many there are
    ignore_index,
    positions,
    classes,
    per_program,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * per_program
    end = tl.minimum(first + per_program, positions)
    count = tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + i, mask=i < end, other=0)
        kept = (i < end) & (target != ignore_index)
        count += kept.to(tl.float32)
        if weight_ptr is not None:
            known = kept & (target >= 0) & (target < classes)
            weights += tl.load(weight_ptr + target, mask=known, other=0.0).to(tl.float32)
    tl.store(count_ptr + tl.program_id(0), tl.sum(count, 0))
    if weights_ptr is not None:
        tl.store(weights_ptr + tl.program_id(0), tl.sum(weights, 0))


def sum_of(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of float32 numbers [n], n > 0, as a scalar of `dtype`."""
    programs = cdiv(values.numel(), PER_PROGRAM)
    if programs > 1:
        parts = values.new_empty(programs)
        _sum(values, parts, programs, PER_PROGRAM)
        values = parts
    result = values.new_empty((), dtype=dtype)
    _sum(values, result, 1, values.numel())
    return result


def _sum(values: torch.Tensor, sums: torch.Tensor, programs: int, per_program: int) -> None:
    arguments: dict[str, Any] = {"value_ptr": values, "sum_ptr": sums, "count": values.numel()}
    with device_guard(values):
        launch(_sum_kernel, flat_grid(programs), arguments | {"per_program": per_program}, _TILE)


def divisors(
    target: torch.Tensor, class_weight: torch.Tensor | None, classes: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the targets [n], n > 0, that are not ignored, and how many there are.

    Both are float32 scalars; without class weights they are one.
    """
    programs = cdiv(target.numel(), PER_PROGRAM)
    shape = () if programs == 1 else (programs,)
    count = target.new_empty(shape, dtype=torch.float32)
    weights = None if class_weight is None else torch.empty_like(count)
    arguments = {
        **{"target_ptr": target, "weight_ptr": class_weight, "weights_ptr": weights},
        **{"count_ptr": count, "ignore_index": ignore_index, "positions": target.numel()},
        **{"classes": classes, "per_program": PER_PROGRAM},
    }
    with device_guard(target):
        launch(_divisors_kernel, flat_grid(programs), arguments, _TILE)
    if programs > 1:
        count = sum_of(count, torch.float32)
        weights = None if weights is None else sum_of(weights, torch.float32)
    return (count if weights is None else weights), count
