"""Softmax cross-entropy: schemas, checks, autograd, and the public functions.

Where a reduced loss wants gradients, the forward makes them: its tiles of logits are in cache then,
and a scalar is all that the gradient of the loss can add. An unreduced loss, whose gradient is
another for every sample, keeps the log-sum-exps and makes its logits again in the backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from nnarch import arrays, library
from nnarch.kernels.linear.op import linear
from nnarch.nodes import Backward

from . import reference
from .autograd import not_differentiable, scaled
from .checks import (
    check_backward,
    check_forward,
    check_integers,
    check_linear_backward,
    check_linear_forward,
    check_numbers,
)
from .reference import (
    MEAN,
    NONE,
    SUM,
    WANT_BIAS,
    WANT_LOGITS,
    WANT_TARGET,
    WANT_WEIGHT,
    WANT_X,
    compute_dtype,
    empty_like_logits,
)

_GPU = "nnarch.kernels.cross_entropy.triton_kernel"
_REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
_NUMBERS = "int ignore_index, float label_smoothing, float z_loss, int reduction, int wanted"

# ------------------------------------------------------------------------------------- autograd


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> int:
    x, target, class_weight, *ctx.numbers, ctx.wanted = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    lse, dx = rest
    if ctx.wanted:
        ctx.save_for_backward(dx, _if_functorch(x))
    else:
        ctx.save_for_backward(x, target, class_weight, lse)
    return 1


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    need_x, need_target = ctx.needs_input_grad[:2]
    none = (None,) * 8
    if grad is None:
        return none
    if ctx.wanted:
        if need_target:
            raise NotImplementedError("nnarch::cross_entropy: target's gradient was not prepared")
        dx, x = ctx.saved_tensors
        return scaled("cross_entropy", grad, (dx,), (x,)) + none[1:]
    x, target, class_weight, lse = ctx.saved_tensors
    wanted = need_x * WANT_LOGITS + need_target * WANT_TARGET
    dx, dq = cross_entropy_backward(grad, x, target, class_weight, lse, *ctx.numbers, wanted)
    return dx if need_x else None, dq if need_target else None, *none[2:]


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> int:
    x, weight, bias, target, class_weight, *ctx.numbers, ctx.wanted = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    lse, *gradients = rest
    if ctx.wanted:
        ctx.save_for_backward(*gradients, *map(_if_functorch, (x, weight, bias)))
    else:
        ctx.save_for_backward(x, weight, bias, target, class_weight, lse)
    return 1


def _backward_linear(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    none = (None,) * 10
    if grad is None:
        return none
    need = ctx.needs_input_grad[:3]
    wanted = sum(bit for bit, n in zip((WANT_X, WANT_WEIGHT, WANT_BIAS), need, strict=True) if n)
    if ctx.wanted:
        if wanted & ~ctx.wanted:
            raise NotImplementedError(
                "nnarch::linear_cross_entropy: a gradient is missing that was not prepared"
            )
        saved = ctx.saved_tensors
        ready = [g if n else None for g, n in zip(saved[:3], need, strict=True)]
        return scaled("linear_cross_entropy", grad, ready, saved[3:]) + none[3:]
    x, weight, bias, target, class_weight, lse = ctx.saved_tensors
    gradients = linear_cross_entropy_backward(
        grad, x, weight, bias, target, class_weight, lse, *ctx.numbers, wanted
    )
    return *(g if n else None for g, n in zip(gradients, need, strict=True)), *none[3:]


def _if_functorch(t: Tensor | None) -> Tensor | None:
    """Only there is an input needed beside its gradient; elsewhere it may go."""
    return t if torch._C._are_functorch_transforms_active() else None


# ---------------------------------------------------------------------------------- operations


def _fake(x, target, class_weight, ignore, smoothing, z, reduction, wanted):  # type: ignore[no-untyped-def]
    positions = x.numel() // x.shape[1]
    return (
        x.new_empty((positions,) if reduction == NONE else ()),
        x.new_empty((positions,), dtype=torch.float64),
        empty_like_logits(x) if wanted else x.new_empty(0),
    )


def _fake_backward(grad, x, target, class_weight, lse, ignore, smoothing, z, r, wanted):  # type: ignore[no-untyped-def]
    return tuple(
        empty_like_logits(x) if wanted & bit else x.new_empty(0)
        for bit in (WANT_LOGITS, WANT_TARGET)
    )


def _ready(grad: Tensor, dx: Tensor, _: bool) -> tuple[Tensor | None, ...]:
    """cross_entropy_ready for a node where more than the kernel has to run."""
    return scaled("cross_entropy", grad, (dx,), (None,))


cross_entropy_op = library.declare(
    f"cross_entropy(Tensor x, Tensor target, Tensor? class_weight, {_NUMBERS}) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.cross_entropy,
    fake=_fake,
    check=check_forward,
    gpu=f"{_GPU}:cross_entropy",
    setup_context=_setup,
    backward=_backward,
    nodes=(
        Backward(
            op="cross_entropy_ready",
            arguments="grad 0, output 2, keeps graph",
            gradients=(("x",),),
            formula=_ready,
            given={"wanted": True},
        ),
    ),
)

_loss = library.first_output(cross_entropy_op)

# Second derivatives have no kernel: a backward through the operations below raises.
cross_entropy_backward = library.declare(
    "cross_entropy_backward(Tensor grad, Tensor x, Tensor target, Tensor? class_weight, "
    f"Tensor lse, {_NUMBERS}) -> (Tensor, Tensor)",
    reference=reference.cross_entropy_backward,
    fake=_fake_backward,
    check=check_backward,
    gpu=f"{_GPU}:cross_entropy_backward",
    **not_differentiable("cross_entropy_backward"),
)


def _linear_gradients(x: Tensor, weight: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if wanted & WANT_X else 0),
        x.new_empty(weight.shape if wanted & WANT_WEIGHT else 0),
        x.new_empty(weight.shape[0] if wanted & WANT_BIAS else 0),
    )


def _fake_linear(x, weight, bias, target, class_weight, ignore, smoothing, z, reduction, wanted):  # type: ignore[no-untyped-def]
    dtype, samples = compute_dtype(x.dtype), x.shape[0]
    return (
        x.new_empty((samples,) if reduction == NONE else (), dtype=dtype),
        x.new_empty((samples,), dtype=torch.float64),
        *_linear_gradients(x, weight, wanted),
    )


linear_cross_entropy_op = library.declare(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, "
    f"Tensor? class_weight, {_NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy,
    fake=_fake_linear,
    check=check_linear_forward,
    gpu=f"{_GPU}:linear_cross_entropy",
    setup_context=_setup_linear,
    backward=_backward_linear,
)

linear_cross_entropy_backward = library.declare(
    "linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, "
    f"Tensor target, Tensor? class_weight, Tensor lse, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy_backward,
    fake=lambda grad, x, weight, *rest: _linear_gradients(x, weight, rest[-1]),
    check=check_linear_backward,
    gpu=f"{_GPU}:linear_cross_entropy_backward",
    **not_differentiable("linear_cross_entropy_backward"),
)

# ----------------------------------------------------------------------------- public functions


@arrays.public
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits and targets, as :func:`torch.nn.functional.cross_entropy`.

    The logits are read once. Where the loss is reduced and wants a gradient, it is made while they
    are in cache. Under `torch.autocast` float16 and bfloat16 are computed as float32.

    Args:
        input: logits, ``[C]``, ``[N, C]`` or ``[N, C, d1, …]``.
        target: classes (integers without the dimension C), or probabilities of the shape of input.
        weight: ``[C]``, of the classes; or None. It has no gradient.
        size_average, reduce: deprecated, as in torch.
        ignore_index: a target that counts for nothing.
        reduction: "mean" (weighted by the targets' weights), "sum" or "none".
        label_smoothing: from 0 to 1, the share of the uniform distribution in the targets.
        z_loss: adds ``z_loss · logsumexp(input)²`` to every sample's loss (the mean of these over
            the samples that count); Chowdhery et al., 2022, PaLM, section 5.

    Returns:
        A scalar, or with "none" the shape of integer targets. Its gradient has no gradient of its
        own.

    Raises:
        ValueError: shapes that do not fit together, a target that is no class, a number outside
            its range.
        TypeError: arguments of the wrong type.
    """
    op = "cross_entropy"
    if (
        weight is None
        and reduction == "mean"
        and size_average is None
        and reduce is None
        and type(ignore_index) is int
        and label_smoothing == 0.0
        and z_loss == 0.0
        and type(target) is Tensor
        and target.dtype == torch.int64
        and input.dtype == torch.float32
        and not (input.is_nested or target.is_nested)
        and input.dim() == 2
        and target.shape == input.shape[:1]
    ):  # nothing below has anything to do: 2 µs
        wanted = int(torch.is_grad_enabled() and input.requires_grad)
        return _loss(input, target, None, ignore_index, 0.0, 0.0, MEAN, wanted)
    code = _reduction(op, reduction, size_average, reduce)
    library.check_tensor(op, "input", input)
    ignore_index, label_smoothing, z_loss = _numbers(op, ignore_index, label_smoothing, z_loss)
    if input.dtype in (torch.float16, torch.bfloat16) and _autocast(input) is not None:
        input = input.float()
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    sizes = _target_sizes(op, input, target)
    class_weight = _class_weight(op, "weight", weight, input)
    x = input.unsqueeze(0) if input.dim() == 1 else input
    if x.dim() > 3:
        x = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    if target.is_floating_point():
        target = target.to(input.dtype).reshape(x.shape)
    elif target.dtype != torch.int64 or target.dim() != 1:  # each of the two costs a µs
        target = target.to(torch.int64).reshape(-1)
    wanted = int(
        code != NONE
        and torch.is_grad_enabled()
        and input.requires_grad
        and not target.requires_grad
    )
    numbers = (ignore_index, label_smoothing, z_loss, code)
    loss = _loss(x, target, class_weight, *numbers, wanted)
    return loss.reshape(sizes) if code == NONE else loss


