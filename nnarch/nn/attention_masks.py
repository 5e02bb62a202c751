"""The masks of torch.nn.MultiheadAttention, where True hides, as one mask of our kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from nnarch.kernels.attention.op import mask_beside

_UNSEEN = float("-inf")


def check_mask(module: str, name: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Raise for a mask that is neither bool nor real, or that has none of the shapes."""
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{module}: {name} must be bool or floating point, got {mask.dtype}")
    if tuple(mask.shape) not in shapes:
        wanted = " or ".join(map(str, shapes))
        raise ValueError(f"{module}: {name} must have shape {wanted}, got {tuple(mask.shape)}")


def merge_masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batch: int,
    heads: int,
    extra_keys: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """One mask that broadcasts to [B, H, L, S + extra_keys]; bool (True: may see) or added.

    Args:
        attn_mask: [L, S] or [B·H, L, S]; bool (True: may not see) or added to the scores.
        key_padding_mask: [B, S], likewise.
        batch, heads: B and H.
        extra_keys: keys behind the S of the masks, which every query may see.
        dtype: of the queries.
    """
    if attn_mask is not None:
        if attn_mask.dim() == 2:
            attn_mask = attn_mask[None, None]
        else:
            attn_mask = attn_mask.reshape(batch, heads, *attn_mask.shape[1:])
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None]
    if attn_mask is None or key_padding_mask is None:
        mask = key_padding_mask if attn_mask is None else attn_mask
    elif attn_mask.dtype == key_padding_mask.dtype == torch.bool:
        mask = attn_mask | key_padding_mask
    else:
        wide = torch.promote_types(dtype, torch.float32)
        mask = _added(attn_mask, wide) + _added(key_padding_mask, wide)
    if mask is None:
        return None
    if extra_keys:
        mask = torch.nn.functional.pad(mask, (0, extra_keys))
    return ~mask if mask.dtype == torch.bool else mask_beside(mask, dtype)


def causal_mask(length: int, keys: int, offset: int, device: torch.device) -> Tensor:
    """[L, S], True where a query that stands at `offset` and behind may not see a key."""
    return torch.ones(length, keys, dtype=torch.bool, device=device).triu(offset + 1)


def detect_causal(mask: Tensor | None, is_causal: bool | None, length: int) -> bool:
    """Whether a stack of layers may treat `mask` as the causal one.

    Args:
        mask: bool or added, or None.
        is_causal: what the caller says; None: look at the mask. Where that cannot be done (a graph
            is compiled, or there are no values), the mask is read as any other.
        length: of the sequence.
    """
    if is_causal is not None or mask is None:
        return bool(is_causal)
    if torch.compiler.is_compiling() or mask.is_meta or mask.shape != (length, length):
        return False
    expected = causal_mask(length, length, 0, mask.device)
    return torch.equal(mask, expected if mask.dtype == torch.bool else _added(expected, mask.dtype))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, _UNSEEN)
