"""attention: schemas, autograd, and the public function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.kernels.dropout.seed import draw_seed
from nnarch.nodes import Backward

from . import reference
from .checks import check_attention, check_attention_backward, lse_dtype

_GPU = "nnarch.kernels.attention.triton_kernel"
_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? key_lengths, Tensor? seed"
_NUMBERS = "float dropout_p, float scale, int low, int high"
UNBOUNDED = 2**62
"""A side of the band without a limit: further than any two positions are apart."""


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return (
        reference.new_output(query, value),
        query.new_empty(query.shape[:3], dtype=lse_dtype(query)),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout_p, ctx.scale, ctx.low, ctx.high = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *tensors, out, lse = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 10
    if grad is None:
        grad = torch.zeros_like(out)
    dq, dk, dv, d_mask = attention_backward(
        grad,
        grad_lse,
        *tensors,
        out,
        lse,
        ctx.dropout_p,
        ctx.scale,
        ctx.low,
        ctx.high,
        ctx.needs_input_grad[3],
    )
    return dq, dk, dv, d_mask if ctx.needs_input_grad[3] else None, *[None] * 6


def _fake_backward(grad: Tensor, grad_lse: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    query, mask = rest[0], rest[3]
    d_mask = query.new_empty(mask.shape if mask is not None and rest[-1] else 0)
    return *(reference.new_output(t, t) for t in rest[:3]), d_mask


attention_backward = library.declare(
    f"attention_backward(Tensor grad, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, "
    f"{_NUMBERS}, bool mask_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.attention_backward,
    fake=_fake_backward,
    check=check_attention_backward,
    gpu=f"{_GPU}:attention_backward",
)


def _gradients(grad: Tensor | None, grad_lse: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    """attention_backward for a node, which may have no gradient of the output."""
    return attention_backward(torch.zeros_like(rest[6]) if grad is None else grad, grad_lse, *rest)


attention_op = library.declare(
    f"attention({_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor)",
    reference=reference.attention,
    fake=_fake,
    check=check_attention,
    gpu=f"{_GPU}:attention",
    setup_context=_setup,
    backward=_backward,
    nodes=(
        Backward(
            op="attention_backward",
            arguments="grad 0, grad 1, query, key, value, mask, key_lengths, seed, output 0, "
            "output 1, dropout_p, scale, low, high, wanted",
            gradients=(("query",), ("key",), ("value",), ("mask",)),
            formula=_gradients,
            bits={"mask": 1},
            seen=2,
        ),
    ),
)


_attention_alone = library.first_output(attention_op)


@arrays.public_lower_precision
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: int | tuple[int, int] | None = None,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale·query·keyᵀ + mask)·value, without the scores in memory.

    The arguments before the star are those of
    :func:`torch.nn.functional.scaled_dot_product_attention`. Conditions add up: a query sees the
    keys that the mask, causality, the window and the key's length all allow. One that sees none
    gives zeros, with zero gradients.

    Args:
        query: [..., H, L, D], any strides: a view of one packed query-key-value tensor is read in
            place. [..., L, D] without heads is taken too. Leading dimensions broadcast with those
            of key and value, without a copy.
        key: [..., G, S, D]; H is a multiple of G with `enable_gqa`, else equal.
        value: [..., G, S, Dv].
        attn_mask: broadcasts to [..., H, L, S]; bool (True: may see), or of the query's dtype or
            float32 and added to the scores. Read as given, never expanded in memory.
        dropout_p: the probability of a weight to be dropped.
        is_causal: query i sees keys up to i + query_offset.
        scale: 1/sqrt(D) where None.
        enable_gqa: whether several heads of the query may share a head of key and value.
        window: query i sees keys from i + query_offset - left to i + query_offset + right; one
            number w stands for the w last keys, the query's own among them: (w - 1, 0).
        query_offset: the position among the keys of the first query: how many keys a cache held
            before this call.
        key_lengths: [B] whole numbers: how many keys each sequence of the batch has.
        return_lse: also return the log-sum-exp of the scores, [..., H, L], differentiable.

    Returns:
        [..., H, L, Dv], in memory in the order of the query's dimensions.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.

    Papers: Vaswani et al., Attention Is All You Need, 2017; Dao et al., FlashAttention, 2022;
    Milakov and Gimelshein, Online normalizer calculation for softmax, 2018.
    """
    low, high = band(is_causal, window, query_offset)
    if not (type(key) is type(value) is Tensor and attn_mask is None is key_lengths):
        _refuse(key=key, value=value, attn_mask=attn_mask, key_lengths=key_lengths)
    if key_lengths is not None and key_lengths.dtype != torch.int64:
        key_lengths = whole_lengths(key_lengths)
    if attn_mask is not None and attn_mask.dtype == torch.float32 != query.dtype:
        attn_mask = mask_beside(attn_mask, query.dtype)
    lead = None
    sizes, key_sizes, value_sizes = query.shape, key.shape, value.shape
    if not (  # slices of sizes would take a tenth of a small call, and looking inside half of that
        len(sizes) == len(key_sizes) == len(value_sizes) == 4
        and (
            sizes == key_sizes == value_sizes
            or (
                sizes[0] == key_sizes[0] == value_sizes[0]
                and (enable_gqa or sizes[1] == key_sizes[1] == value_sizes[1])
            )
        )
        and (attn_mask is None or attn_mask.dim() == 4)
    ):
        query, key, value, attn_mask, lead = _as_heads(query, key, value, attn_mask, enable_gqa)
    if scale is None:
        scale = 1 / math.sqrt(sizes[-1] or 1)
    seed = draw_seed(query) if dropout_p > 0 else None
    if not return_lse:
        out = _attention_alone(
            query, key, value, attn_mask, key_lengths, seed, dropout_p, scale, low, high
        )
        return out if lead is None else out.reshape(*lead, *out.shape[-2:])
    out, lse = attention_op(
        query, key, value, attn_mask, key_lengths, seed, dropout_p, scale, low, high
    )
    if lead is not None:
        out, lse = out.reshape(*lead, *out.shape[-2:]), lse.reshape(*lead, lse.shape[-1])
    return out, lse