@arrays.public
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of the logits of a linear layer, which are never in memory as a whole.

    The arguments but the last are those of :func:`torch.nn.functional.linear_cross_entropy` of
    torch 2.13. The loss of a language model's last layer at the memory of a few of its rows. Where
    the loss is reduced and wants gradients, they are made in the forward: call it under
    `torch.no_grad` where no backward will follow. Wijmans et al., 2024, Cut Your Losses in
    Large-Vocabulary Language Models.

    Args:
        input: ``[..., D]``; under `torch.autocast` rounded to its dtype, as the layer is.
        linear_weight: ``[V, D]``; ``[V, d1, …, D]`` for a loss at several places of a sample.
        target: integers ``[...]``, classes from 0 to V - 1. Probabilities, and several places, are
            taken as :func:`cross_entropy` takes them, from logits in memory.
        linear_bias: ``[V]``, ``[V, d1, …]`` or None.
        weight: ``[V]`` or None, of the classes.
        reduction, ignore_index, label_smoothing, z_loss: as of :func:`cross_entropy`; None is -100.
        options: how torch's own function cuts its work; not used.

    Returns:
        A scalar, or with "none" the shape of target; float32 where `input` is float16 or bfloat16.
        Its gradient has no gradient of its own.

    Raises:
        ValueError: shapes that do not fit together, a target that is no class, a number outside
            its range.
        TypeError: arguments of the wrong type.
    """
    ignore_index = -100 if ignore_index is None else ignore_index
    if getattr(linear_weight, "ndim", 2) > 2 or (
        torch.is_tensor(target) and target.is_floating_point()
    ):
        return _from_logits(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
            label_smoothing, z_loss,
        )  # fmt: skip
    x, class_weight, weight, bias = input, weight, linear_weight, linear_bias
    op = "linear_cross_entropy"
    code = _reduction(op, reduction)
    library.check_tensor(op, "x", x)
    ignore_index, label_smoothing, z_loss = _numbers(op, ignore_index, label_smoothing, z_loss)
    dtype = _autocast(x)
    if dtype is not None:
        x, weight, bias = (_cast(t, dtype) for t in (x, weight, bias))
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    check_integers(op, target)
    if x.dim() < 1 or target.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: x must be [..., D] and target [...], got {tuple(x.shape)} and "
            f"{tuple(target.shape)}"
        )
    weights = _class_weight(op, "class_weight", class_weight, x)
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    wanted = 0
    if code != NONE and torch.is_grad_enabled():
        bits = ((x, WANT_X), (weight, WANT_WEIGHT), (bias, WANT_BIAS))
        wanted = sum(bit for t, bit in bits if getattr(t, "requires_grad", False))
    classes = target.to(torch.int64).reshape(-1)
    numbers = (ignore_index, label_smoothing, z_loss, code)
    loss = linear_cross_entropy_op(rows, weight, bias, classes, weights, *numbers, wanted)[0]
    return loss.reshape(target.shape) if code == NONE else loss


def _from_logits(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The same where every sample has several places, or targets are probabilities."""
    flat_bias = None if bias is None else bias.reshape(-1)
    logits = linear(x, weight.reshape(-1, weight.shape[-1]), flat_bias)
    return cross_entropy(
        logits.reshape(*x.shape[:-1], *weight.shape[:-1]),
        target,
        class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )


