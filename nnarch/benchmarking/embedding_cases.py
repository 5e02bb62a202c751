"""Benchmark cases of the ends of a Transformer's layers: embeddings and gated products.

Tokens are made of the input's digits, the same for every rival: constants would be folded away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from nnarch.benchmarking.case import Case, Target

EMBEDDING_TARGETS: dict[str, Target] = {
    "gated linear": Target(1.1, 1.3),
    "gated linear fwd+bwd": Target(1.0, 1.2),
    "embedding": Target(1.0, 1.3),
    "embedding fwd+bwd": Target(1.0, 2.0),
    "embedding + LN": Target(1.3, 2.0),
    "embedding + LN fwd+bwd": Target(1.3, 2.0),
}


class _Gated(nn.Module):
    """SwiGLU as models write it."""

    def __init__(self, namespace: Any, inputs: int, outputs: int) -> None:
        super().__init__()
        self.gate_proj = namespace.Linear(inputs, outputs)
        self.up_proj = namespace.Linear(inputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)


def _fused_gated(module: Any) -> nn.Module:
    from nnarch.nn import GatedLinear

    outputs, inputs = module.gate_proj.weight.shape
    ours = GatedLinear(inputs, outputs)
    ours.load_state_dict(module.state_dict())
    return ours.train(module.training)


def gated_linears() -> Iterable[Case]:
    """SwiGLU of 768 to 2048 features."""
    for rows, backward in ((1, False), (128, False), (1024, False), (128, True)):
        yield Case(
            f"gated_silu_{rows}x768x2048" + "_fb" * backward,
            "gated linear" + " fwd+bwd" * backward,
            lambda nn: _Gated(nn, 768, 2048),
            (rows, 768),
            label=f"SwiGLU {rows}×768→2048" + " fwd+bwd" * backward,
            ours=_fused_gated,
            backward=backward,
            quick=rows == 128 and not backward,
        )


class _Tokens(nn.Module):
    """Numbers as tokens, and what follows from them."""

    def __init__(self, namespace: Any, layer: str, rows: int, length: int, columns: int) -> None:
        super().__init__()
        self.rows = rows
        self.token = namespace.Embedding(rows, columns)
        self.norm = self.position = self.segment = None
        if layer != "embedding":
            self.position = namespace.Embedding(length, columns)
        if layer == "bert":
            self.segment = namespace.Embedding(2, columns)
            self.norm = nn.LayerNorm(columns)  # torch's: the fused form has its own

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double().abs() * 1e6).long() % self.rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.tokens(x)
        y = self.token(tokens)
        if self.position is not None:
            y = y + self.position(torch.arange(x.shape[1], device=x.device))
        if self.segment is not None and self.norm is not None:
            y = self.norm(y + self.segment(tokens % 2))
        return y


def _fused_tokens(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    from nnarch import functional as F

    def run(x: torch.Tensor) -> torch.Tensor:
        tokens = module.tokens(x)
        if module.position is None:
            return F.embedding(tokens, module.token.weight)
        if module.norm is None:
            tables = (module.token.weight, module.position.weight)
            return F.embedding_layer_norm(tokens, *tables, normalize=False)
        return F.embedding_layer_norm(
            tokens,
            module.token.weight,
            module.position.weight,
            tokens % 2,
            module.segment.weight,
            norm_weight=module.norm.weight,
            norm_bias=module.norm.bias,
        )

    return run


def embeddings() -> Iterable[Case]:
    """A plain table; GPT-2's input layer; BERT's."""
    shapes = {
        "embedding": (30522, 32, 128),
        "gpt": (50257, 4, 1024),
        "bert": (30522, 32, 128),
    }
    for layer, (rows, batch, length) in shapes.items():
        for backward in (False, True):
            group = "embedding + LN" if layer == "bert" else "embedding"
            name = "embedding" if layer == "embedding" else f"embedding_{layer}"
            yield Case(
                f"{name}_{batch}x{length}_768" + "_fb" * backward,
                group + " fwd+bwd" * backward,
                lambda nn, layer=layer, rows=rows, length=length: _Tokens(
                    nn, layer, rows, length, 768
                ),
                (batch, length),
                label=f"{name.replace('_', ' ')} {batch}×{length}, 768" + " fwd+bwd" * backward,
                ours=_fused_tokens,
                backward=backward,
                input_grad=False,
                flops=(8 if layer == "bert" else 2) * batch * length * 768,
                quick=layer == "bert" and not backward,
            )
