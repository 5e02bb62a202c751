"""Softmax cross-entropy of logits: schema, shape function, autograd, and the public function.

Where a reduced loss wants gradients, the forward makes them: its tiles of logits are in cache then,
and a scalar is all that the gradient of the loss can add. An unreduced loss, whose gradient is
another for every sample, keeps the log-sum-exps and makes its logits again in the backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.calls import wants_gradient
from nnarch.nodes import Backward

from . import reference
from .arguments import (
    checked_class_weight,
    checked_numbers,
    reduction_code,
    target_sizes,
)
from .autograd import anchor, if_functorch, scaled
from .checks import check_backward, check_forward
from .reference import MEAN, NONE, WANT_LOGITS, WANT_TARGET, empty_like_logits

_GPU = "nnarch.kernels.cross_entropy.triton_kernel"
NUMBERS = "int ignore_index, float label_smoothing, float z_loss, int reduction, int wanted"


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> int:
    x, target, class_weight, *ctx.numbers, ctx.wanted = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    lse, dx = rest
    if ctx.wanted:
        ctx.save_for_backward(dx, if_functorch(x))
        ctx.anchor = anchor(x)
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
        return scaled("cross_entropy", grad, (dx,), (x,), [ctx.anchor]) + none[1:]
    x, target, class_weight, lse = ctx.saved_tensors
    wanted = need_x * WANT_LOGITS + need_target * WANT_TARGET
    dx, dq = cross_entropy_backward(grad, x, target, class_weight, lse, *ctx.numbers, wanted)
    return dx if need_x else None, dq if need_target else None, *none[2:]


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
    f"cross_entropy(Tensor x, Tensor target, Tensor? class_weight, {NUMBERS}) "
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
    f"Tensor lse, {NUMBERS}) -> (Tensor, Tensor)",
    reference=reference.cross_entropy_backward,
    fake=_fake_backward,
    check=check_backward,
    gpu=f"{_GPU}:cross_entropy_backward",
)


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
        wanted = int(wants_gradient(input))
        return _loss(input, target, None, ignore_index, 0.0, 0.0, MEAN, wanted)
    code = reduction_code(op, reduction, size_average, reduce)
    library.check_tensor(op, "input", input)
    ignore_index, label_smoothing, z_loss = checked_numbers(
        op, ignore_index, label_smoothing, z_loss
    )
    if input.dtype in (torch.float16, torch.bfloat16) and library.autocast_dtype(input) is not None:
        input = input.float()
    if not isinstance(target, Tensor):
        raise TypeError(f"{op}: target must be a tensor, got {type(target).__name__}")
    sizes = target_sizes(op, input, target)
    class_weight = checked_class_weight(op, "weight", weight, input)
    x = input.unsqueeze(0) if input.dim() == 1 else input
    if x.dim() > 3:
        x = x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    if target.is_floating_point():
        target = target.to(input.dtype).reshape(x.shape)
    elif target.dtype != torch.int64 or target.dim() != 1:  # each of the two costs a µs
        target = target.to(torch.int64).reshape(-1)
    wanted = int(code != NONE and not target.requires_grad and wants_gradient(input))
    numbers = (ignore_index, label_smoothing, z_loss, code)
    loss = _loss(x, target, class_weight, *numbers, wanted)
    return loss.reshape(sizes) if code == NONE else loss
