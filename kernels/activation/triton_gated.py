"""Gated activations on the GPU: one pass over memory, any strides (see triton_kernel.py)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.activation import kinds
from nnarch.kernels.activation.triton_kernel import (
    element_offset,
    element_range,
    launch_elementwise,
)
from nnarch.kernels.gpu.epilogue import activation_derivative, apply_activation
from nnarch.kernels.gpu.launch import check_dtype
from nnarch.kernels.gpu.static import StaticCase, meta


@triton.jit
def _gate_fwd_kernel(
    gate_ptr,
    value_ptr,
    y_ptr,  # dense
    alpha,
    elements,
    size_1,
    size_2,
    stride_gate0,
    stride_gate1,
    stride_gate2,
    stride_value0,
    stride_value1,
    stride_value2,
    KIND: tl.constexpr,
    RANK: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y = act(gate)·value"""
    index, inside = element_range(elements, INT64, BLOCK)
    g_at = element_offset(index, size_1, size_2, stride_gate0, stride_gate1, stride_gate2, RANK)
    v_at = element_offset(index, size_1, size_2, stride_value0, stride_value1, stride_value2, RANK)
    gate = tl.load(gate_ptr + g_at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + v_at, mask=inside, other=0.0).to(tl.float32)
    y = apply_activation(gate, KIND, alpha) * value
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_bwd_kernel(
    grad_ptr,
    gate_ptr,
    value_ptr,
    d_gate_ptr,  # dense, as d_value
    d_value_ptr,
    alpha,
    elements,
    size_1,
    size_2,
    stride_grad0,
    stride_grad1,
    stride_grad2,
    stride_gate0,
    stride_gate1,
    stride_gate2,
    stride_value0,
    stride_value1,
    stride_value2,
    KIND: tl.constexpr,
    RANK: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d_gate = grad·value·act'(gate), d_value = grad·act(gate)"""
    index, inside = element_range(elements, INT64, BLOCK)
    a_at = element_offset(index, size_1, size_2, stride_grad0, stride_grad1, stride_grad2, RANK)
    g_at = element_offset(index, size_1, size_2, stride_gate0, stride_gate1, stride_gate2, RANK)
    v_at = element_offset(index, size_1, size_2, stride_value0, stride_value1, stride_value2, RANK)
    grad = tl.load(grad_ptr + a_at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + g_at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + v_at, mask=inside, other=0.0).to(tl.float32)
    opened = apply_activation(gate, KIND, alpha)
    # The derivative's argument: the output for kinds.INVERTIBLE, the input for the others.
    if KIND == 4 or KIND == 6 or KIND == 7 or KIND == 8:
        slope = activation_derivative(gate, KIND, alpha)
    else:
        slope = activation_derivative(opened, KIND, alpha)
    d_gate, d_value = grad * value * slope, grad * opened
    tl.store(d_gate_ptr + index, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(d_value_ptr + index, d_value.to(d_value_ptr.dtype.element_ty), mask=inside)


def gate(gate: torch.Tensor, value: torch.Tensor, activation: int, alpha: float) -> torch.Tensor:
    """``nnarch::gate``."""
    check_dtype("gate", gate, value)
    y = library.new_output(gate, gate.shape)
    inputs = {"gate": gate, "value": value}
    launch_elementwise(_gate_fwd_kernel, inputs, {"y": y}, activation, alpha)
    return y


def gate_grad(
    grad: torch.Tensor, gate: torch.Tensor, value: torch.Tensor, activation: int, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``nnarch::gate_grad``."""
    check_dtype("gate_grad", grad, gate, value)
    d_gate, d_value = (library.new_output(gate, gate.shape) for _ in range(2))
    inputs = {"grad": grad, "gate": gate, "value": value}
    outputs = {"d_gate": d_gate, "d_value": d_value}
    launch_elementwise(_gate_bwd_kernel, inputs, outputs, activation, alpha)
    return d_gate, d_value


_SIZE = (8192, 4096)
_ELEMENTS = float(torch.Size(_SIZE).numel())


def _case(name: str, kind: int, backward: bool) -> StaticCase:
    tensors = 3 if backward else 2
    run = gate_grad if backward else gate
    return StaticCase(
        f"{run.__name__} {name} 8192×4096",
        lambda dtype: run(*[meta(*_SIZE, dtype=dtype) for _ in range(tensors)], kind, 0.0),
        flops=_ELEMENTS,
        elements=(5 if backward else 3) * _ELEMENTS,
    )


STATIC_CASES = [
    _case(name, kind, backward)
    for name, kind in (("silu", kinds.SILU), ("gelu", kinds.GELU))
    for backward in (False, True)
]
"""What bench/static_gpu.py compiles, listed by triton_kernel.py."""
