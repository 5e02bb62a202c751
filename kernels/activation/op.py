"""The activation operations: schema, checks, autograd, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.nodes import Backward, Condition

from . import kinds, reference

_GPU = "nnarch.kernels.activation.triton_kernel"

# --------------------------------------------------------------------------------------- checks


def _check(op: str, code: int, **tensors: Tensor) -> None:
    """All tensors floating point, of one shape and dtype; a known code."""
    if code not in kinds.NAMES:
        raise ValueError(f"{op}: activation must be a code from 0 to 10, got {code}")
    (first, like), *others = tensors.items()
    library.check_tensor(op, first, like)
    for name, t in others:
        library.check_tensor(op, name, t)
        if t.shape != like.shape:
            raise ValueError(
                f"{op}: {name} must have the shape of {first}, {tuple(like.shape)}, "
                f"got {tuple(t.shape)}"
            )
        library.check_same(op, name, t, like, of=first)


def _check_activation(x: Tensor, activation: int, alpha: float) -> None:
    _check("activation", activation, x=x)


def _check_grad(grad: Tensor, saved: Tensor, activation: int, alpha: float) -> None:
    _check("activation_grad", activation, saved=saved, grad=grad)


def _check_grad_grad(
    gradgrad: Tensor, grad: Tensor, saved: Tensor, activation: int, alpha: float
) -> None:
    _check("activation_grad_grad", activation, saved=saved, grad=grad, gradgrad=gradgrad)


# ------------------------------------------------------------------------------------- autograd


def _setup_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.code, ctx.alpha = inputs
    ctx.save_for_backward(output if ctx.code in kinds.KEEPS_OUTPUT else x)


def _activation_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (saved,) = ctx.saved_tensors
    return activation_grad(grad, saved, ctx.code, ctx.alpha), None, None


def _setup_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, saved, ctx.code, ctx.alpha = inputs
    ctx.save_for_backward(grad, saved)


def _grad_backward(ctx: Any, gradgrad: Tensor) -> tuple[Tensor | None, ...]:
    grad, saved = ctx.saved_tensors
    need_grad, need_saved = ctx.needs_input_grad[:2]
    d_grad = activation_grad(gradgrad, saved, ctx.code, ctx.alpha) if need_grad else None
    d_saved = None
    if need_saved:
        d_saved = activation_grad_grad(gradgrad, grad, saved, ctx.code, ctx.alpha)
    return d_grad, d_saved, None, None


def _node(saved: str, given: dict[str, Condition]) -> Backward:
    return Backward(
        op="activation_grad",
        arguments=f"grad 0, {saved}, activation, alpha",
        gradients=(("x",),),
        formula=lambda *arguments: (activation_grad(*arguments),),
        given=given,
    )


activation_grad = library.declare(
    "activation_grad(Tensor grad, Tensor saved, int activation, float alpha) -> Tensor",
    reference=reference.activation_grad,
    fake=lambda grad, saved, activation, alpha: library.new_output(saved, saved.shape),
    check=_check_grad,
    gpu=f"{_GPU}:activation_grad",
    setup_context=_setup_grad,
    backward=_grad_backward,
)

activation_op = library.declare(
    "activation(Tensor x, int activation, float alpha) -> Tensor",
    reference=reference.activation,
    fake=lambda x, activation, alpha: library.new_output(x, x.shape),
    check=_check_activation,
    gpu=f"{_GPU}:activation",
    setup_context=_setup_activation,
    backward=_activation_backward,
    nodes=(
        _node("output 0", {"activation": kinds.KEEPS_OUTPUT}),
        _node("x", {}),
    ),
)


# Third derivatives have no kernel: a backward through this operation raises.
activation_grad_grad = library.declare(
    "activation_grad_grad("
    "Tensor gradgrad, Tensor grad, Tensor saved, int activation, float alpha) -> Tensor",
    reference=reference.activation_grad_grad,
    fake=lambda gradgrad, grad, saved, activation, alpha: library.new_output(saved, saved.shape),
    check=_check_grad_grad,
    gpu=f"{_GPU}:activation_grad_grad",
)

# ------------------------------------------------------------------------------ public function


@arrays.public
def activation(x: Tensor, kind: str | None, *, alpha: float | None = None) -> Tensor:
    """An activation function, elementwise.

    Args:
        x: any shape, floating point.
        kind: "relu", "relu6", "leaky_relu", "hardswish", "hardsigmoid", "silu", "gelu",
            "gelu_tanh", "tanh", "sigmoid", or None for a copy.
        alpha: slope of leaky_relu for negative inputs, 0.01 by default; no other kind takes one.

    Returns:
        A tensor of the shape, dtype and memory format of `x`.

    Raises:
        ValueError: unknown kind, or an alpha for a kind that takes none.
        TypeError: `x` is not floating point.
    """
    if alpha is None:
        code, slope = kinds.encode(kind)
    elif (
        kind == "leaky_relu" and isinstance(alpha, (int, float)) and alpha < 0
    ):  # legal alone, where the input can be kept
        code, slope = kinds.LEAKY_RELU, float(alpha)
    else:
        code, slope = kinds.encode((kind, alpha))  # type: ignore[arg-type]
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"activation: x must be a tensor, got {type(x).__name__}")
    return activation_op(x, code, slope)
