"""Transformer layers and stacks: torch.nn's modules, on fused kernels."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from nnarch.nn.attention import MultiheadAttention
from nnarch.nn.attention_masks import detect_causal
from nnarch.nn.cache import DecoderCache, LayerCache
from nnarch.nn.checks import check_dtype
from nnarch.nn.dropout import Dropout
from nnarch.nn.layer_norm import LayerNorm
from nnarch.nn.linear import Linear
from nnarch.nn.signature import signature_of
from nnarch.nn.transformer_steps import attention, feed_forward, run


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Self-attention and a feed-forward network, as torch.nn.TransformerEncoderLayer.

    Args:
        d_model: features.
        nhead: heads.
        dim_feedforward: features inside the feed-forward network.
        dropout: probability, in training: of attention weights, inside the feed-forward network,
            and of both results before they are added.
        activation: "relu", "gelu" or a function.
        layer_norm_eps: added to variances.
        batch_first: whether tensors are [B, L, E] instead of [L, B, E].
        norm_first: whether LayerNorm stands before each part instead of behind its add.
        bias: whether linear layers and norms have biases.
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.

    Raises:
        ValueError: a dtype without kernels.

    Source: Vaswani et al., 2017, Attention Is All You Need.
    """

    @signature_of(torch.nn.TransformerEncoderLayer)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Transform ``src [B, L, E]`` (``[L, B, E]`` without ``batch_first``, or ``[L, E]``).

        Args:
            src: the sequences.
            src_mask: [L, L] or [B·H, L, L]; bool (True: hidden) or added to the scores.
            src_key_padding_mask: [B, L], likewise.
            is_causal: promises that `src_mask` is the causal one; it may then be left out.
        """
        if src.is_nested:
            return self._nested(src)
        parts: dict[str, Any] = self._modules
        attend = attention(
            parts["self_attn"], None, src_key_padding_mask, src_mask, is_causal, None
        )
        feed = feed_forward(self)
        return run(
            src,
            self.norm_first,
            (attend, parts["dropout1"], parts["norm1"]),
            (feed, parts["dropout2"], parts["norm2"]),
        )

    def _nested(self, src: Tensor) -> Tensor:
        """The same of a nested tensor, which torch.nn's encoder makes of padded ones."""
        padded = src.to_padded_tensor(0.0)
        lengths = torch.tensor([len(row) for row in src.unbind()], device=padded.device)
        padding = torch.arange(padded.shape[1], device=padded.device) >= lengths[:, None]
        y = self(padded, src_key_padding_mask=padding)
        return torch._nested_tensor_from_mask(  # type: ignore[reportPrivateImportUsage]
            y, ~padding, mask_check=False
        )


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Self-attention, attention to an encoder's output, and a feed-forward network.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype: as :class:`TransformerEncoderLayer` has them.

    Raises:
        ValueError: a dtype without kernels.

    Source: Vaswani et al., 2017, Attention Is All You Need.
    """

    @signature_of(torch.nn.TransformerDecoderLayer)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Transform ``tgt [B, L, E]`` (``[L, B, E]`` without ``batch_first``, or ``[L, E]``).

        Args:
            tgt: the target's tokens; with a cache, those that are new.
            memory: the encoder's output, [B, S, E] likewise. With a cache it is read in the first
                call only, and may be None in the others.
            tgt_mask, memory_mask: [L, ·] or [B·H, L, ·]; bool (True: hidden) or added.
            tgt_key_padding_mask, memory_key_padding_mask: [B, ·], likewise.
            tgt_is_causal, memory_is_causal: promise that a mask is the causal one; it may then be
                left out.
            cache: keys and values of earlier calls, to which this one adds; masks of the target
                then count the stored tokens as keys.
        """
        parts: dict[str, Any] = self._modules
        attend = attention(
            parts["self_attn"],
            None,
            tgt_key_padding_mask,
            tgt_mask,
            tgt_is_causal,
            None if cache is None else cache.target,
        )
        look = attention(
            parts["multihead_attn"],
            (memory,),
            memory_key_padding_mask,
            memory_mask,
            memory_is_causal,
            None if cache is None else cache.memory,
        )
        stages = (
            (attend, parts["dropout1"], parts["norm1"]),
            (look, parts["dropout2"], parts["norm2"]),
            (feed_forward(self), parts["dropout3"], parts["norm3"]),
        )
        if cache is None:
            return run(tgt, self.norm_first, *stages)
        length = cache.target.length
        try:
            return run(tgt, self.norm_first, *stages)
        except BaseException:
            cache.target.length = length  # a call that failed may be tried again
            raise


