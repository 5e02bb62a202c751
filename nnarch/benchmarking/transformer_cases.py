"""Transformer layers that are measured; a part of :mod:`nnarch.benchmarking.cases`.

torch.nn's encoder layer takes a path of its own in eval mode, which is not the fastest that torch
has. So there is a second rival: the same layer as people write it by hand, with one product for
query, key and value and scaled_dot_product_attention on views of it.

Nothing is dropped: outputs could not be compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from nnarch.benchmarking.case import Case, Target

TRANSFORMER_TARGETS: dict[str, Target] = {
    "transformer": Target(1.15, 1.3),
    "transformer fwd+bwd": Target(1.1, 1.25),
}


class HandWritten(nn.TransformerEncoderLayer):
    """torch.nn's encoder layer, post-norm, without its detours."""

    def forward(self, src: Tensor) -> Tensor:  # type: ignore[override]
        """[B, L, E] to the same."""
        attention = self.self_attn
        batch, length, _ = src.shape
        qkv = nn.functional.linear(src, attention.in_proj_weight, attention.in_proj_bias)  # type: ignore[arg-type]
        heads = attention.num_heads
        q, k, v = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = self.norm1(src + attention.out_proj(y.transpose(1, 2).reshape(src.shape)))
        return self.norm2(x + self.linear2(self.activation(self.linear1(x))))


def encoder_layer(
    batch: int, length: int, width: int, heads: int, *, by_hand: bool, **options: Any
) -> Case:
    """An encoder layer four times as wide inside."""
    backward = options.get("backward", False)

    def layer(namespace: Any) -> nn.Module:
        kind = namespace.TransformerEncoderLayer
        if by_hand and namespace is nn:
            kind = HandWritten
        return kind(width, heads, 4 * width, 0.0, batch_first=True)

    products = 2 * 12 * batch * length * width * width
    return Case(
        f"encoder_layer_{width}_b{batch}_s{length}" + "_by_hand" * by_hand + "_fb" * backward,
        "transformer" + " fwd+bwd" * backward,
        layer,
        (batch, length, width),
        label=f"encoder layer {width} B{batch} S{length}"
        + ", rival by hand" * by_hand
        + " fwd+bwd" * backward,
        flops=products + 4 * batch * length * length * width,
        # A hidden unit within rounding of its ReLU's kink is on or off: 5e-4, of torch's layer too.
        tolerance=1e-3 if backward else 1e-5,
        **options,
    )


def transformers() -> Iterable[Case]:
    """The base model's layer at the published shape, and around it."""
    for backward in (False, True):
        for by_hand in (False, True):
            yield encoder_layer(8, 128, 512, 8, by_hand=by_hand, backward=backward, quick=by_hand)
        yield encoder_layer(1, 32, 512, 8, by_hand=True, backward=backward)
        yield encoder_layer(2, 512, 768, 12, by_hand=True, backward=backward)