def _reduction(op: str, name: Any, size_average: Any = None, reduce: Any = None) -> int:
    if size_average is not None or reduce is not None:
        name = legacy_get_string(size_average, reduce)
    if not isinstance(name, str) or name not in _REDUCTIONS:
        raise ValueError(f'{op}: reduction must be "none", "mean" or "sum", got {name!r}')
    return _REDUCTIONS[name]


def _numbers(op: str, ignore_index: Any, smoothing: Any, z_loss: Any) -> tuple[int, float, float]:
    if type(ignore_index) is int and smoothing == 0.0 and z_loss == 0.0:
        return ignore_index, 0.0, 0.0
    try:
        numbers = int(ignore_index.__index__()), float(smoothing), float(z_loss)
    except (AttributeError, TypeError, ValueError):
        raise TypeError(
            f"{op}: ignore_index must be an int, label_smoothing and z_loss numbers, got "
            f"{ignore_index!r}, {smoothing!r} and {z_loss!r}"
        ) from None
    check_numbers(op, *numbers[1:], NONE)
    return numbers


def _target_sizes(op: str, input: Tensor, target: Tensor) -> torch.Size:
    """Sizes of an unreduced loss."""
    if input.dim() < 1:
        raise ValueError(f"{op}: input must be [C], [N, C] or [N, C, d1, …], got a scalar")
    shape = input.shape
    sizes = torch.Size(() if input.dim() == 1 else (shape[0], *shape[2:]))
    expected = shape if target.is_floating_point() else sizes
    if not target.is_floating_point():
        check_integers(op, target)
    if target.shape != expected:
        raise ValueError(
            f"{op}: target must have the shape {tuple(expected)} for input {tuple(shape)}, got "
            f"{tuple(target.shape)}"
        )
    return sizes


def _class_weight(op: str, name: str, weight: Tensor | None, x: Tensor) -> Tensor | None:
    if weight is None:
        return None
    library.check_tensor(op, name, weight)
    if weight.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{op}: {name} has no gradient; detach it")
    return weight.to(compute_dtype(x.dtype))


def _autocast(x: Tensor) -> torch.dtype | None:
    """The dtype of the autocast region that we are in, or None."""
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def _cast(t: Any, dtype: torch.dtype) -> Any:
    eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
    return t.to(dtype) if eligible else t
