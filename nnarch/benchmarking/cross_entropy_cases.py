"""Benchmark cases of cross-entropy: of logits, and fused with the linear layer that makes them.

The rival of the fused loss is what a language model does without it: a linear layer, then torch's
cross-entropy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nnarch.benchmarking.case import Case, Target

CROSS_ENTROPY_TARGETS: dict[str, Target] = {
    "linear + cross-entropy": Target(1.1, 1.3),
    "linear + cross-entropy fwd+bwd": Target(1.1, 1.3),
    "cross-entropy": Target(1.0, 1.5),
    "cross-entropy fwd+bwd": Target(1.0, 1.5),
}


class _Head(nn.Module):
    """The last layer of a language model and its loss: hidden states in, the mean loss out."""

    def __init__(self, namespace: Any, samples: int, depth: int, classes: int) -> None:
        super().__init__()
        self.register_buffer("target", torch.randint(0, classes, (samples,)))
        self.loss = namespace.LinearCrossEntropyLoss(depth, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(x, self.target)


class _Loss(nn.Module):
    """Logits in, the mean loss out."""

    def __init__(self, namespace: Any, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("target", torch.randint(0, shape[1], (shape[0], *shape[2:])))
        self.loss = namespace.CrossEntropyLoss()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(x, self.target)


def cross_entropies() -> Iterable[Case]:
    """Heads of language models; classifiers, characters and segmentation."""
    for backward in (False, True):
        kind, suffix = (" fwd+bwd", "_fb") if backward else ("", "")
        for n, d, v in ((512, 768, 50257), (1024, 768, 50257), (700, 650, 10000), (2048, 256, 65)):
            yield Case(
                f"linear_cross_entropy_{n}x{d}x{v}{suffix}",
                "linear + cross-entropy" + kind,
                lambda nn, n=n, d=d, v=v: _Head(nn, n, d, v),
                (n, d),
                label=f"linear + cross-entropy {n}×{d}→{v}{kind}",
                backward=backward,
                target=None if v == 50257 else Target(1.0, 1.3),
                quick=n == 700,
            )
        for shape in ((4096, 1000), (4096, 50257), (4096, 10), (2048, 65), (2, 21, 256, 256)):
            yield Case(
                f"cross_entropy_{'x'.join(map(str, shape))}{suffix}",
                "cross-entropy" + kind,
                lambda nn, shape=shape: _Loss(nn, shape),
                shape,
                label=f"cross-entropy {'×'.join(map(str, shape))}{kind}",
                backward=backward,
                flops=5 * torch.Size(shape).numel(),
                quick=shape == (4096, 1000),
            )
