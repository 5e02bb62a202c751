"""The squash on the GPU and its gradient: one pass over memory each.

A program holds BLOCK_N vectors of any stride with all their values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    flat_grid,
    launch,
    needs_int64,
)
from nnarch.kernels.gpu.static import StaticCase
from nnarch.kernels.gpu.tiles import tile

_ELEMENTS = 1024
_MOST = 8192  # values of a vector that registers hold


@triton.jit
def _squash_fwd_kernel(
    x_ptr, y_ptr, outer, dim, inner, INT64: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = x · |x| / (1 + |x|²) along the middle of [outer, dim, inner]."""
    n = tl.program_id(0)
    if INT64:
        n = n.to(tl.int64)
    n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    offset = (n // inner * dim * inner + n % inner)[:, None] + d[None, :] * inner
    inside = (n < outer * inner)[:, None] & (d < dim)[None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    energy = tl.sum(x * x, axis=1)[:, None]
    y = x * (tl.sqrt(energy) / (1.0 + energy))
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _squash_bwd_kernel(
    grad_ptr, x_ptr, dx_ptr, outer, dim, inner, INT64: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = grad·n/(1+n²) + x·⟨grad, x⟩·(1-n²)/(n·(1+n²)²) with n = |x|; at zero 0."""
    n = tl.program_id(0)
    if INT64:
        n = n.to(tl.int64)
    n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    offset = (n // inner * dim * inner + n % inner)[:, None] + d[None, :] * inner
    inside = (n < outer * inner)[:, None] & (d < dim)[None, :]
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    energy = tl.sum(x * x, axis=1)[:, None]
    norm, factor = tl.sqrt(energy), 1.0 + energy
    along = tl.sum(grad * x, axis=1)[:, None] * (1.0 - energy)
    along = along / tl.where(norm == 0.0, 1.0, norm * factor * factor)
    dx = grad * (norm / factor) + x * along
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------- launchers


def squash(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``nnarch::squash``."""
    check_dtype("squash", x)
    y = library.new_output(x, x.shape)
    _launch("squash", _squash_fwd_kernel, {"x": x}, "y", y, dim)
    return y


def squash_grad(grad: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """``nnarch::squash_grad``."""
    check_dtype("squash_grad", grad, x)
    dx = library.new_output(x, x.shape)
    _launch("squash_grad", _squash_bwd_kernel, {"grad": grad, "x": x}, "dx", dx, dim)
    return dx


def _launch(
    op: str, kernel: object, inputs: dict[str, torch.Tensor], name: str, out: torch.Tensor, dim: int
) -> None:
    if out.numel() == 0:
        return
    dim %= max(1, out.dim())
    size = out.shape[dim] if out.dim() else 1
    if size > _MOST:
        raise NotImplementedError(f"backend 'triton' lacks nnarch::{op} for vectors of {size}")
    order = list(range(out.dim()))
    if not out.is_contiguous():  # channels_last: the order of memory
        order = [0, 2, 3, 1]
    dense = {k: t.permute(order).contiguous() for k, t in inputs.items()}
    place = order.index(dim) if order else 0
    sizes = [out.shape[i] for i in order]
    inner = torch.Size(sizes[place + 1 :]).numel()
    outer = torch.Size(sizes[:place]).numel()
    block_d = triton.next_power_of_2(size)
    block = tile(BLOCK_N=max(1, _ELEMENTS // block_d), BLOCK_D=block_d, num_warps=4)
    arguments = {
        **{f"{k}_ptr": t for k, t in dense.items()},
        **{f"{name}_ptr": out, "outer": outer, "dim": size, "inner": inner},
        "INT64": needs_int64(out),
    }
    programs = cdiv(outer * inner, dict(block.block)["BLOCK_N"])
    with device_guard(out):
        launch(kernel, flat_grid(programs), arguments, block)


# ------------------------------------------------------------------------------ static checks

_SIZE = (128, 1152, 8)  # primary capsules of MNIST's CapsNet
_COUNT = float(torch.Size(_SIZE).numel())


def _case(dtype: torch.dtype, backward: bool) -> None:
    x = torch.empty(_SIZE, dtype=dtype, device="meta")
    squash_grad(x, x, -1) if backward else squash(x, -1)


STATIC_CASES = [
    StaticCase(
        f"{name} B128 1152×8",
        lambda dtype, backward=backward: _case(dtype, backward),
        flops=flops * _COUNT,
        elements=tensors * _COUNT,
    )
    for name, backward, flops, tensors in (("squash", False, 4, 2), ("squash_grad", True, 8, 3))
]
