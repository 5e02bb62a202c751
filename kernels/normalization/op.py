"""The normalization operations: schemas, checks, autograd, and the public function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.kernels.activation import kinds
from nnarch.kernels.activation.op import activation_grad, activation_op
from nnarch.nodes import Backward, Condition

from . import checks, reference, running

_GPU = "nnarch.kernels.normalization.triton_kernel"

# ------------------------------------------------------------------ affine and channel reductions


def _fake_affine(x: Tensor, *_: Any) -> Tensor:
    return library.new_output(x, x.shape)


def _fake_channels(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[1])


def _setup_affine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, shift, residual, ctx.code, ctx.alpha = inputs
    # A gradient that needs the activation's input computes it once more: that costs one pass over
    # memory, and keeping it would cost the same in memory for the whole forward pass.
    again = ctx.code not in kinds.INVERTIBLE
    ctx.save_for_backward(
        x,
        scale,
        shift if again else None,
        residual if again else None,
        output if ctx.code != kinds.NONE and not again else None,
    )


def _affine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, shift, residual, y = ctx.saved_tensors
    need_x, need_scale, need_shift, need_residual = ctx.needs_input_grad[:4]
    if ctx.code not in kinds.INVERTIBLE:
        z = affine(x, scale, shift, residual, kinds.NONE, 0.0)
        grad = activation_grad(grad, z, ctx.code, ctx.alpha)
    elif ctx.code != kinds.NONE:
        grad = activation_grad(grad, y, ctx.code, ctx.alpha)
    dx = grad
    if need_x and scale is not None:
        dx = affine(grad, scale, None, None, kinds.NONE, 0.0)
    return (
        dx if need_x else None,
        channel_dot(grad, x) if need_scale else None,
        channel_sum(grad) if need_shift else None,
        grad if need_residual else None,
        None,
        None,
    )


def _setup_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape = inputs[0].shape


def _sum_backward(ctx: Any, grad: Tensor) -> Tensor:
    return _to_channels(grad, len(ctx.shape)).expand(ctx.shape)


def _setup_dot(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _dot_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    a, b = ctx.saved_tensors
    need_a, need_b = ctx.needs_input_grad
    return (
        affine(b, grad, None, None, kinds.NONE, 0.0) if need_a else None,
        affine(a, grad, None, None, kinds.NONE, 0.0) if need_b else None,
    )


def _to_channels(v: Tensor, dims: int) -> Tensor:
    return v.view(1, -1, *[1] * (dims - 2))


affine = library.declare(
    "affine(Tensor x, Tensor? scale, Tensor? shift, Tensor? residual, "
    "int activation, float alpha) -> Tensor",
    reference=reference.affine,
    fake=_fake_affine,
    check=checks.affine,
    gpu=f"{_GPU}:affine",
    setup_context=_setup_affine,
    backward=_affine_backward,
)

channel_sum = library.declare(
    "channel_sum(Tensor x) -> Tensor",
    reference=reference.channel_sum,
    fake=_fake_channels,
    check=checks.channel_sum,
    gpu=f"{_GPU}:channel_sum",
    setup_context=_setup_sum,
    backward=_sum_backward,
)

channel_dot = library.declare(
    "channel_dot(Tensor a, Tensor b) -> Tensor",
    reference=reference.channel_dot,
    fake=_fake_channels,
    check=checks.channel_dot,
    gpu=f"{_GPU}:channel_dot",
    setup_context=_setup_dot,
    backward=_dot_backward,
)

# -------------------------------------------------------------------------- batch normalization


def _statistic(x: Tensor) -> Tensor:
    """A tensor for one number per channel, in the dtype that statistics have."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.new_empty(x.shape[1], dtype=torch.float32 if half else x.dtype)


