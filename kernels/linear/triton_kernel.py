"""The fused linear layer on the GPU: act(scale·(x·weightᵀ + bias) + shift + residual).

Three kernels' worth of shapes: one row is a matrix-vector product at memory bandwidth; a few rows
multiply with the operands swapped, so that the features fill the 64 rows that matrix instructions
want; the rest is a tiled product. Operands are read by their strides, so the gradients, which are
products of transposed views, run here too.
"""

from __future__ import annotations

import math

import torch

from nnarch.kernels.activation.triton_gated import STATIC_CASES as GATES
from nnarch.kernels.gpu.launch import check_dtype, device_guard, vector
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.linear import triton_gated
from nnarch.kernels.linear.triton_product import product
from nnarch.kernels.linear.triton_row import one_row

__all__ = ["STATIC_CASES", "linear", "linear_pack"]


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    packed: torch.Tensor | None,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """nnarch::linear on a GPU; `packed` is a CPU matter and not read."""
    check_dtype("linear", x, weight, residual)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if y.numel() == 0:
        return y
    m = math.prod(x.shape[:-1])
    rows, out = x.reshape(m, x.shape[-1]), y.view(m, y.shape[-1])
    residual = residual.reshape(out.shape) if residual is not None else None
    epilogue = {
        "bias_ptr": vector(bias),
        "scale_ptr": vector(scale),
        "shift_ptr": vector(shift),
        "residual_ptr": residual,
        "alpha": float(alpha),
        "ACTIVATION": activation,
    }
    with device_guard(x):
        if m == 1:
            one_row(rows, weight, out, epilogue)
        else:
            product(rows, weight, out, epilogue)
    return y


def linear_pack(weight: torch.Tensor) -> torch.Tensor:
    """An empty tensor: the GPU kernels read the weight as it is."""
    return weight.new_empty(0)


def _case(name: str, m: int, c: int, k: int, transposed: bool = False) -> StaticCase:
    def run(dtype: torch.dtype) -> torch.Tensor:
        weight, b = meta(k, c, dtype=dtype), meta(k, dtype=dtype)
        if transposed:
            weight = meta(c, k, dtype=dtype).t()
        return linear(
            meta(m, c, dtype=dtype), weight, b, b, b, meta(m, k, dtype=dtype), None, 7, 0.0
        )

    return StaticCase(
        f"linear {name} {m}×{c}×{k}",
        run,
        flops=2.0 * m * c * k,
        elements=m * c + k * c + 2 * m * k,
        matrix=m > 1,
    )


STATIC_CASES = [
    _case("forward", 8192, 4096, 4096),
    _case("input gradient", 8192, 4096, 4096, transposed=True),
    _case("few rows", 16, 4096, 16384),
    _case("few rows and columns", 32, 4096, 1024),  # the reduction is split
    _case("one row", 1, 4096, 16384),
    *triton_gated.STATIC_CASES,
    *GATES,
]
"""What bench/static_gpu.py compiles."""
