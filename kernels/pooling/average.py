"""Average pooling: schemas and autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnarch import library
from nnarch.nodes import Backward

from . import checks, reference
from .checks import Pair

_GPU = "nnarch.kernels.pooling.triton_kernel"


def _fake_avg(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool, *_: Any
) -> Tensor:
    size = checks.output_size("avg_pool2d", x.shape, kernel, stride, padding, (1, 1), ceil_mode)
    return library.new_output(x, (*x.shape[:2], *size))


def _setup_avg(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.arguments = inputs
    ctx.shape = tuple(x.shape)


def _avg_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return avg_pool2d_input_grad(grad, ctx.shape, *ctx.arguments), *[None] * 6


def _setup_avg_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *ctx.arguments = inputs


def _avg_grad_backward(ctx: Any, gradgrad: Tensor) -> tuple[Tensor | None, ...]:
    return avg_pool2d_op(gradgrad, *ctx.arguments), *[None] * 7


def _adaptive_avg_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if tuple(grad.shape[2:]) == (1, 1):  # every input of a global average has the same gradient
        return (grad / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape), None
    return adaptive_avg_pool2d_input_grad(grad, ctx.shape), None


def _setup_adaptive_avg_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.output_size = inputs[0].shape[2:]


def _adaptive_avg_grad_backward(ctx: Any, gradgrad: Tensor) -> tuple[Tensor | None, ...]:
    return adaptive_avg_pool2d_op(gradgrad, ctx.output_size), None


avg_pool2d_input_grad = library.declare(
    "avg_pool2d_input_grad(Tensor grad, int[] input_size, int[2] kernel, int[2] stride, "
    "int[2] padding, bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor",
    reference=reference.avg_pool2d_input_grad,
    fake=lambda grad, input_size, *_: library.new_output(grad, input_size),
    check=checks.avg_pool2d_input_grad,
    gpu=f"{_GPU}:avg_pool2d_input_grad",
    setup_context=_setup_avg_grad,
    backward=_avg_grad_backward,
)

avg_pool2d_op = library.declare(
    "avg_pool2d(Tensor x, int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode, "
    "bool count_include_pad, int? divisor_override) -> Tensor",
    reference=reference.avg_pool2d,
    fake=_fake_avg,
    check=checks.avg_pool2d,
    gpu=f"{_GPU}:avg_pool2d",
    setup_context=_setup_avg,
    backward=_avg_backward,
    nodes=(
        Backward(
            op="avg_pool2d_input_grad",
            arguments="grad 0, sizes x, kernel, stride, padding, ceil_mode, count_include_pad, "
            "none",
            gradients=(("x",),),
            formula=lambda *arguments: (avg_pool2d_input_grad(*arguments),),
            given={"divisor_override": False},
        ),
    ),
)

adaptive_avg_pool2d_op = library.declare(
    "adaptive_avg_pool2d(Tensor x, int[2] output_size) -> Tensor",
    reference=reference.adaptive_avg_pool2d,
    fake=lambda x, output_size: library.new_output(x, (*x.shape[:2], *output_size)),
    check=checks.adaptive_avg_pool2d,
    gpu=f"{_GPU}:adaptive_avg_pool2d",
    setup_context=_setup_avg,
    backward=_adaptive_avg_backward,
)

adaptive_avg_pool2d_input_grad = library.declare(
    "adaptive_avg_pool2d_input_grad(Tensor grad, int[] input_size) -> Tensor",
    reference=reference.adaptive_avg_pool2d_input_grad,
    fake=lambda grad, input_size: library.new_output(grad, input_size),
    check=checks.adaptive_avg_pool2d_input_grad,
    gpu=f"{_GPU}:adaptive_avg_pool2d_input_grad",
    setup_context=_setup_adaptive_avg_grad,
    backward=_adaptive_avg_grad_backward,
)
