"""Capsule routing and squash: schemas, checks, autograd, and the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.nodes import Backward

from . import reference

_GPU = "nnarch.kernels.capsule_routing.triton_kernel"

# --------------------------------------------------------------------------------------- checks


def _check_squash(x: Tensor, dim: int) -> None:
    library.check_tensor("squash", "x", x)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(
            f"squash: dim must be one of the {x.dim()} dimensions of x {tuple(x.shape)}, got {dim}"
        )


def _check_squash_grad(grad: Tensor, x: Tensor, dim: int) -> None:
    _check_squash(x, dim)
    library.check_tensor("squash_grad", "grad", grad)
    library.check_same("squash_grad", "grad", grad, x)
    if grad.shape != x.shape:
        raise ValueError(
            f"squash_grad: grad must have the shape of x, {tuple(x.shape)}, got {tuple(grad.shape)}"
        )


def _check_capsules(op: str, x: Tensor, weight: Tensor) -> None:
    library.check_tensor(op, "x", x)
    library.check_tensor(op, "weight", weight)
    library.check_same(op, "weight", weight, x)
    if x.dim() != 3 or weight.dim() != 4:
        raise ValueError(
            f"{op}: x must be [B, I, D_in] and weight [O, I, D_out, D_in], got {tuple(x.shape)} "
            f"and {tuple(weight.shape)}"
        )
    if x.shape[1] != weight.shape[1] or x.shape[2] != weight.shape[3]:
        raise ValueError(
            f"{op}: x has {x.shape[1]} capsules of {x.shape[2]} values, but weight is for "
            f"{weight.shape[1]} of {weight.shape[3]}"
        )


def _check_packed(op: str, packed: Tensor | None, x: Tensor) -> None:
    if packed is None:
        return
    library.check_tensor(op, "packed", packed)
    library.check_device(op, "packed", packed, x)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    iterations: int,
    detach_routing: bool,
    packed: Tensor | None,
) -> None:
    op = "capsule_routing"
    _check_capsules(op, x, weight)
    if bias is not None:
        library.check_tensor(op, "bias", bias)
        library.check_same(op, "bias", bias, x)
        wanted = (weight.shape[0], weight.shape[2])
        if tuple(bias.shape) != wanted:
            raise ValueError(
                f"{op}: bias must have the shape [O, D_out] = {wanted}, got {tuple(bias.shape)}"
            )
    if not 1 <= iterations < 2**31:
        raise ValueError(f"{op}: iterations must be at least 1, got {iterations}")
    _check_packed(op, packed, x)


def _check_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    detach_routing: bool,
    packed: Tensor | None,
) -> None:
    op = "capsule_routing_grad"
    _check_capsules(op, x, weight)
    library.check_tensor(op, "grad", grad)
    library.check_same(op, "grad", grad, x)
    library.check_tensor(op, "sums", sums)
    b, o, d = x.shape[0], weight.shape[0], weight.shape[2]
    if tuple(grad.shape) != (b, o, d):
        raise ValueError(f"{op}: grad must have the shape {(b, o, d)}, got {tuple(grad.shape)}")
    if sums.dim() != 4 or (sums.shape[0], *sums.shape[2:]) != (b, o, d) or sums.shape[1] < 1:
        raise ValueError(
            f"{op}: sums must be [B, iterations, O, D_out] for {(b, o, d)}, got {tuple(sums.shape)}"
        )
    if sums.dtype != _sum_dtype(x):
        raise TypeError(f"{op}: sums must be {_sum_dtype(x)}, got {sums.dtype}")
    _check_packed(op, packed, x)


def _check_pack(weight: Tensor) -> None:
    library.check_tensor("capsule_routing_pack", "weight", weight)
    if weight.dim() != 4:
        raise ValueError(
            f"capsule_routing_pack: weight must be [O, I, D_out, D_in], got {tuple(weight.shape)}"
        )


def _sum_dtype(x: Tensor) -> torch.dtype:
    """Sums stay in the type that is computed in: the backward starts from them."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


# ------------------------------------------------------------------------------------- autograd


