"""The definition of linear, in plain torch: any dtype, any device."""

from __future__ import annotations

from torch import Tensor

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
