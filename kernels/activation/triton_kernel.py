"""The activation operations on the GPU: one pass over memory each, any strides.

A program computes BLOCK elements in the order of the output's memory. The dimensions of all
operands are merged where their strides allow, so that dense tensors are flat; up to three merged
dimensions (slices, expanded gradients, mixed memory formats) are addressed without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.gpu.epilogue import (
    activation_derivative,
    activation_second_derivative,
    apply_activation,
)
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    flat_grid,
    launch,
    needs_int64,
)
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.gpu.tiles import tile

_MAX_RANK = 3
_TILE = tile(BLOCK=1024, num_warps=4)


@triton.jit
def element_range(elements, INT64: tl.constexpr, BLOCK: tl.constexpr):
    """The indices of this program's elements, and which of them exist."""
    pid = tl.program_id(0)
    if INT64:
        pid = pid.to(tl.int64)
    index = pid * BLOCK + tl.arange(0, BLOCK)
    return index, index < elements


@triton.jit
def element_offset(index, size_1, size_2, stride_0, stride_1, stride_2, RANK: tl.constexpr):
    """Offset of the elements with a linear index in a tensor [·, size_1, size_2]."""
    if RANK == 1:
        return index * stride_2
    if RANK == 2:
        return index // size_2 * stride_1 + index % size_2 * stride_2
    row = index // size_2
    return row // size_1 * stride_0 + row % size_1 * stride_1 + index % size_2 * stride_2