def _setup_squash(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.dim = inputs
    ctx.save_for_backward(x)


def _squash_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return squash_grad(grad, x, ctx.dim), None


# Second derivatives have no kernel: a backward through this operation raises.
squash_grad = library.declare(
    "squash_grad(Tensor grad, Tensor x, int dim) -> Tensor",
    reference=reference.squash_grad,
    fake=lambda grad, x, dim: library.new_output(x, x.shape),
    check=_check_squash_grad,
    gpu=f"{_GPU}:squash_grad",
)

squash_op = library.declare(
    "squash(Tensor x, int dim) -> Tensor",
    reference=reference.squash,
    fake=lambda x, dim: library.new_output(x, x.shape),
    check=_check_squash,
    gpu=f"{_GPU}:squash",
    setup_context=_setup_squash,
    backward=_squash_backward,
    nodes=(
        Backward(
            op="squash_grad",
            arguments="grad 0, x, dim",
            gradients=(("x",),),
            formula=lambda *arguments: (squash_grad(*arguments),),
        ),
    ),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> int:
    x, weight, bias, _, ctx.detach_routing, packed = inputs
    ctx.has_bias = bias is not None
    _, sums = output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(x, weight, sums, packed)
    return 1


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, sums, packed = ctx.saved_tensors
    dx, dw, db = capsule_routing_grad(grad, x, weight, sums, ctx.detach_routing, packed)
    return dx, dw, db if ctx.has_bias else None, None, None, None


def _fake(
    x: Tensor, weight: Tensor, bias: Any, iterations: int, detach_routing: bool, packed: Any
) -> tuple[Tensor, Tensor]:
    b, o, d = x.shape[0], weight.shape[0], weight.shape[2]
    return x.new_empty(b, o, d), x.new_empty(b, iterations, o, d, dtype=_sum_dtype(x))


def _fake_grad(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        library.new_output(weight, weight.shape),
        x.new_empty(weight.shape[0], weight.shape[2]),
    )


capsule_routing_op = library.declare(
    "capsule_routing(Tensor x, Tensor weight, Tensor? bias, int iterations, bool detach_routing, "
    "Tensor? packed) -> (Tensor, Tensor)",
    reference=reference.capsule_routing,
    fake=_fake,
    check=_check,
    gpu=f"{_GPU}:capsule_routing",
    setup_context=_setup,
    backward=_backward,
)

# Second derivatives have no kernel either.
capsule_routing_grad = library.declare(
    "capsule_routing_grad(Tensor grad, Tensor x, Tensor weight, Tensor sums, bool detach_routing, "
    "Tensor? packed) -> (Tensor, Tensor, Tensor)",
    reference=reference.capsule_routing_grad,
    fake=_fake_grad,
    check=_check_grad,
    gpu=f"{_GPU}:capsule_routing_grad",
)


def _fake_pack(weight: Tensor) -> Tensor:
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size())


capsule_routing_pack = library.declare(
    "capsule_routing_pack(Tensor weight) -> Tensor",
    reference=reference.capsule_routing_pack,
    fake=_fake_pack,
    check=_check_pack,
    gpu=f"{_GPU}:capsule_routing_pack",
)

# ----------------------------------------------------------------------------- public functions


@arrays.public
def squash(x: Tensor, dim: int = -1) -> Tensor:
    """Vectors along `dim` scaled to lengths below 1: ``x · |x| / (1 + |x|²)``.

    Sabour, Frosst and Hinton, 2017, Dynamic Routing Between Capsules, equation 1; written so that
    a vector of length 0 gives 0 and has the gradient 0.

    Args:
        x: of any shape.
        dim: along which the vectors lie.

    Returns:
        A tensor of the shape and dtype of `x`. Its gradient has no gradient of its own.

    Raises:
        ValueError: `dim` is none of the dimensions.
        TypeError: `x` is not floating point, `dim` no int.
    """
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"squash: dim must be an int, got {dim!r}")
    return squash_op(x, dim)


@arrays.public_lower_precision
def capsule_routing(
    x: Tensor,
    weight: Tensor,
    iterations: int = 3,
    *,
    bias: Tensor | None = None,
    detach_routing: bool = False,
    packed: Tensor | None = None,
) -> Tensor:
    """Dynamic routing by agreement, all iterations in one call.

    Input capsule i votes ``weight[o, i] @ x[i]`` for output capsule o. Every iteration gives each
    input capsule's vote a softmax over the output capsules, squashes the weighted sums, and adds
    the agreement of votes and outputs to the softmax's logits, which start at zero. Sabour, Frosst
    and Hinton, 2017, Dynamic Routing Between Capsules, procedure 1. Between the iterations the
    votes stay in cache; the votes of a whole batch are never in memory.

    Args:
        x: ``[B, I, D_in]``, the input capsules.
        weight: ``[O, I, D_out, D_in]``.
        iterations: at least 1; the paper has 3.
        bias: ``[O, D_out]``, added to the sums before each squash; or None.
        detach_routing: the backward takes the softmax's weights as constants; False goes back
            through all iterations, as the paper's code does. The output is the same.
        packed: what :func:`pack_capsule_weight` made of `weight`; or None.

    Returns:
        ``[B, O, D_out]``. Its gradient has no gradient of its own.

    Raises:
        ValueError: shapes that do not fit together, iterations below 1.
        TypeError: dtypes that differ or are not floating point, arguments of the wrong type.
    """
    op = "capsule_routing"
    if isinstance(iterations, bool) or not isinstance(iterations, int):
        raise TypeError(f"{op}: iterations must be an int, got {iterations!r}")
    if not isinstance(detach_routing, bool):
        raise TypeError(f"{op}: detach_routing must be a bool, got {detach_routing!r}")
    if packed is None and _shares_packed(x, weight):
        packed = capsule_routing_pack(weight.detach())
    return capsule_routing_op(x, weight, bias, iterations, detach_routing, packed)[0]


def _shares_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether a backward will follow on the native kernels, which then need not pack once more."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and isinstance(weight, Tensor)
        and weight.dim() == 4
        and weight.device.type == x.device.type == "cpu"
        and weight.dtype == x.dtype
        and x.is_floating_point()
        and (x.requires_grad or weight.requires_grad)
        and library.native is not None
    )


def pack_capsule_weight(weight: Tensor) -> Tensor | None:
    """The weight in the order that the native kernels read, to pass as `packed=` again and again.

    Args:
        weight: ``[O, I, D_out, D_in]`` on the CPU; its values must not change afterwards.

    Returns:
        An opaque tensor; None where no native kernel runs (another device).
    """
    library.check_tensor("pack_capsule_weight", "weight", weight)
    if weight.device.type != "cpu" or library.native is None:
        return None
    return capsule_routing_pack(weight.detach())
