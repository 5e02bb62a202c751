"""Layer and RMS normalization: schemas, autograd, and the public functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.calls import wants_gradient
from nnarch.kernels.dropout.seed import draw_seed
from nnarch.nodes import Backward

from . import checks, reference
from .derivatives import (
    BIAS,
    GPU,
    HALF,
    SUM,
    WEIGHT,
    layer_norm_backward,
    like,
    row_count,
    row_dropout,
    wide,
)

_NO_GRADIENTS = (None,) * 5  # of the arguments after the residual


# -------------------------------------------------------------------------------------- forward


def _fake_train(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, residual, seed, columns, rms = args[0], args[3], args[4], args[5], args[8]
    total = x.new_empty(0) if residual is None and seed is None else like(x)
    return like(x), total, wide(x, 1 if rms else 2, row_count(x, columns))


def _setup_train(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> int:
    x, weight, _, residual, seed, ctx.columns, _, ctx.dropout_p, _ = inputs
    _, total, stats = output
    ctx.set_materialize_grads(False)
    if residual is None and seed is None:
        ctx.mark_non_differentiable(total, stats)
        ctx.save_for_backward(x, weight, stats, None)
        return 1
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(total, weight, stats, seed)
    return 2


def _train_backward(
    ctx: Any, grad: Tensor | None, grad_sum: Tensor | None = None, *_: Any
) -> tuple[Tensor | None, ...]:
    s, weight, stats, seed = ctx.saved_tensors
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    ds, dweight, dbias = grad_sum, None, None
    if grad is not None:
        wanted = SUM * (need_x or need_residual) + WEIGHT * need_weight + BIAS * need_bias
        ds, dweight, dbias = layer_norm_backward(
            grad, grad_sum, s, weight, stats, ctx.columns, wanted
        )
    dx = ds
    if need_x and seed is not None and ds is not None:
        dx = row_dropout(ds, seed, ctx.columns, ctx.dropout_p)
    return (
        dx if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        ds if need_residual else None,
        *_NO_GRADIENTS,
    )


def _gradients(grad: Tensor | None, grad_sum: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """layer_norm_backward for a node, which may have no gradient of y."""
    if grad is None:
        return grad_sum, None, None
    return layer_norm_backward(grad, grad_sum, *rest)


def _node(s: str, seen: int, residual: bool) -> Backward:
    return Backward(
        op="layer_norm_backward",
        arguments=f"grad 0, grad 1, {s}, weight, output 2, columns, wanted",
        gradients=(("x", "residual"), ("weight",), ("bias",)),
        formula=_gradients,
        bits={"x": SUM, "residual": SUM, "weight": WEIGHT, "bias": BIAS},
        seen=seen,
        given={"residual": residual, "seed": False},
    )


layer_norm_train = library.declare(
    "layer_norm_train(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, "
    "int columns, float eps, float dropout_p, bool rms) -> (Tensor y, Tensor sum, Tensor stats)",
    reference=reference.layer_norm_train,
    fake=_fake_train,
    check=checks.layer_norm_train,
    gpu=f"{GPU}:layer_norm_train",
    setup_context=_setup_train,
    backward=_train_backward,
    nodes=(_node("x", 1, residual=False), _node("output 1", 2, residual=True)),
)


_normalized = library.first_output(layer_norm_train)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, residual, *ctx.numbers = inputs
    ctx.save_for_backward(x, weight, residual)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The public functions call layer_norm_train for gradients; this computes its results again."""
    x, weight, residual = ctx.saved_tensors
    columns, eps, rms = ctx.numbers
    _, total, stats = layer_norm_train(x, weight, None, residual, None, columns, eps, 0.0, rms)
    need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
    wanted = SUM * (need_x or need_residual) + WEIGHT * need_weight + BIAS * need_bias
    ds, dweight, dbias = layer_norm_backward(
        grad, None, x if residual is None else total, weight, stats, columns, wanted
    )
    return (
        ds if need_x else None,
        dweight if need_weight else None,
        dbias if need_bias else None,
        ds if need_residual else None,
        *[None] * 3,
    )


layer_norm_op = library.declare(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, int columns, float eps, "
    "bool rms) -> Tensor",
    reference=reference.layer_norm,
    fake=lambda x, *_: like(x),
    check=checks.layer_norm,
    gpu=f"{GPU}:layer_norm",
    setup_context=_setup,
    backward=_backward,
)

# ------------------------------------------------------------------------------ public functions


def _is_plain(
    input: Tensor, normalized_shape: Any, eps: float, residual: Any, dropout_p: float, sum: bool
) -> bool:
    """Whether a call needs little of what :func:`_norm` looks at: a small one is 1 µs shorter."""
    return (
        type(normalized_shape) is tuple
        and len(normalized_shape) == 1
        and input.shape[-1:] == normalized_shape
        and not (dropout_p or sum)
        and type(eps) is float
        and (residual is None or (isinstance(residual, Tensor) and residual.dtype == input.dtype))
    )