def _setup_eval(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, mean, var, weight, _, _, ctx.eps, ctx.code, ctx.alpha = inputs
    _refuse_gradient("batch_norm_eval", ctx.code)
    ctx.save_for_backward(x, mean, var, weight, output if ctx.code != kinds.NONE else None)


def _eval_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, var, weight, y = ctx.saved_tensors
    need_x, need_mean, need_var, need_weight, need_bias, need_residual = ctx.needs_input_grad[:6]
    g = activation_grad(grad, y, ctx.code, ctx.alpha) if ctx.code != kinds.NONE else grad
    invstd = torch.rsqrt(var + ctx.eps)
    scale = invstd if weight is None else invstd * weight
    total = channel_sum(g) if need_mean or need_var or need_weight or need_bias else None
    of_normalized = None  # the sum of g·(x - mean)·invstd
    if need_var or need_weight:
        of_normalized = (channel_dot(g, x) - mean * total) * invstd
    return (
        affine(g, scale, None, None, kinds.NONE, 0.0) if need_x else None,
        -scale * total if need_mean and total is not None else None,
        -0.5 * invstd * scale * of_normalized if need_var and of_normalized is not None else None,
        of_normalized if need_weight else None,
        total if need_bias else None,
        g if need_residual else None,
        None,
        None,
        None,
    )


def _refuse_gradient(op: str, code: int) -> None:
    if code not in kinds.INVERTIBLE:
        raise NotImplementedError(
            f"nnarch::{op} with {kinds.NAMES[code]} has no gradient: "
            "its input would have to be kept; run the activation apart, as batch_norm() does"
        )


def _fake_train(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return library.new_output(x, x.shape), _statistic(x), _statistic(x)


def _setup_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, _, ctx.code, ctx.alpha = inputs
    y, mean, invstd = output
    _refuse_gradient("batch_norm_train", ctx.code)
    ctx.mark_non_differentiable(mean, invstd)
    ctx.set_materialize_grads(False)  # else theirs come as zeros
    ctx.save_for_backward(x, weight, mean, invstd, y if ctx.code != kinds.NONE else None)


def _train_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    x, weight, mean, invstd, y = ctx.saved_tensors
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    code, alpha = ctx.code, ctx.alpha
    # One kernel multiplies by act'(y) on the way, unless that product is wanted itself: as the
    # residual's gradient, or as a node of the graph for second derivatives.
    if code != kinds.NONE and (need_residual or torch.is_grad_enabled()):
        grad, y, code = activation_grad(grad, y, code, alpha), None, kinds.NONE
    dx = dweight = dbias = None
    if need_x or need_weight or need_bias:
        dx, dweight, dbias = batch_norm_backward(grad, x, weight, mean, invstd, y, code, alpha)
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        grad if need_residual else None,
        None,
        None,
        None,
    )


def _fake_backward(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return library.new_output(x, x.shape), _statistic(x), _statistic(x)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *saved, _, code, _ = inputs
    if code != kinds.NONE:
        raise NotImplementedError(
            "nnarch::batch_norm_backward with an activation is not differentiable "
            "(once_differentiable): apply activation_grad first"
        )
    ctx.save_for_backward(*saved)


def _backward_backward(
    ctx: Any, gg_x: Tensor, gg_weight: Tensor, gg_bias: Tensor
) -> tuple[Tensor | None, ...]:
    grad, x, weight, mean, invstd = ctx.saved_tensors
    d_grad, d_x, d_weight = batch_norm_backward_backward(
        gg_x, gg_weight, gg_bias, grad, x, weight, mean, invstd
    )
    # d_x holds the way through mean and invstd, which are functions of x.
    return d_grad, d_x, d_weight if weight is not None else None, *[None] * 5


def _fake_backward_backward(
    gg_x: Tensor, gg_weight: Tensor, gg_bias: Tensor, grad: Tensor, x: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return library.new_output(x, x.shape), library.new_output(x, x.shape), _statistic(x)


batch_norm_eval = library.declare(
    "batch_norm_eval(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
    "Tensor? residual, float eps, int activation, float alpha) -> Tensor",
    reference=reference.batch_norm_eval,
    fake=_fake_affine,
    check=checks.batch_norm_eval,
    gpu=f"{_GPU}:batch_norm_eval",
    setup_context=_setup_eval,
    backward=_eval_backward,
)

batch_norm_backward = library.declare(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor invstd, "
    "Tensor? y, int activation, float alpha) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    reference=reference.batch_norm_backward,
    fake=_fake_backward,
    check=checks.batch_norm_backward,
    gpu=f"{_GPU}:batch_norm_backward",
    setup_context=_setup_backward,
    backward=_backward_backward,
)

batch_norm_backward_backward = library.declare(
    "batch_norm_backward_backward(Tensor gg_x, Tensor gg_weight, Tensor gg_bias, Tensor grad, "
    "Tensor x, Tensor? weight, Tensor mean, Tensor invstd) "
    "-> (Tensor d_grad, Tensor d_x, Tensor d_weight)",
    reference=reference.batch_norm_backward_backward,
    fake=_fake_backward_backward,
    check=checks.batch_norm_backward_backward,
    gpu=f"{_GPU}:batch_norm_backward_backward",
)


def _activated_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    y: Tensor | None,
    code: int,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """batch_norm_backward, with the activation's as a node of the graph where one is wanted."""
    if torch.is_grad_enabled():
        grad, y, code = activation_grad(grad, y, code, alpha), None, kinds.NONE
    return batch_norm_backward(grad, x, weight, mean, invstd, y, code, alpha)


def _train_node(y: str, formula: Callable[..., Any], activation: Condition) -> Backward:
    return Backward(
        op="batch_norm_backward",
        arguments=f"grad 0, x, weight, output 1, output 2, {y}, activation, alpha",
        gradients=(("x",), ("weight",), ("bias",)),
        formula=formula,
        shown=3,
        given={"residual": False, "activation": activation},
    )


batch_norm_train = library.declare(
    "batch_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    "int activation, float alpha) -> (Tensor y, Tensor mean, Tensor invstd)",
    reference=reference.batch_norm_train,
    fake=_fake_train,
    check=checks.batch_norm_train,
    gpu=f"{_GPU}:batch_norm_train",
    setup_context=_setup_train,
    backward=_train_backward,
    nodes=(
        _train_node("none", batch_norm_backward, False),
        _train_node("output 0", _activated_backward, kinds.INVERTIBLE),
    ),
)

# ------------------------------------------------------------------------------ public function


@arrays.public
def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: kinds.Activation = None,
) -> Tensor:
    """act(batch_norm(input) + residual), with torch.nn.functional.batch_norm's arguments.

    Args:
        input: ``[N, C, ...]``, at least two dimensions.
        running_mean, running_var: ``[C]``. Updated in place in training, where they may be None;
            used instead of the batch's statistics otherwise.
        weight, bias: ``[C]``, scale and shift of the normalised input.
        training: whether to normalise by the batch's own mean and (biased) variance.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance before the square root.
        residual: added before the activation, shape of `input`.
        activation: None, a name or (name, alpha); see :func:`nnarch.functional.activation`.

    Returns:
        A tensor of the shape, dtype and memory format of `input`.

    Raises:
        ValueError: shapes that do not fit, one value per channel in training, or no running
            statistics in evaluation.
        TypeError: dtypes that do not fit.

    Source: Ioffe and Szegedy, 2015, Batch Normalization.
    """
    code, alpha = kinds.encode(activation, "batch_norm")
    if type(momentum) is not float or type(eps) is not float or not eps > 0:
        checks.numbers(momentum, eps, training)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError(
                "batch_norm: running_mean and running_var must be given when training is False"
            )
        tensors = (input, running_mean, running_var, weight, bias, residual)
        if code and kinds.needs_split(code, *tensors):
            return activation_op(batch_norm_eval(*tensors, eps, kinds.NONE, 0.0), code, alpha)
        return batch_norm_eval(*tensors, eps, code, alpha)
    if input.dim() < 2 or input.numel() == input.shape[1]:
        checks.enough_values(input)
    update = running.update_of(input, running_mean, running_var)
    if arrays.is_read_only(running_mean) or arrays.is_read_only(running_var):
        raise ValueError("batch_norm: training updates running_mean and running_var: not read-only")
    if input.numel() == 0:  # without statistics: the running ones stay, the gradients are zeros
        return affine(input, weight, bias, residual, code, alpha)
    split = kinds.needs_split(code, input, weight, bias, residual)
    y, mean, invstd = batch_norm_train(
        input, weight, bias, residual, eps, kinds.NONE if split else code, alpha
    )
    if update is not None:
        count = input.numel() // max(input.shape[1], 1)
        update(input, running_mean, running_var, mean, invstd, momentum, eps, count)
    return activation_op(y, code, alpha) if split else y
