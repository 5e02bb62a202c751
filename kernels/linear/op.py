"""linear: schemas, checks, autograd, and the public function.

Both gradients of a matrix product are matrix products, so `linear` on transposed views is its own
backward, and the backward of that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.kernels.activation import kinds
from nnarch.kernels.epilogue import (
    check_epilogue,
    check_packed,
    check_same,
    check_tensor,
    epilogue_backward,
    must_split,
    refuse_gradient,
)
from nnarch.kernels.linear import reference
from nnarch.kernels.normalization.op import affine, channel_sum
from nnarch.nodes import Backward

_GPU = "nnarch.kernels.linear.triton_kernel"
_X, _WEIGHT, _BIAS = 1, 2, 4  # what a backward is asked for


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    activation: int,
    alpha: float,
) -> None:
    check_tensor("linear", "x", x)
    check_tensor("linear", "weight", weight)
    check_same("linear", "weight", weight, x)
    if x.dim() < 1 or weight.dim() != 2:
        raise ValueError(
            f"linear: x must be [..., C] and weight [K, C], got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"linear: the last size of x ({x.shape[-1]}) must be the second of weight "
            f"({weight.shape[1]})"
        )
    size, k = (*x.shape[:-1], weight.shape[0]), weight.shape[0]
    check_epilogue("linear", x, size, k, residual, bias=bias, scale=scale, shift=shift)
    check_packed("linear", packed, x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, scale, _, _, _, ctx.activation, ctx.alpha = inputs
    refuse_gradient("linear", ctx.activation)
    ctx.save_for_backward(x, weight, scale, output if ctx.activation else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, y = ctx.saved_tensors
    need_x, need_weight, need_bias, need_scale, need_shift, need_residual = ctx.needs_input_grad[:6]
    refuse_gradient("linear", scale_wanted=need_scale)
    g = epilogue_backward(
        _as_rows(grad),
        None if y is None else _as_rows(y),
        scale,
        ctx.activation,
        ctx.alpha,
        (need_bias, need_shift, need_residual),
    )
    wanted = _X * need_x + _WEIGHT * need_weight
    dx, dw, _ = _gradients(g.accumulator, x, weight, wanted)
    residual = g.residual.reshape(grad.shape) if g.residual is not None else None
    return dx, dw, g.bias, None, g.shift, residual, None, None, None


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the native linear_backward computes, of operations that have gradients themselves."""
    g = _as_rows(grad)
    dx = _product(g, weight.t()) if wanted & _X else None
    if dx is not None and x.dim() != 2:
        dx = dx.reshape(x.shape)
    dw = _product(g.t(), _as_rows(x).t()) if wanted & _WEIGHT else None
    return dx, dw, channel_sum(g) if wanted & _BIAS else None


def _as_rows(t: Tensor) -> Tensor:
    """[..., C] as [rows, C]; C may be 0."""
    if t.dim() == 2:
        return t
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a · bᵀ."""
    return linear_op(a, b, None, None, None, None, None, 0, 0.0)


library.define_native(
    "linear_backward(Tensor grad, Tensor x, Tensor weight, int wanted) -> (Tensor, Tensor, Tensor)"
)

linear_op = library.declare(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, "
    "Tensor? residual, Tensor? packed, int activation, float alpha) -> Tensor",
    reference=reference.linear,
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    check=_check,
    gpu=f"{_GPU}:linear",
    setup_context=_setup,
    backward=_backward,
    nodes=(
        Backward(
            op="linear_backward",
            arguments="grad 0, x, weight, wanted",
            gradients=(("x",), ("weight",), ("bias",)),
            formula=_gradients,
            bits={"x": _X, "weight": _WEIGHT, "bias": _BIAS},
            given=dict.fromkeys(("scale", "shift", "residual", "activation"), False),
        ),
    ),
)


def _check_pack(weight: Tensor) -> None:
    check_tensor("linear_pack", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"linear_pack: weight must be 2-D, got shape {tuple(weight.shape)}")


def _fake_pack(weight: Tensor) -> Tensor:
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size())


pack = library.declare(
    "linear_pack(Tensor weight) -> Tensor",
    reference=reference.linear_pack,
    fake=_fake_pack,
    check=_check_pack,
    gpu=f"{_GPU}:linear_pack",
)


@arrays.public_lower_precision
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: kinds.Activation = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Matrix product with a fused epilogue: act(scale·(x·weightᵀ + bias) + shift + residual).

    The first three arguments are those of :func:`torch.nn.functional.linear`.

    Args:
        x: [..., C].
        weight: [K, C].
        bias, scale, shift: [K] or None.
        residual: [..., K], added before the activation; or None.
        activation: None, a name ("relu", "gelu", …) or ("leaky_relu", slope).
        packed: what :func:`pack_linear_weight` made of `weight`; or None.

    Returns:
        [..., K], contiguous.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    code, alpha = (0, 0.0) if activation is None else kinds.encode(activation, "linear")
    if (code or scale is not None) and must_split(code, x, weight, bias, scale, shift, residual):
        z = linear_op(x, weight, bias, None, None, None, None, 0, 0.0)
        flat = _as_rows(z)
        rest = None if residual is None else residual.reshape(flat.shape)
        return affine(flat, scale, shift, rest, code, alpha).reshape(z.shape)
    return linear_op(x, weight, bias, scale, shift, residual, packed, code, alpha)


def pack_linear_weight(weight: Tensor) -> Tensor | None:
    """The weight in the order that the native kernels read, to pass as `packed=` again and again.

    Args:
        weight: [K, C] on the CPU; its values must not change afterwards.

    Returns:
        An opaque tensor; None where no native kernel runs (another device).
    """
    check_tensor("pack_linear_weight", "weight", weight)
    if weight.device.type != "cpu" or library.native is None:
        return None
    return pack(weight.detach())
