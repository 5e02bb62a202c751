"""Benchmark cases of attention; a part of :mod:`nnarch.benchmarking.cases`.

The rival is torch's scaled_dot_product_attention, eager and compiled. One tensor holds query, key
and value, so that it is one input; in decoding the keys and values are a cache, and only the query
is the input.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nnarch.benchmarking.case import Case, Target

ATTENTION_TARGETS: dict[str, Target] = {
    "attention": Target(1.1, 1.25),
    "attention causal": Target(1.9, 2.4),
    "attention decode": Target(1.6, 2.2),
    "attention fwd+bwd": Target(1.25, 1.6),
    "attention weights": Target(1.0, 1.2),
}


def attention_function(namespace: Any) -> Any:
    """scaled_dot_product_attention of torch, or of nnarch."""
    if namespace is nn:
        return nn.functional.scaled_dot_product_attention
    from nnarch.functional import scaled_dot_product_attention

    return scaled_dot_product_attention


class _SelfAttention(nn.Module):
    """[3, B, H, S, D] to [B, H, S, D]. With `lengths`, nnarch takes them and torch a mask."""

    def __init__(
        self, namespace: Any, mask: Tensor | None, lengths: Tensor | None, causal: bool
    ) -> None:
        super().__init__()
        self.attend, self.causal = attention_function(namespace), causal
        self.options: dict[str, Tensor] = {}
        if lengths is not None and namespace is not nn:
            self.options["key_lengths"] = lengths
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(0)
        mask: Any = None if self.options else self.mask
        return self.attend(q, k, v, mask, is_causal=self.causal, **self.options)


class _Decode(nn.Module):
    """One query [1, 1, H, 1, D] on a cache of `keys` keys in `groups` heads.

    The cache has three dimensions: one of four would be made channels_last with the module.
    """

    def __init__(self, namespace: Any, groups: int, keys: int, depth: int) -> None:
        super().__init__()
        self.attend = attention_function(namespace)
        generator = torch.Generator().manual_seed(1)
        for name in ("k", "v"):
            cache = torch.randn(groups, keys, depth, generator=generator, device="cpu")
            self.register_buffer(name, cache.to(torch.get_default_device()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        k: Any = self.k
        v: Any = self.v
        q = x[0]
        return self.attend(q, k[None], v[None], enable_gqa=q.shape[1] != k.shape[0])


class _WithWeights(nn.Module):
    """Self-attention that returns its weights too, averaged over heads or of each: their sum with
    the output's is what is compared, and costs both sides the same."""

    def __init__(self, namespace: Any, width: int, heads: int, averaged: bool) -> None:
        super().__init__()
        self.attend = namespace.MultiheadAttention(width, heads, batch_first=True)
        self.averaged = averaged

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attend(x, x, x, average_attn_weights=self.averaged)
        return torch.cat((y.flatten(), weights.flatten()))


def _mask(kind: str, b: int, s: int) -> tuple[Tensor | None, Tensor | None]:
    """The mask of a case, and the key lengths it stands for."""
    generator = torch.Generator().manual_seed(2)
    if kind == "lengths":
        lengths = torch.randint(s // 4, s + 1, (b,), generator=generator, device="cpu")
        mask = torch.arange(s, device="cpu") < lengths[:, None, None, None]
        return mask.to(torch.get_default_device()), lengths
    if kind == "bool":
        seen = torch.rand(1, 1, s, s, generator=generator, device="cpu") < 0.9
        return seen.to(torch.get_default_device()), None
    if kind == "additive":
        bias = torch.randn(1, 1, s, s, generator=generator, device="cpu")
        return bias.to(torch.get_default_device()), None
    return None, None


def attention(
    b: int, h: int, s: int, d: int, kind: str = "", *, causal: bool = False, **options: Any
) -> Case:
    """Self-attention of `s` positions; `kind` is "", "bool", "additive" or "lengths"."""
    backward = options.get("backward", False)
    pairs = s * (s + 1) // 2 if causal else s * s
    extra = f"_{kind}" if kind else ""
    words = {"bool": " bool mask", "additive": " additive mask", "lengths": " key lengths"}
    return Case(
        f"attention_b{b}_h{h}_s{s}_d{d}" + extra + "_causal" * causal + "_fb" * backward,
        "attention" + " causal" * (causal and not backward) + " fwd+bwd" * backward,
        lambda nn: _SelfAttention(nn, *_mask(kind, b, s), causal),
        (3, b, h, s, d),
        label=f"attention {b}×{h}×{s}×{d}"
        + words.get(kind, "")
        + " causal" * causal
        + " fwd+bwd" * backward,
        flops=4 * b * h * pairs * d,
        **options,
    )


def decode(h: int, groups: int, keys: int, d: int, **options: Any) -> Case:
    """One new position on a cache."""
    shared = f":{groups}" if groups != h else ""
    return Case(
        f"attention_decode_h{h}{shared.replace(':', 'g')}_kv{keys}_d{d}",
        "attention decode",
        lambda nn: _Decode(nn, groups, keys, d),
        (1, 1, h, 1, d),
        label=f"decode {h}{shared} heads KV {keys} D {d}",
        flops=4 * h * keys * d,
        reads=2 * groups * keys * d * torch.float32.itemsize,
        **options,
    )


def with_weights(b: int, h: int, s: int, d: int, averaged: bool, **options: Any) -> Case:
    """nn.MultiheadAttention with need_weights."""
    kind, words = ("mean", "averaged") if averaged else ("each", "of each head")
    products = 4 * 2 * b * s * (h * d) ** 2
    return Case(
        f"attention_weights_{kind}_b{b}_h{h}_s{s}_d{d}",
        "attention weights",
        lambda nn: _WithWeights(nn, h * d, h, averaged),
        (b, s, h * d),
        label=f"MultiheadAttention {b}×{h}×{s}×{d}, weights {words}",
        flops=6 * b * h * s * s * d + products,
        **options,
    )


def attentions() -> Iterable[Case]:
    """The shapes of PERFORMANCE.md's table, and their masks."""
    short, long = Target(1.25, 1.45), Target(1.1, 1.25)
    yield attention(8, 12, 128, 64, target=short, quick=True)
    yield attention(8, 12, 128, 64, "lengths", target=Target(1.7, 2.1))
    for kind in ("", "bool", "additive"):
        yield attention(4, 12, 512, 64, kind, target=long)
    yield attention(4, 12, 512, 64, "lengths", target=Target(1.7, 2.1))
    yield attention(1, 16, 2048, 64, target=long)
    yield attention(4, 12, 512, 64, causal=True)
    # Between the 1.9 of 512 positions and the 1.35 of 2048.
    yield attention(1, 12, 1024, 64, causal=True, target=Target(1.6, 2.0), quick=True)
    yield attention(1, 16, 2048, 64, causal=True, target=Target(1.35, 1.55))
    for keys in (512, 2048, 8192):
        goal = Target(1.4, 1.65) if keys == 8192 else None
        yield decode(12, 12, keys, 64, target=goal, quick=keys == 2048)
    yield decode(32, 8, 2048, 64)
    yield with_weights(8, 12, 128, 64, averaged=True)
    yield with_weights(4, 12, 512, 64, averaged=True)
    yield with_weights(4, 12, 512, 64, averaged=False)
    yield attention(8, 12, 128, 64, backward=True, quick=True)
    yield attention(4, 12, 512, 64, causal=True, backward=True)