@triton.jit
def _activation_fwd_kernel(
    x_ptr,
    y_ptr,  # dense
    alpha,
    elements,
    size_1,
    size_2,
    stride_x0,
    stride_x1,
    stride_x2,
    KIND: tl.constexpr,
    RANK: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = act(x)"""
    index, inside = element_range(elements, INT64, BLOCK)
    x_offset = element_offset(index, size_1, size_2, stride_x0, stride_x1, stride_x2, RANK)
    x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
    y = apply_activation(x, KIND, alpha)
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _activation_bwd_kernel(
    grad_ptr,
    saved_ptr,
    gradgrad_ptr,  # None: the first derivative
    dx_ptr,  # dense
    alpha,
    elements,
    size_1,
    size_2,
    stride_grad0,
    stride_grad1,
    stride_grad2,
    stride_saved0,
    stride_saved1,
    stride_saved2,
    stride_gradgrad0,
    stride_gradgrad1,
    stride_gradgrad2,
    KIND: tl.constexpr,
    RANK: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dx = grad · act'(saved), or gradgrad · grad · act''(saved)"""
    index, inside = element_range(elements, INT64, BLOCK)
    g_offset = element_offset(index, size_1, size_2, stride_grad0, stride_grad1, stride_grad2, RANK)
    s_offset = element_offset(
        index, size_1, size_2, stride_saved0, stride_saved1, stride_saved2, RANK
    )
    grad = tl.load(grad_ptr + g_offset, mask=inside, other=0.0).to(tl.float32)
    saved = tl.load(saved_ptr + s_offset, mask=inside, other=0.0).to(tl.float32)
    if gradgrad_ptr is None:
        dx = grad * activation_derivative(saved, KIND, alpha)
    else:
        a_offset = element_offset(
            index, size_1, size_2, stride_gradgrad0, stride_gradgrad1, stride_gradgrad2, RANK
        )
        gradgrad = tl.load(gradgrad_ptr + a_offset, mask=inside, other=0.0).to(tl.float32)
        dx = gradgrad * grad * activation_second_derivative(saved, KIND)
    tl.store(dx_ptr + index, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# ----------------------------------------------------------------------------------- launchers


def activation(x: torch.Tensor, activation: int, alpha: float) -> torch.Tensor:
    """``nnarch::activation``."""
    check_dtype("activation", x)
    y = library.new_output(x, x.shape)
    launch_elementwise(_activation_fwd_kernel, {"x": x}, {"y": y}, activation, alpha)
    return y


def activation_grad(
    grad: torch.Tensor, saved: torch.Tensor, activation: int, alpha: float
) -> torch.Tensor:
    """``nnarch::activation_grad``."""
    check_dtype("activation_grad", grad, saved)
    return _backward(None, grad, saved, activation, alpha)


def activation_grad_grad(
    gradgrad: torch.Tensor,
    grad: torch.Tensor,
    saved: torch.Tensor,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """``nnarch::activation_grad_grad``."""
    check_dtype("activation_grad_grad", gradgrad, grad, saved)
    return _backward(gradgrad, grad, saved, activation, alpha)


def _backward(
    gradgrad: torch.Tensor | None,
    grad: torch.Tensor,
    saved: torch.Tensor,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    dx = library.new_output(saved, saved.shape)
    inputs = {"grad": grad, "saved": saved, "gradgrad": gradgrad}
    launch_elementwise(_activation_bwd_kernel, inputs, {"dx": dx}, activation, alpha)
    return dx


def launch_elementwise(
    kernel: Any,
    inputs: dict[str, torch.Tensor | None],
    outputs: dict[str, torch.Tensor],
    activation: int,
    alpha: float,
) -> None:
    """Launch an elementwise kernel over tensors of one shape; an absent input is None.

    The outputs are dense, and lie in one order.
    """
    out = next(iter(outputs.values()))
    given = [t for t in inputs.values() if t is not None]
    sizes, strides = merged_dims(out, given)
    if len(sizes) > _MAX_RANK:
        given = [torch.empty_like(out).copy_(t) for t in given]
        sizes, strides = merged_dims(out, given)
    copies, merged = iter(given), iter(strides)
    arguments: dict[str, Any] = {f"{name}_ptr": t for name, t in outputs.items()}
    for name, t in inputs.items():
        arguments[f"{name}_ptr"] = None if t is None else next(copies)
        steps = (0,) * _MAX_RANK if t is None else _left_padded(next(merged), 0)
        arguments |= {f"stride_{name}{d}": step for d, step in enumerate(steps)}
    _, size_1, size_2 = _left_padded(sizes, 1)
    arguments |= {
        "alpha": float(alpha),
        "elements": out.numel(),
        **{"size_1": size_1, "size_2": size_2},
        **{"KIND": activation, "RANK": len(sizes)},
        "INT64": needs_int64(out, *given),
    }
    with device_guard(out):
        launch(kernel, flat_grid(cdiv(out.numel(), _TILE["BLOCK"])), arguments, _TILE)


def merged_dims(
    out: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> tuple[list[int], list[list[int]]]:
    """The dimensions of tensors of one shape, in the order of out's memory, as few as possible.

    Args:
        out: dense; its elements in the order of its memory are numbered 0, 1, 2, …
        inputs: of the shape of `out`, any strides.

    Returns:
        The sizes, outermost first, at least one; and for each input its strides by them.
    """
    order = sorted(range(out.dim()), key=lambda d: -out.stride(d))
    order = [d for d in order if out.shape[d] != 1]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in inputs]
    for d in order:
        size = out.shape[d]
        if sizes and all(s[-1] == t.stride(d) * size for s, t in zip(strides, inputs, strict=True)):
            sizes[-1] *= size
            for s, t in zip(strides, inputs, strict=True):
                s[-1] = t.stride(d)
        else:
            sizes.append(size)
            for s, t in zip(strides, inputs, strict=True):
                s.append(t.stride(d))
    if not sizes:
        return [1], [[0] for _ in inputs]
    return sizes, strides


def _left_padded(values: Sequence[int], filler: int) -> list[int]:
    return [filler] * (_MAX_RANK - len(values)) + list(values)


# ------------------------------------------------------------------------------ static checks


_SIZE = (8, 256, 56, 56)
_ELEMENTS = float(torch.Size(_SIZE).numel())
_KINDS = {"relu": 1, "hardswish": 4, "silu": 6, "gelu": 7, "gelu_tanh": 8, "tanh": 9}


def _case(operation: str, name: str, kind: int, tensors: int) -> StaticCase:
    """An operation that moves `tensors` tensors."""
    run = {
        "activation": activation,
        "activation_grad": activation_grad,
        "activation_grad_grad": activation_grad_grad,
    }[operation]
    return StaticCase(
        f"{operation} {name} C256 H56 N8",
        lambda dtype: run(*[meta(*_SIZE, dtype=dtype)] * (tensors - 1), kind, 0.0),
        flops=_ELEMENTS,
        elements=tensors * _ELEMENTS,
    )


STATIC_CASES = [
    _case(operation, name, kind, tensors)
    for tensors, operation in ((2, "activation"), (3, "activation_grad"))
    for name, kind in _KINDS.items()
] + [_case("activation_grad_grad", name, _KINDS[name], 4) for name in ("silu", "gelu", "gelu_tanh")]
