"""Maximum pooling: schemas and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnarch import library
from nnarch.nodes import Backward

from . import checks, reference
from .checks import Pair

_GPU = "nnarch.kernels.pooling.triton_kernel"


def _with_indices(x: Tensor, size: Pair, return_indices: bool) -> tuple[Tensor, Tensor]:
    y = library.new_output(x, (*x.shape[:2], *size))
    if return_indices:
        return y, torch.empty_like(y, dtype=torch.int64)
    return y, x.new_empty(0, dtype=torch.int64)


def _fake_max(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    return_indices: bool,
) -> tuple[Tensor, Tensor]:
    size = checks.output_size("max_pool2d", x.shape, kernel, stride, padding, dilation, ceil_mode)
    return _with_indices(x, size, return_indices)


def _fake_adaptive_max(x: Tensor, output_size: Pair, return_indices: bool) -> tuple[Tensor, Tensor]:
    return _with_indices(x, output_size, return_indices)


def _setup_max(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.arguments, return_indices = inputs
    ctx.shape = tuple(x.shape)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a gradient of zeros comes for it
    # Without indices the backward pass takes the forward's input to find them.
    ctx.has_indices = return_indices
    ctx.save_for_backward(output[1] if return_indices else x)


def _max_backward(op: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (len(ctx.arguments) + 2)
        (saved,) = ctx.saved_tensors
        indices = saved if ctx.has_indices else op()(saved.detach(), *ctx.arguments, True)[1]
        dx = max_pool2d_input_grad(grad, indices, ctx.shape)
        return dx, *[None] * (len(ctx.arguments) + 1)

    return backward


def _setup_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, _ = inputs
    ctx.save_for_backward(indices)


def _input_grad_backward(ctx: Any, gradgrad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return max_pool2d_gather(gradgrad, indices), None, None


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices = inputs
    ctx.shape = tuple(x.shape)
    ctx.save_for_backward(indices)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return max_pool2d_input_grad(grad, indices, ctx.shape), None


def _fake_taps(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    size = checks.output_size(
        "max_pool2d_taps", x.shape, kernel, stride, padding, dilation, ceil_mode
    )
    y = library.new_output(x, (*x.shape[:2], *size))
    return y, torch.empty_like(y, dtype=torch.uint8)


def _setup_taps(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.arguments = inputs
    ctx.shape = tuple(x.shape)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else a gradient of zeros comes for it
    ctx.save_for_backward(output[1])


def _taps_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    (taps,) = ctx.saved_tensors
    return max_pool2d_taps_grad(grad, taps, ctx.shape, *ctx.arguments), *[None] * 5


def _setup_taps_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, taps, ctx.shape, *ctx.arguments = inputs
    ctx.save_for_backward(taps)


def _taps_grad_backward(ctx: Any, gradgrad: Tensor) -> tuple[Tensor | None, ...]:
    (taps,) = ctx.saved_tensors
    positions = reference.max_pool2d_positions(taps, ctx.shape, *ctx.arguments[:4])
    return max_pool2d_gather(gradgrad, positions), *[None] * 7


max_pool2d_taps_grad = library.declare(
    "max_pool2d_taps_grad(Tensor grad, Tensor taps, int[] input_size, int[2] kernel, "
    "int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode) -> Tensor",
    reference=reference.max_pool2d_taps_grad,
    fake=lambda grad, taps, input_size, *_: library.new_output(grad, input_size),
    check=checks.max_pool2d_taps_grad,
    gpu=f"{_GPU}:max_pool2d_taps_grad",
    setup_context=_setup_taps_grad,
    backward=_taps_grad_backward,
)

max_pool2d_input_grad = library.declare(
    "max_pool2d_input_grad(Tensor grad, Tensor indices, int[] input_size) -> Tensor",
    reference=reference.max_pool2d_input_grad,
    fake=lambda grad, indices, input_size: library.new_output(grad, input_size),
    check=checks.max_pool2d_input_grad,
    gpu=f"{_GPU}:max_pool2d_input_grad",
    setup_context=_setup_input_grad,
    backward=_input_grad_backward,
)

max_pool2d_gather = library.declare(
    "max_pool2d_gather(Tensor x, Tensor indices) -> Tensor",
    reference=reference.max_pool2d_gather,
    fake=lambda x, indices: library.new_output(x, indices.shape),
    check=checks.max_pool2d_gather,
    gpu=f"{_GPU}:max_pool2d_gather",
    setup_context=_setup_gather,
    backward=_gather_backward,
)

_INDICES_NODE = Backward(
    op="max_pool2d_input_grad",
    arguments="grad 0, output 1, sizes x",
    gradients=(("x",),),
    formula=lambda *arguments: (max_pool2d_input_grad(*arguments),),
    shown=2,
    given={"return_indices": True},
)

max_pool2d_op = library.declare(
    "max_pool2d(Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
    "bool ceil_mode, bool return_indices) -> (Tensor y, Tensor indices)",
    reference=reference.max_pool2d,
    fake=_fake_max,
    check=checks.max_pool2d,
    gpu=f"{_GPU}:max_pool2d",
    setup_context=_setup_max,
    backward=_max_backward(lambda: max_pool2d_op),
    nodes=(_INDICES_NODE,),
)

max_pool2d_taps_op = library.declare(
    "max_pool2d_taps(Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
    "bool ceil_mode) -> (Tensor y, Tensor taps)",
    reference=reference.max_pool2d_taps,
    fake=_fake_taps,
    check=checks.max_pool2d_taps,
    gpu=f"{_GPU}:max_pool2d_taps",
    setup_context=_setup_taps,
    backward=_taps_backward,
    nodes=(
        Backward(
            op="max_pool2d_taps_grad",
            arguments="grad 0, output 1, sizes x, kernel, stride, padding, dilation, ceil_mode",
            gradients=(("x",),),
            formula=lambda *arguments: (max_pool2d_taps_grad(*arguments),),
        ),
    ),
)

adaptive_max_pool2d_op = library.declare(
    "adaptive_max_pool2d(Tensor x, int[2] output_size, bool return_indices) "
    "-> (Tensor y, Tensor indices)",
    reference=reference.adaptive_max_pool2d,
    fake=_fake_adaptive_max,
    check=checks.adaptive_max_pool2d,
    gpu=f"{_GPU}:adaptive_max_pool2d",
    setup_context=_setup_max,
    backward=_max_backward(lambda: adaptive_max_pool2d_op),
    nodes=(_INDICES_NODE,),
)
