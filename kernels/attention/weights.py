"""attention_weights: what attention multiplies its values by, for those who want to see it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library

from . import reference
from .checks import check_attention_weights, check_attention_weights_backward, lse_dtype
from .op import UNBOUNDED, band, whole_lengths

_GPU = "nnarch.kernels.attention.triton_kernel"
_INPUTS = (
    "Tensor query, Tensor key, Tensor? mask, Tensor? key_lengths, Tensor? seed, Tensor lse, "
    "float dropout_p, float scale, int low, int high, bool averaged"
)


def _fake(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty((batch, 1 if rest[-1] else heads, length, key.shape[2]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers = inputs[6:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad
    dq, dk, d_lse, d_mask = attention_weights_backward(
        grad, *ctx.saved_tensors, *ctx.numbers, needed[2]
    )
    return dq, dk, d_mask if needed[2] else None, None, None, d_lse, *[None] * 5


attention_weights_op = library.declare(
    f"attention_weights({_INPUTS}) -> Tensor",
    reference=reference.attention_weights,
    fake=_fake,
    check=check_attention_weights,
    gpu=f"{_GPU}:attention_weights",
    setup_context=_setup,
    backward=_backward,
)


def _fake_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    query, key, mask = rest[:3]
    d_mask = query.new_empty(mask.shape if mask is not None and rest[-1] else 0)
    d_lse = query.new_empty(query.shape[:3], dtype=lse_dtype(query))
    return *(reference.new_output(t, t) for t in (query, key)), d_lse, d_mask


attention_weights_backward = library.declare(
    f"attention_weights_backward(Tensor grad, {_INPUTS}, bool mask_gradient) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.attention_weights_backward,
    fake=_fake_backward,
    check=check_attention_weights_backward,
    gpu=f"{_GPU}:attention_weights_backward",
)


@arrays.public_lower_precision
def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: int | tuple[int, int] | None = None,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
    average_heads: bool = False,
) -> Tensor:
    """The weights of attention, exp(scale·query·keyᵀ + mask - lse).

    Attention itself has them nowhere; here they are made again from the log-sum-exp that
    :func:`scaled_dot_product_attention` returns with `return_lse`. Averaged over heads, nothing
    of size H·L·S is in memory. On the CPU a row whose log-sum-exp is 1024 or more (2**20 in
    float64), which has lost the sum, is divided by its own sum: there `lse` is that of these keys.

    Args:
        query: [B, H, L, D], any strides.
        key: [B, G, S, D]; H is a multiple of G.
        lse: [B, H, L], of float32 or (for a query of it) float64.
        attn_mask, is_causal, scale, window, query_offset, key_lengths: as of the call that
            returned `lse`; the mask has four dimensions.
        average_heads: whether to return the mean over heads.

    Returns:
        [B, H, L, S], or [B, L, S] of the mean; zeros for keys that a query does not see.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    low, high = -UNBOUNDED, UNBOUNDED
    if window is not None or is_causal:
        low, high = band(is_causal, window, query_offset)
    if key_lengths is not None and key_lengths.dtype != torch.int64:
        key_lengths = whole_lengths(key_lengths)
    if scale is None:
        scale = 1 / math.sqrt(max(1, query.shape[-1]))
    weights = attention_weights_op(
        query, key, attn_mask, key_lengths, None, lse, 0.0, scale, low, high, average_heads
    )
    return weights.squeeze(1) if average_heads else weights