class TransformerEncoder(torch.nn.TransformerEncoder):
    """A stack of copies of an encoder layer, as torch.nn.TransformerEncoder.

    Args:
        encoder_layer: is copied.
        num_layers: how often.
        norm: applied at the end, or None.
        enable_nested_tensor, mask_check: as in torch.nn. Padding costs no detour through nested
            tensors here; but where torch.nn's encoder goes through them (in eval mode, with
            left-aligned padding and no other mask, where no gradient is wanted), padded places of
            the last layer's output are zeros as there.

    Source: Vaswani et al., 2017, Attention Is All You Need.
    """

    def __init__(
        self,
        encoder_layer: torch.nn.TransformerEncoderLayer,
        num_layers: int,
        norm: Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        with warnings.catch_warnings():  # that nested tensors cannot be used
            warnings.simplefilter("ignore", UserWarning)
            super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor, mask_check)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """Transform `src` by all layers; arguments as a layer takes them.

        `is_causal` None looks whether `mask` is the causal one.
        """
        is_causal = detect_causal(mask, is_causal, _length(src, self.layers))
        zeros = mask is None and self._leaves_zeros(src, src_key_padding_mask)
        for layer in self.layers:
            src = layer(
                src, src_mask=mask, is_causal=is_causal, src_key_padding_mask=src_key_padding_mask
            )
        if zeros and src_key_padding_mask is not None:
            src = src.masked_fill(src_key_padding_mask.bool()[..., None], 0.0)
        return src if self.norm is None else self.norm(src)

    def _leaves_zeros(self, src: Tensor, padding: Tensor | None) -> bool:
        """Whether torch.nn's encoder would go through nested tensors."""
        if padding is None or not self.use_nested_tensor or self.layers[0].training:
            return False
        if src.dim() != 3 or torch.is_autocast_enabled():
            return False
        if not torch.backends.mha.get_fastpath_enabled():
            return False
        if torch.is_grad_enabled() and any(
            t.requires_grad for t in (src, *self.layers[0].parameters())
        ):
            return False
        if not self.mask_check:
            return True
        if torch.compiler.is_compiling() or src.is_meta:
            return False
        return torch._nested_tensor_from_mask_left_aligned(  # type: ignore[reportPrivateImportUsage]
            src, padding.logical_not()
        )


class TransformerDecoder(torch.nn.TransformerDecoder):
    """A stack of copies of a decoder layer, as torch.nn.TransformerDecoder.

    Args:
        decoder_layer: is copied.
        num_layers: how often.
        norm: applied at the end, or None.

    Source: Vaswani et al., 2017, Attention Is All You Need.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: DecoderCache | None = None,
    ) -> Tensor:
        """Transform `tgt` by all layers; arguments as a layer takes them.

        `tgt_is_causal` None looks whether `tgt_mask` is the causal one.
        """
        if cache is not None and len(cache.layers) != len(self.layers):
            raise ValueError(
                f"TransformerDecoder: cache must be for {len(self.layers)} layers, got "
                f"{len(cache.layers)}"
            )
        tgt_is_causal = detect_causal(tgt_mask, tgt_is_causal, _length(tgt, self.layers))
        for i, layer in enumerate(self.layers):
            # Layers of other people know no caches.
            further = {} if cache is None else {"cache": cache.layers[i]}
            tgt = layer(
                tgt,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal,
                memory_is_causal=memory_is_causal,
                **further,
            )
        return tgt if self.norm is None else self.norm(tgt)


class Transformer(torch.nn.Transformer):
    """An encoder and a decoder, as torch.nn.Transformer.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype: of the layers, as :class:`TransformerEncoderLayer` has
            them.
        num_encoder_layers, num_decoder_layers: how many.
        custom_encoder, custom_decoder: modules that take their place.

    Raises:
        ValueError: a dtype without kernels.

    Source: Vaswani et al., 2017, Attention Is All You Need.
    """

    @signature_of(torch.nn.Transformer)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # of nested tensors, which are not used here
            warnings.simplefilter("ignore", UserWarning)
            super().__init__(*args, **kwargs)
        given = [*args[7:9], kwargs.get("custom_encoder"), kwargs.get("custom_decoder")]
        for part in (self.encoder, self.decoder):
            if not any(part is custom for custom in given):
                adopt(part)


_ADOPTED: dict[type, type] = {
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.Linear: Linear,
    torch.nn.LayerNorm: LayerNorm,
    torch.nn.Dropout: Dropout,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerDecoder: TransformerDecoder,
}


def adopt(module: Module) -> None:
    """Make torch.nn's layers in `module`, as torch.nn's constructors built them, ours."""
    for parameter in module.parameters():
        check_dtype(type(module).__name__, parameter.dtype)
    for part in module.modules():
        twin = _ADOPTED.get(type(part))
        if twin is not None:
            part.__class__ = twin


def _length(x: Tensor, layers: Any) -> int:
    """The length of the sequences; 0 for those that are nested, which take no mask."""
    if x.is_nested:
        return 0
    if x.dim() == 2:
        return x.shape[0]
    first = getattr(layers[0], "self_attn", None) if len(layers) else None
    return x.shape[1 if getattr(first, "batch_first", False) else 0]
