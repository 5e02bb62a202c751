"""The definition of linear, in plain torch: any dtype, any device."""

from __future__ import annotations

from torch import Tensor

from nnarch.kernels.activation.reference import gate
from nnarch.kernels.epilogue import reference_epilogue


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    activation: int,
    alpha: float,
) -> Tensor:
    """y[…, k] = Σ_c x[…, c] · w[k, c] + b[k], then the epilogue."""
    y = x @ weight.T
    if bias is not None:
        y = y + bias
    return reference_epilogue(y, scale, shift, residual, activation, alpha, dim=-1)


def linear_pack(weight: Tensor) -> Tensor:
    """Nothing to pack: only the native kernels read packed weights."""
    return weight.new_empty(0)


def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    packed: Tensor | None,
    activation: int,
    alpha: float,
) -> Tensor:
    """y[…, k] = act(Σ_c x[…, c] · gate[k, c] + …) · (Σ_c x[…, c] · up[k, c] + …)."""
    gates, ups = x @ gate_weight.T, x @ up_weight.T
    if gate_bias is not None:
        gates = gates + gate_bias
    if up_bias is not None:
        ups = ups + up_bias
    return gate(gates, ups, activation, alpha)


def gated_linear_pack(gate_weight: Tensor, up_weight: Tensor) -> Tensor:
    """Nothing to pack: only the native kernels read packed weights."""
    return gate_weight.new_empty(0)
