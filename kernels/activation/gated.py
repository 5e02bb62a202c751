"""Gated activations, act(gate)·value (SwiGLU, GEGLU, ReGLU and their kin): schema and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.nodes import Backward

from . import kinds, reference
from .op import _check, activation_grad, activation_grad_grad, activation_op

_GPU = "nnarch.kernels.activation.triton_gated"


def _check_gate(gate: Tensor, value: Tensor, activation: int, alpha: float) -> None:
    _check("gate", activation, gate=gate, value=value)


def _check_gate_grad(
    grad: Tensor, gate: Tensor, value: Tensor, activation: int, alpha: float
) -> None:
    _check("gate_grad", activation, gate=gate, value=value, grad=grad)


def _fake_gate_grad(
    grad: Tensor, gate: Tensor, value: Tensor, activation: int, alpha: float
) -> tuple[Tensor, Tensor]:
    return library.new_output(gate, gate.shape), library.new_output(gate, gate.shape)


def _setup_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, value, ctx.code, ctx.alpha = inputs
    ctx.save_for_backward(gate, value)


def _gate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, value = ctx.saved_tensors
    d_gate, d_value = gate_grad(grad, gate, value, ctx.code, ctx.alpha)
    return d_gate, d_value, None, None


def _setup_gate_grad(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    grad, gate, value, ctx.code, ctx.alpha = inputs
    ctx.save_for_backward(grad, gate, value)


def _gate_grad_backward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor | None, ...]:
    """Of (d_gate, d_value) = (grad·value·act'(gate), grad·act(gate)), for their gradients a and b.

    Double backward is rare: it is put together from the operations that there are.
    """
    grad, gate, value = ctx.saved_tensors
    code, alpha = ctx.code, ctx.alpha
    opened = activation_op(gate, code, alpha)
    saved = opened if code in kinds.INVERTIBLE else gate
    slope_of_b = activation_grad(b, saved, code, alpha)
    slope_of_a = activation_grad(a, saved, code, alpha)
    bend = activation_grad_grad(a, grad * value, saved, code, alpha)
    if code in kinds.INVERTIBLE:  # its bend is by the output: one more derivative by the input
        bend = activation_grad(bend, saved, code, alpha)
    d_grad = slope_of_a * value + b * opened
    return d_grad, bend + slope_of_b * grad, slope_of_a * grad, None, None


gate_grad = library.declare(
    "gate_grad(Tensor grad, Tensor gate, Tensor value, int activation, float alpha)"
    " -> (Tensor, Tensor)",
    reference=reference.gate_grad,
    fake=_fake_gate_grad,
    check=_check_gate_grad,
    gpu=f"{_GPU}:gate_grad",
    setup_context=_setup_gate_grad,
    backward=_gate_grad_backward,
)

gate_op = library.declare(
    "gate(Tensor gate, Tensor value, int activation, float alpha) -> Tensor",
    reference=reference.gate,
    fake=lambda gate, value, activation, alpha: library.new_output(gate, gate.shape),
    check=_check_gate,
    gpu=f"{_GPU}:gate",
    setup_context=_setup_gate,
    backward=_gate_backward,
    nodes=(
        Backward(
            op="gate_grad",
            arguments="grad 0, gate, value, activation, alpha",
            gradients=(("gate",), ("value",)),
            formula=gate_grad,
        ),
    ),
)


@arrays.public
def gated_activation(gate: Tensor, value: Tensor, kind: kinds.Activation = "silu") -> Tensor:
    """act(gate)·value, elementwise in one pass: SwiGLU with "silu", GEGLU with "gelu", ReGLU.

    Args:
        gate: any shape, floating point.
        value: of the shape and dtype of `gate`.
        kind: None, a name ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", …) or
            ("leaky_relu", slope).

    Returns:
        A tensor of the shape, dtype and memory format of `gate`.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.

    Source: Shazeer, 2020, GLU Variants Improve Transformer.
    """
    code, alpha = kinds.encode(kind, "gated_activation")
    for name, t in (("gate", gate), ("value", value)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"gated_activation: {name} must be a tensor, got {type(t).__name__}")
    return gate_op(gate, value, code, alpha)
