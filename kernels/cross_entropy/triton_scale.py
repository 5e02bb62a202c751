"""A gradient that is ready, times the gradient of the loss: one number that stays on the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, needs_int64
from nnarch.kernels.gpu.tiles import tile


@triton.jit
def scale_kernel(x_ptr, y_ptr, grad_ptr, count, INT64: tl.constexpr, BLOCK: tl.constexpr):
    """y = x · grad"""
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    i = pid * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0).to(tl.float32)
    y = x * tl.load(grad_ptr).to(tl.float32)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < count)


def scale_by(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """x times the scalar grad; x is contiguous."""
    y, block = torch.empty_like(x), 4096
    arguments = {"x_ptr": x, "y_ptr": y, "grad_ptr": grad, "count": x.numel()}
    grid = flat_grid(cdiv(x.numel(), block))
    launch(scale_kernel, grid, arguments | {"INT64": needs_int64(x)}, tile(BLOCK=block))
    return y


@triton.jit
def _scale_in_place_kernel(
    x_ptr,  # [count]
    factor_ptr,  # one number
    count,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:  # the usual gradient of a loss leaves the memory alone
        at = tl.program_id(0).to(tl.int64) if INT64 else tl.program_id(0)
        at = at * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < count).to(tl.float32)
        tl.store(x_ptr + at, (x * factor).to(x_ptr.dtype.element_ty), mask=at < count)


def scale_in_place(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x, contiguous, times the scalar `factor`, whose value the host does not wait for."""
    block = 4096
    arguments = {"x_ptr": x, "factor_ptr": factor, "count": x.numel(), "INT64": needs_int64(x)}
    launch(_scale_in_place_kernel, flat_grid(cdiv(x.numel(), block)), arguments, tile(BLOCK=block))