def _plain(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    columns: int,
    eps: float,
    rms: bool,
) -> Tensor:
    if wants_gradient(input, weight, bias, residual):
        return _normalized(input, weight, bias, residual, None, columns, eps, 0.0, rms)
    return layer_norm_op(input, weight, bias, residual, columns, eps, rms)


def _norm(
    op: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    return_sum: bool,
    rms: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    if (
        isinstance(normalized_shape, (tuple, list))
        and len(normalized_shape) == 1
        and input.shape[-1:] == tuple(normalized_shape)
    ):
        columns = normalized_shape[0]
    else:
        size = checks.normalized_size(op, input, normalized_shape)
        columns = math.prod(size)
        weight, bias = checks.flat(op, "weight", weight, size), checks.flat(op, "bias", bias, size)
    if type(eps) is not float or dropout_p:
        checks.numbers(op, eps, dropout_p)
    if residual is not None and getattr(residual, "dtype", None) != input.dtype:
        input, residual = _promoted(op, input, residual)
    if not (return_sum or dropout_p):
        return _plain(input, weight, bias, residual, columns, eps, rms)
    seed = draw_seed(input) if dropout_p else None
    y, total, _ = layer_norm_train(
        input, weight, bias, residual, seed, columns, eps, float(dropout_p), rms
    )
    if not return_sum:
        return y
    return y, input if residual is None and seed is None else total


def _autocast(*tensors: Tensor | None) -> Any:
    """In float32, as torch.autocast gives them to torch's function on CUDA (not on the CPU)."""
    return tuple(t.float() if t is not None and t.dtype in HALF else t for t in tensors)


def _promoted(op: str, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype that torch adds them in: under autocast, a layer's half beside floats."""
    library.check_tensor(op, "residual", residual)
    dtype = torch.promote_types(input.dtype, residual.dtype)
    return input.to(dtype), residual.to(dtype)


@arrays.public
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer normalization of dropout(input) + residual, with torch.nn.functional's arguments first.

    With ``s = dropout(input) + residual``, ``y = (s - E[s])/√(Var[s] + eps)·weight + bias``, over
    the dimensions of `normalized_shape`. A post-LN block takes y alone, and s is not written where
    no gradient is wanted; a pre-LN block takes both.

    Args:
        input: ``[*, *normalized_shape]``, any strides.
        normalized_shape: the last dimensions of the input, which are normalized together.
        weight, bias: of the shape `normalized_shape`; of the input's dtype or, beside float16 and
            bfloat16, float32.
        eps: added to the (biased) variance.
        residual: of the input's shape, added before. Of another dtype, both are promoted, as torch
            does it.
        dropout_p: the probability of an element of the input to be dropped, before the residual is
            added. There is no training flag: pass 0 in evaluation.
        return_sum: also return s (the input itself where nothing is added or dropped).

    Returns:
        A contiguous tensor of the input's shape and dtype; with `return_sum`, (y, s). Under
        torch.autocast on CUDA both are float32, as torch's result.

    Raises:
        ValueError: shapes that do not fit, a probability outside [0, 1].
        TypeError: dtypes that do not fit.

    Source: Ba, Kiros and Hinton, 2016, Layer Normalization.
    """
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input, weight, bias, residual = _autocast(input, weight, bias, residual)
    if _is_plain(input, normalized_shape, eps, residual, dropout_p, return_sum):
        columns = normalized_shape[0]
        if not torch.is_grad_enabled() and torch._C._get_tracing_state() is None:
            return layer_norm_op(input, weight, bias, residual, columns, eps, False)
        return _plain(input, weight, bias, residual, columns, eps, False)
    return _norm(
        "layer_norm", input, normalized_shape, weight, bias, eps, residual, dropout_p, return_sum,
        False,
    )  # fmt: skip


@arrays.public
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS normalization of dropout(input) + residual, with torch.nn.functional's arguments first.

    With ``s = dropout(input) + residual``, ``y = s/√(E[s²] + eps)·weight``.

    Args:
        input, normalized_shape, weight, residual, dropout_p, return_sum: see :func:`layer_norm`.
        eps: added to the mean square; None stands for the machine epsilon of float32, for float64
            inputs of float64.

    Returns:
        A contiguous tensor of the input's shape and dtype; with `return_sum`, (y, s).

    Raises:
        ValueError, TypeError: as :func:`layer_norm`.

    Source: Zhang and Sennrich, 2019, Root Mean Square Layer Normalization.
    """
    if input.is_cuda and torch.is_autocast_enabled("cuda"):
        input, weight, residual = _autocast(input, weight, residual)
    if eps is None:
        double = torch.float64 in (input.dtype, getattr(residual, "dtype", None))
        eps = 2.0**-52 if double else 2.0**-23
    if _is_plain(input, normalized_shape, eps, residual, dropout_p, return_sum):
        return _plain(input, weight, None, residual, normalized_shape[0], eps, True)
    return _norm(
        "rms_norm", input, normalized_shape, weight, None, eps, residual, dropout_p, return_sum,
        True,
    )  # fmt: skip
