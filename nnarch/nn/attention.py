"""Multi-head attention: torch.nn's module around one product for query, key and value, and the
attention kernel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnarch import functional as F
from nnarch.kernels.attention.op import UNBOUNDED, attention_op
from nnarch.kernels.attention.weights import attention_weights_op
from nnarch.kernels.dropout.seed import draw_seed
from nnarch.nn.attention_masks import causal_mask, check_mask, merge_masks
from nnarch.nn.cache import GrowingCache, MemoryCache
from nnarch.nn.checks import check_dtype
from nnarch.nn.packing import PackedWeightMixin
from nnarch.nn.signature import signature_of

_NAME = "MultiheadAttention"
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
_OUT = -1  # the output projection's place among packed weights


class MultiheadAttention(PackedWeightMixin, torch.nn.MultiheadAttention):
    """Attention of several heads with the constructor and state_dict of torch.nn's.

    Where key and value are the query, one product projects all three, and the kernel reads them
    as they lie in it. Attention weights are computed only where they are asked for, by a kernel
    of their own, which averages them over heads before they are in memory.

    Args:
        embed_dim: features of the query and of the output.
        num_heads: heads, which share them.
        dropout: probability of an attention weight to be dropped, in training.
        bias: whether the four projections have biases.
        add_bias_kv: whether a learned key and value stand behind the others.
        add_zero_attn: whether a key and a value of zeros stand behind the others.
        kdim, vdim: features of key and value; `embed_dim` where None.
        batch_first: whether tensors are [B, L, E] instead of [L, B, E].
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.

    Raises:
        ValueError: a dtype without kernels; sizes that torch.nn's module refuses.

    A query that may see no key gives zeros before the output projection, where torch.nn's module
    gives NaN in some of its ways.

    Source: Vaswani et al., 2017, Attention Is All You Need.
    """

    @signature_of(torch.nn.MultiheadAttention)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_dtype(_NAME, self.out_proj.weight.dtype)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: GrowingCache | MemoryCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from every query to the keys.

        Args:
            query: [L, B, E], [B, L, E] with ``batch_first``, or [L, E].
            key, value: [S, B, kdim] and [S, B, vdim], likewise. None where a memory cache has them.
            key_padding_mask: [B, S] or [S]; bool (True: hidden) or added to the scores.
            need_weights: whether to return the weights too.
            attn_mask: [L, S] or [B·H, L, S], likewise.
            average_attn_weights: whether these are averaged over heads.
            is_causal: promises that `attn_mask` is the causal one, which is then not read. Other
                than in torch.nn it may be left out.
            cache: a :class:`nnarch.nn.GrowingCache` or StaticCache puts the new keys behind those
                of earlier calls, and S counts all of them; the first query stands where the first
                new key stands. A :class:`nnarch.nn.MemoryCache` keeps the projected keys and
                values of the first call for the later ones.

        Returns:
            The output, laid out as the query; the weights [B, L, S] or [B, H, L, S], or None.

        Raises:
            ValueError, TypeError: arguments that do not fit together; the message names them.
        """
        if query.dim() == 2:
            query, key, value, key_padding_mask = _batch_of_one(query, key, value, key_padding_mask)
            y, weights = self._attend(
                query, key, value, key_padding_mask, attn_mask, is_causal, cache,
                need_weights=need_weights, averaged=average_attn_weights, batch_first=True,
            )  # fmt: skip
            y, weights = y.squeeze(0), None if weights is None else weights.squeeze(0)
        else:
            y, weights = self._attend(
                query, key, value, key_padding_mask, attn_mask, is_causal, cache,
                need_weights=need_weights, averaged=average_attn_weights,
                batch_first=self.batch_first,
            )  # fmt: skip
        return y, weights

    def _attend(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        cache: GrowingCache | MemoryCache | None = None,
        *,
        batch_first: bool,
        need_weights: bool = False,
        averaged: bool = False,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output of a batch, plus `residual`; the weights, or their mean, where needed."""
        batch, length, keys = self._sizes(query, key, value, cache, batch_first)
        if key_padding_mask is not None:
            check_mask(_NAME, "key_padding_mask", key_padding_mask, (batch, keys))
        if attn_mask is not None:
            many = (batch * self.num_heads, length, keys)
            check_mask(_NAME, "attn_mask", attn_mask, many[1:], many)

        packed = self._packed_weights(self._weights(), (query, key, value))
        offset = cache.length if isinstance(cache, GrowingCache) else 0
        q, k, v = self._project(query, key, value, cache, packed, batch_first)
        if self.bias_k is not None or self.add_zero_attn:
            k, v = self._with_extra_keys(k, v)
        extra = k.shape[2] - keys
        if is_causal and not extra:
            attn_mask = None
        elif is_causal:  # the keys behind the last query are those that every query sees
            is_causal = False
            if attn_mask is None:
                attn_mask = causal_mask(length, keys, offset, q.device)
        mask = None
        if attn_mask is not None or key_padding_mask is not None:
            mask = merge_masks(attn_mask, key_padding_mask, batch, self.num_heads, extra, q.dtype)
        p = self.dropout if self.training else 0.0
        if need_weights:
            y, weights = _attention_and_weights(q, k, v, mask, p, is_causal, offset, averaged)
        else:
            weights = None
            y = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal, query_offset=offset)
        # The kernel's output lies in memory as [B, L, H, D].
        y = y.permute(0, 2, 1, 3) if batch_first else y.permute(2, 0, 1, 3)
        return self._project_out(y.flatten(2), residual, packed), weights

    def _project(
        self, query: Tensor, key: Any, value: Any, cache: Any, packed: Any, batch_first: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, keys and values [B, H, ·, D] with strides of the products that they come from."""

        def heads(x: Tensor, weights: Any, first: int, last: int) -> tuple[Tensor, ...]:
            weight, bias = weights
            ready = packed and packed.get(4 * first + last, F.pack_linear_weight, weight)
            y = F.linear(x, weight, bias, packed=ready)
            y = y.view(*y.shape[:2], last - first, self.num_heads, self.head_dim)
            # Taken apart before it is permuted: the gradients are then put together as they lie.
            order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
            return tuple(part.permute(order) for part in y.unbind(2))

        if isinstance(cache, MemoryCache) and cache.key is not None and cache.value is not None:
            (q,) = heads(query, self._split(1, 2)[0], 0, 1)
            return q, cache.key, cache.value
        if not self._qkv_same_embed_dim:
            inputs = zip((query, key, value), self._split(1, 1, 1), range(3), strict=True)
            q, k, v = (heads(x, w, i, i + 1)[0] for x, w, i in inputs)
        elif key is query and value is key:
            q, k, v = heads(query, self._split(3)[0], 0, 3)
        elif value is key:
            of_query, of_key = self._split(1, 2)
            (q,), (k, v) = heads(query, of_query, 0, 1), heads(key, of_key, 1, 3)
        else:
            inputs = zip((query, key, value), self._split(1, 1, 1), range(3), strict=True)
            q, k, v = (heads(x, w, i, i + 1)[0] for x, w, i in inputs)
        if isinstance(cache, MemoryCache):
            k, v = cache.fill(k, v)
        elif cache is not None:
            k, v = cache.append(k, v)
        return q, k, v

    def _split(self, *parts: int) -> list[tuple[Tensor, Tensor | None]]:
        """Weights and biases of query, key and value, in so many pieces of so many each."""
        bias = self._get("in_proj_bias")
        sizes = [part * self.embed_dim for part in parts]
        biases = [None] * len(parts) if bias is None else bias.split(sizes)
        if not self._qkv_same_embed_dim:
            if len(parts) == 2:  # of which the second is not wanted
                return [(self._get(_SEPARATE[0]), biases[0])]  # type: ignore[list-item]
            weights: Any = map(self._get, _SEPARATE)
        elif len(parts) == 1:  # the usual case
            return [(self._get("in_proj_weight"), bias)]  # type: ignore[list-item]
        else:
            weights = self._get("in_proj_weight").split(sizes)  # type: ignore[union-attr]
        return list(zip(weights, biases, strict=True))

    def _project_out(self, y: Tensor, residual: Tensor | None, packed: Any) -> Tensor:
        weight, bias = self.out_proj.weight, self.out_proj.bias
        ready = packed and packed.get(_OUT, F.pack_linear_weight, weight)
        return F.linear(y, weight, bias, residual=residual, packed=ready)

    def _with_extra_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The learned key and value, and those of zeros, behind the others."""
        batch, heads, _, depth = k.shape
        keys, values = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            for found, bias in ((keys, self.bias_k), (values, self.bias_v)):
                found.append(bias.view(1, heads, 1, depth).expand(batch, -1, -1, -1))
        if self.add_zero_attn:
            keys.append(k.new_zeros(batch, heads, 1, depth))
            values.append(v.new_zeros(batch, heads, 1, depth))
        return torch.cat(keys, 2), torch.cat(values, 2)

    def _sizes(
        self, query: Tensor, key: Any, value: Any, cache: Any, batch_first: bool
    ) -> tuple[int, int, int]:
        """B, L and S, of tensors that fit together."""
        if query.is_nested:
            raise TypeError(f"{_NAME}: query must be dense, got a nested tensor")
        if query.dim() != 3 or query.shape[2] != self.embed_dim:
            raise ValueError(
                f"{_NAME}: query must be [L, E] or 3-D with E = {self.embed_dim} at the end, got "
                f"{tuple(query.shape)}"
            )
        batch, length, _ = query.shape if batch_first else query.transpose(0, 1).shape
        if isinstance(cache, MemoryCache) and cache.key is not None:
            return batch, length, cache.key.shape[2]
        if key is query and value is key and self._qkv_same_embed_dim:
            keys = length
        else:
            keys = self._keys(query, key, value, batch_first)
        if isinstance(cache, GrowingCache):
            keys += cache.length
        elif cache is not None and not isinstance(cache, MemoryCache):
            raise TypeError(
                f"{_NAME}: cache must be a GrowingCache, StaticCache or MemoryCache, got "
                f"{type(cache).__name__}"
            )
        if cache is not None and (self.bias_k is not None or self.add_zero_attn):
            raise ValueError(f"{_NAME}: a cache goes with neither add_bias_kv nor add_zero_attn")
        return batch, length, keys

    def _keys(self, query: Tensor, key: Any, value: Any, batch_first: bool) -> int:
        batch_dim, length_dim = (0, 1) if batch_first else (1, 0)
        for name, x, size in (("key", key, self.kdim), ("value", value, self.vdim)):
            if not isinstance(x, Tensor):
                raise TypeError(f"{_NAME}: {name} must be a tensor, got {type(x).__name__}")
            if x.dim() != 3 or x.shape[2] != size or x.shape[batch_dim] != query.shape[batch_dim]:
                raise ValueError(
                    f"{_NAME}: {name} must have as many dimensions and the batch of query "
                    f"{tuple(query.shape)} and {size} features, got {tuple(x.shape)}"
                )
        if key.shape[length_dim] != value.shape[length_dim]:
            raise ValueError(
                f"{_NAME}: key and value must be equally long, got {tuple(key.shape)} and "
                f"{tuple(value.shape)}"
            )
        return key.shape[length_dim]

    def _get(self, name: str) -> Tensor | None:
        # Past nn.Module.__getattr__, as in Conv2d.
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def _weights(self) -> tuple[Any, ...]:
        """All that is packed."""
        names = ("in_proj_weight",) if self._qkv_same_embed_dim else _SEPARATE
        return (*map(self._get, names), self.out_proj.weight)

    def _pack_now(self) -> None:
        # How query, key and value are projected depends on which of them are one.
        packed = self._packed_weights(self._weights(), ())
        if packed is not None:
            packed.get(_OUT, F.pack_linear_weight, self.out_proj.weight)

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.nn.MultiheadAttention.__setstate__(self, state)


def _batch_of_one(
    query: Tensor, key: Tensor | None, value: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The same with a batch in front; what was one tensor stays one."""
    batched = query.unsqueeze(0)
    keys = batched if key is query else key if key is None else key.unsqueeze(0)
    values = keys if value is key else value if value is None else value.unsqueeze(0)
    return batched, keys, values, None if padding is None else padding.unsqueeze(0)


def _attention_and_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    p: float,
    is_causal: bool,
    offset: int,
    averaged: bool,
) -> tuple[Tensor, Tensor]:
    """Attention, and its weights after dropout as torch.nn's module returns them.

    The kernel never has a whole row of weights. They are made again from the scores and the
    log-sum-exp that it returns, dropout from the seed that it used.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    scale = 1 / math.sqrt(q.shape[-1])
    seed = draw_seed(q) if p > 0 else None
    low, high = -UNBOUNDED, offset if is_causal else UNBOUNDED
    y, lse = attention_op(q, k, v, mask, None, seed, p, scale, low, high)
    weights = attention_weights_op(q, k, mask, None, seed, lse, p, scale, low, high, averaged)
    return y, weights.squeeze(1) if averaged else weights
