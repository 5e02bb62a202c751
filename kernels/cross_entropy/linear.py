"""Cross-entropy of a linear layer whose logits are never in memory: the operation and its gradient.

Where a reduced loss wants gradients, the forward makes them, as in op.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.calls import wants_gradient
from nnarch.kernels.linear.op import linear

from . import reference
from .arguments import cast, checked_class_weight, checked_numbers, reduction_code
from .autograd import anchor, if_functorch, scaled
from .checks import check_integers, check_linear_backward, check_linear_forward
from .op import NUMBERS, cross_entropy
from .reference import NONE, WANT_BIAS, WANT_WEIGHT, WANT_X, compute_dtype

_GPU = "nnarch.kernels.cross_entropy.triton_kernel"


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> int:
    x, weight, bias, target, class_weight, *ctx.numbers, ctx.wanted = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    lse, *gradients = rest
    if ctx.wanted:
        ctx.save_for_backward(*gradients, *map(if_functorch, (x, weight, bias)))
        ctx.anchors = [anchor(t) for t in (x, weight, bias)]
    else:
        ctx.save_for_backward(x, weight, bias, target, class_weight, lse)
    return 1


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
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
        return scaled("linear_cross_entropy", grad, ready, saved[3:], ctx.anchors) + none[3:]
    x, weight, bias, target, class_weight, lse = ctx.saved_tensors
    gradients = linear_cross_entropy_backward(
        grad, x, weight, bias, target, class_weight, lse, *ctx.numbers, wanted
    )
    return *(g if n else None for g, n in zip(gradients, need, strict=True)), *none[3:]


def _gradients(x: Tensor, weight: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if wanted & WANT_X else 0),
        x.new_empty(weight.shape if wanted & WANT_WEIGHT else 0),
        x.new_empty(weight.shape[0] if wanted & WANT_BIAS else 0),
    )


def _fake(x, weight, bias, target, class_weight, ignore, smoothing, z, reduction, wanted):  # type: ignore[no-untyped-def]
    dtype, samples = compute_dtype(x.dtype), x.shape[0]
    return (
        x.new_empty((samples,) if reduction == NONE else (), dtype=dtype),
        x.new_empty((samples,), dtype=torch.float64),
        *_gradients(x, weight, wanted),
    )


linear_cross_entropy_op = library.declare(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, "
    f"Tensor? class_weight, {NUMBERS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy,
    fake=_fake,
    check=check_linear_forward,
    gpu=f"{_GPU}:linear_cross_entropy",
    setup_context=_setup,
    backward=_backward,
)

linear_cross_entropy_backward = library.declare(
    "linear_cross_entropy_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, "
    f"Tensor target, Tensor? class_weight, Tensor lse, {NUMBERS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.linear_cross_entropy_backward,
    fake=lambda grad, x, weight, *rest: _gradients(x, weight, rest[-1]),
    check=check_linear_backward,
    gpu=f"{_GPU}:linear_cross_entropy_backward",
)


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
    code = reduction_code(op, reduction)
    library.check_tensor(op, "x", x)
    ignore_index, label_smoothing, z_loss = checked_numbers(
        op, ignore_index, label_smoothing, z_loss
    )
    dtype = library.autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = (cast(t, dtype) for t in (x, weight, bias))
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    check_integers(op, target)
    if x.dim() < 1 or target.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: x must be [..., D] and target [...], got {tuple(x.shape)} and "
            f"{tuple(target.shape)}"
        )
    weights = checked_class_weight(op, "class_weight", class_weight, x)
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    wanted = 0
    if code != NONE:
        bits = ((x, WANT_X), (weight, WANT_WEIGHT), (bias, WANT_BIAS))
        wanted = sum(bit for t, bit in bits if wants_gradient(t))
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
