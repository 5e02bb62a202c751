"""What layer normalization's gradients are made of: shapes, their operations, row dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import library

from . import checks, reference

GPU = "nnarch.kernels.layer_norm.triton_kernel"
HALF = (torch.float16, torch.bfloat16)

# What a backward is asked for.
SUM, WEIGHT, BIAS = 1, 2, 4


def like(x: Tensor) -> Tensor:
    """An output: contiguous, whatever the strides of x, as torch's."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def wide(x: Tensor, *size: Any) -> Tensor:
    """A tensor in the dtype that statistics and the parameters' gradients have."""
    return x.new_empty(size, dtype=torch.float32 if x.dtype in HALF else x.dtype)


def row_count(x: Tensor, columns: int) -> Any:
    return x.numel() // columns if columns else 0


# ----------------------------------------------------------------------------- second derivatives


def _fake_backward_backward(*args: Any) -> tuple[Tensor, ...]:
    s, columns = args[4], args[7]
    return like(s), like(s), wide(s, columns)


layer_norm_backward_backward = library.declare(
    "layer_norm_backward_backward(Tensor gg_ds, Tensor? gg_weight, Tensor? gg_bias, Tensor grad, "
    "Tensor s, Tensor? weight, Tensor stats, int columns) "
    "-> (Tensor d_grad, Tensor d_s, Tensor d_weight)",
    reference=reference.layer_norm_backward_backward,
    fake=_fake_backward_backward,
    check=checks.layer_norm_backward_backward,
    gpu=f"{GPU}:layer_norm_backward_backward",
)

# ---------------------------------------------------------------------------- first derivatives


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    s, columns, wanted = args[2], args[5], args[6]
    ds = like(s) if wanted & SUM else s.new_empty(0)
    return ds, *(wide(s, columns if wanted & (WEIGHT | BIAS) else 0) for _ in range(2))


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, grad_sum, s, weight, stats, ctx.columns, ctx.wanted = inputs
    ctx.adds = grad_sum is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad, s, weight, stats)


def _backward_backward(
    ctx: Any, gg_ds: Tensor | None, gg_weight: Tensor | None, gg_bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad, s, weight, stats = ctx.saved_tensors
    grad_sum = gg_ds if ctx.adds else None
    if gg_ds is None and gg_weight is None and gg_bias is None:
        return (None,) * 7
    if gg_ds is None or not ctx.wanted & SUM:
        gg_ds = torch.zeros_like(s)
    if not ctx.wanted & (WEIGHT | BIAS):
        gg_weight = gg_bias = None
    d_grad, d_s, d_weight = layer_norm_backward_backward(
        gg_ds, gg_weight, gg_bias, grad, s, weight, stats, ctx.columns
    )
    # d_s holds the way through the statistics, which are functions of s.
    return d_grad, grad_sum, d_s, d_weight if weight is not None else None, None, None, None


layer_norm_backward = library.declare(
    "layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor s, Tensor? weight, Tensor stats, "
    "int columns, int wanted) -> (Tensor ds, Tensor dweight, Tensor dbias)",
    reference=reference.layer_norm_backward,
    fake=_fake_backward,
    check=checks.layer_norm_backward,
    gpu=f"{GPU}:layer_norm_backward",
    setup_context=_setup_backward,
    backward=_backward_backward,
)


def _setup_dropout(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.columns, ctx.dropout_p = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return row_dropout(grad, seed, ctx.columns, ctx.dropout_p), None, None, None


row_dropout = library.declare(
    "row_dropout(Tensor x, Tensor seed, int columns, float dropout_p) -> Tensor",
    reference=reference.row_dropout,
    fake=lambda x, *_: like(x),
    check=checks.row_dropout,
    gpu=f"{GPU}:row_dropout",
    setup_context=_setup_dropout,
    backward=_dropout_backward,
)