def _as_heads(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...] | None]:
    """All in four dimensions, and those before the last two that the result has, where not two.

    Raises:
        ValueError: heads that do not match, leading dimensions that do not broadcast.
    """
    batch, lead = (-3 if enable_gqa else -2), None
    if not query.shape[:batch] == key.shape[:batch] == value.shape[:batch]:
        query, key, value = _broadcast(query, key, value, batch)
    if query.dim() != 4 or key.dim() != 4 or (attn_mask is not None and attn_mask.dim() != 4):
        query, key, value, attn_mask, lead = _four_dimensions(query, key, value, attn_mask)
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(
            f"attention: query has {query.shape[1]} heads and key {key.shape[1]}: "
            "enable_gqa=True lets heads share them"
        )
    return query, key, value, attn_mask, lead


def band(is_causal: bool, window: int | tuple[int, int] | None, offset: int) -> tuple[int, int]:
    """The least and the greatest j - i at which query i sees key j."""
    if window is None and type(offset) is int:
        return -UNBOUNDED, offset if is_causal else UNBOUNDED
    if isinstance(offset, (bool, float, str)):
        raise TypeError(f"attention: query_offset must be an int, got {offset!r}")
    if isinstance(window, (bool, float, str)):
        raise TypeError(f"attention: window must be an int or two, got {window!r}")
    if window is None:
        return -UNBOUNDED, offset if is_causal else UNBOUNDED
    left, right = (window - 1, 0) if isinstance(window, int) else window
    if left < 0 or right < 0:
        raise ValueError(f"attention: window must be at least (0, 0) or 1, got {window}")
    return offset - left, offset + (0 if is_causal else right)


def _refuse(**arguments: Any) -> None:
    """Raise for what is neither a tensor nor None."""
    for name, given in arguments.items():
        if not isinstance(given, Tensor) and (given is not None or name in ("key", "value")):
            raise TypeError(f"attention: {name} must be a tensor, got {type(given).__name__}")


def whole_lengths(key_lengths: Tensor) -> Tensor:
    if key_lengths.is_floating_point() or key_lengths.dtype == torch.bool:
        raise TypeError(f"attention: key_lengths must be whole numbers, got {key_lengths.dtype}")
    return key_lengths.long()


def _broadcast(
    query: Tensor, key: Tensor, value: Tensor, batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All three with the same dimensions before `batch`, if they can have them."""
    if min(query.dim(), key.dim(), value.dim()) < -batch:
        return query, key, value  # the checks name what does not fit
    try:
        lead = torch.broadcast_shapes(*(t.shape[:batch] for t in (query, key, value)))
    except RuntimeError:
        return query, key, value
    return (
        query.expand(*lead, *query.shape[batch:]),
        key.expand(*lead, *key.shape[batch:]),
        value.expand(*lead, *value.shape[batch:]),
    )


def mask_beside(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """An added mask in the query's dtype. A finite number stays one: finfo.min is no -infinity."""
    if mask.dtype == dtype:
        return mask
    limits = torch.finfo(dtype)
    if limits.max > torch.finfo(mask.dtype).max:
        return mask.to(dtype)
    bounded = mask.clamp(limits.min, limits.max)
    return torch.where(mask.isinf(), mask, bounded).to(dtype)


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, tuple[int, ...]]:
    """The arguments as [B, H, L, D], and the dimensions that the output has before the last two."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2 or tensor.dim() != query.dim():
            raise ValueError(
                f"attention: query, key and value must have as many dimensions, at least two; "
                f"got {tuple(query.shape)} and {name} {tuple(tensor.shape)}"
            )
    lead, batch = tuple(query.shape[:-2]), tuple(query.shape[:-3])
    if mask is not None and mask.dim() > max(4, query.dim()):
        raise ValueError(
            f"attention: mask must broadcast to {(*lead, query.shape[-2], key.shape[-2])}, "
            f"got shape {tuple(mask.shape)}"
        )
    if mask is not None and mask.dim() < 4:
        mask = mask.reshape(*[1] * (4 - mask.dim()), *mask.shape)
    elif mask is not None and query.dim() > 4:
        mask = mask.expand(*batch, *mask.shape[-3:]).flatten(0, -4)
    return _collapsed(query), _collapsed(key), _collapsed(value), mask, lead


def _collapsed(x: Tensor) -> Tensor:
    if x.dim() > 4:
        return x.flatten(0, -4)
    return x.reshape(*[1] * (4 - x.dim()), *x.shape)
