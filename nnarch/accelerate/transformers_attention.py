"""Models of Hugging Face's transformers on nnarch's attention: ``attn_implementation="nnarch"``.

transformers asks two registries by that name: `AttentionInterface` for the function that attends,
`AttentionMaskInterface` for the one that makes its mask. A name that the second does not know gets
no mask at all, padding included, so both are registered together.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from nnarch import functional as F

NAME = "nnarch"


def register_transformers_attention() -> None:
    """Teach the transformers package the attention implementation "nnarch".

    Afterwards ``from_pretrained(…, attn_implementation="nnarch")`` and
    ``model.set_attn_implementation("nnarch")`` work on every model that lets its attention be
    chosen. May be called again.

    Raises:
        ImportError: transformers is not installed, or older than 4.53.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(
        NAME, sdpa_mask
    )  # boolean, and none where causality says it all


def choose_attention(model: Any) -> None:
    """Let a transformers model use nnarch's attention, where it can be chosen; others stay."""
    # Not by transformers.PreTrainedModel, which would import what nobody has imported yet.
    models = sys.modules.get("transformers.modeling_utils")
    if models is None or not isinstance(model, models.PreTrainedModel):
        return
    if model.config._attn_implementation in ("eager", "sdpa") and model._supports_sdpa:
        register_transformers_attention()
        model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the layer; its `is_causal` counts where the argument is None.
        query: [B, H, L, D].
        key, value: [B, G, S, D], H a multiple of G.
        attention_mask: None, bool (True: may see) or added to the scores; broadcasts to
            [B, H, L, S].
        dropout, scaling, is_causal: as in
            :func:`nnarch.functional.scaled_dot_product_attention`; causality is taken from the
            argument only where there is no mask, which otherwise has it.
        position_bias: added to the scores, broadcasts as the mask; learnt (T5).
        softcap: not supported.
        s_aux: [H], a learnt score of no key that takes its share of every softmax (GPT-OSS).

    Returns:
        [B, L, H, D], and None for the weights, which are never in memory.

    Raises:
        ValueError: scores are to be capped; "eager" does that.
    """
    if softcap is not None:
        raise ValueError("attn_implementation='nnarch' does not cap scores (softcap): use 'eager'")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    out, lse = F.scaled_dot_product_attention(
        query,
        key,
        value,
        _joined(attention_mask, position_bias),
        dropout_p=dropout,
        is_causal=bool(is_causal) and attention_mask is None and query.shape[2] > 1,
        scale=scaling,
        enable_gqa=True,
        return_lse=True,
    )
    if s_aux is not None:
        out = out * (lse - s_aux.view(1, -1, 1)).sigmoid().unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _joined(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.is_floating_point():
        return bias + mask
    return bias.masked_fill(~mask, float("-inf"))
