"""gated_linear: act(x·gateᵀ + gate_bias) ⊙ (x·upᵀ + up_bias), both products in one kernel.

Where a gradient is wanted both products are kept, which is what the backward reads: two products
and the elementwise gate then run as operations of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.calls import wants_gradient
from nnarch.kernels.activation import kinds
from nnarch.kernels.activation.gated import gate_op
from nnarch.kernels.epilogue import check_epilogue, check_packed, check_same, check_tensor
from nnarch.kernels.linear import reference
from nnarch.kernels.linear.op import linear_op

_GPU = "nnarch.kernels.linear.triton_gated"


def _check_weights(op: str, gate_weight: Tensor, up_weight: Tensor) -> None:
    check_tensor(op, "gate_weight", gate_weight)
    check_tensor(op, "up_weight", up_weight)
    check_same(op, "up_weight", up_weight, gate_weight, of="gate_weight")
    if gate_weight.dim() != 2 or gate_weight.shape != up_weight.shape:
        raise ValueError(
            f"{op}: gate_weight and up_weight must be [K, C] both, got "
            f"{tuple(gate_weight.shape)} and {tuple(up_weight.shape)}"
        )


def _check(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    packed: Tensor | None,
    activation: int,
    alpha: float,
) -> None:
    check_tensor("gated_linear", "x", x)
    _check_weights("gated_linear", gate_weight, up_weight)
    check_same("gated_linear", "gate_weight", gate_weight, x)
    if x.dim() < 1 or x.shape[-1] != gate_weight.shape[1]:
        raise ValueError(
            f"gated_linear: x must be [..., {gate_weight.shape[1]}] as the weights are "
            f"{tuple(gate_weight.shape)}, got {tuple(x.shape)}"
        )
    k = gate_weight.shape[0]
    check_epilogue(
        "gated_linear", x, (*x.shape[:-1], k), k, None, gate_bias=gate_bias, up_bias=up_bias
    )
    check_packed("gated_linear", packed, x)


gated_linear_op = library.declare(
    "gated_linear(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, "
    "Tensor? up_bias, Tensor? packed, int activation, float alpha) -> Tensor",
    reference=reference.gated_linear,
    fake=lambda x, gate_weight, *_: x.new_empty((*x.shape[:-1], gate_weight.shape[0])),
    check=_check,
    gpu=f"{_GPU}:gated_linear",
)

pack = library.declare(
    "gated_linear_pack(Tensor gate_weight, Tensor up_weight) -> Tensor",
    reference=reference.gated_linear_pack,
    fake=lambda gate_weight, up_weight: gate_weight.new_empty(
        torch.library.get_ctx().new_dynamic_size()
    ),
    check=lambda gate_weight, up_weight: _check_weights(
        "gated_linear_pack", gate_weight, up_weight
    ),
    gpu=f"{_GPU}:gated_linear_pack",
)


@arrays.public_lower_precision
def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    *,
    activation: kinds.Activation = "silu",
    packed: Tensor | None = None,
) -> Tensor:
    """act(x·gate_weightᵀ + gate_bias) ⊙ (x·up_weightᵀ + up_bias): SwiGLU, GEGLU, ReGLU.

    Weights that lie in one matrix, one after the other, are passed as its two views
    (``weight.chunk(2)``): nothing is copied.

    Args:
        x: [..., C].
        gate_weight, up_weight: [K, C].
        gate_bias, up_bias: [K] or None.
        activation: of the gate: "silu" (SwiGLU), "gelu" (GEGLU), "relu" (ReGLU), "sigmoid" (GLU),
            None (bilinear), any other name, or ("leaky_relu", slope).
        packed: what :func:`pack_gated_linear_weights` made of the weights; or None.

    Returns:
        [..., K], contiguous.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.

    Source: Shazeer, 2020, GLU Variants Improve Transformer.
    """
    code, alpha = kinds.encode(activation, "gated_linear")
    if wants_gradient(x, gate_weight, up_weight, gate_bias, up_bias):
        gates = linear_op(x, gate_weight, gate_bias, None, None, None, None, 0, 0.0)
        ups = linear_op(x, up_weight, up_bias, None, None, None, None, 0, 0.0)
        return gate_op(gates, ups, code, alpha)
    return gated_linear_op(x, gate_weight, up_weight, gate_bias, up_bias, packed, code, alpha)


def pack_gated_linear_weights(gate_weight: Tensor, up_weight: Tensor) -> Tensor | None:
    """Both weights in the order that the native kernels read, for ``gated_linear(packed=…)``.

    Args:
        gate_weight, up_weight: [K, C] on the CPU; their values must not change afterwards.

    Returns:
        An opaque tensor; None where no native kernel runs (another device).
    """
    _check_weights("pack_gated_linear_weights", gate_weight, up_weight)
    if gate_weight.device.type != "cpu" or library.native is None:
        return None
    return pack(gate_weight.detach(), up_weight.detach())
