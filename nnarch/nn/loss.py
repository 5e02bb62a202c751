"""Losses: the constructors of torch.nn, our kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import functional as F


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Cross-entropy of logits and targets; see torch.nn.CrossEntropyLoss.

    Targets are classes or probabilities; logits ``[C]``, ``[N, C]`` or ``[N, C, d1, …]``.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of the logits `input`."""
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy of the logits that a linear layer would make, without making them.

    It has no parameters but the classes' weights: the layer stays in the model, where its name and
    its tied weights belong, and is handed over with every call::

        head = nn.Linear(768, 50257, bias=False)
        loss = nn.LinearCrossEntropyLoss()
        loss(hidden, head.weight, target).backward()

    torch 2.13 has a class of this name that holds the layer itself; this one is another.

    Call it under `torch.no_grad` where no backward will follow: with gradients wanted, a reduced
    loss makes them at once.

    Args:
        class_weight: ``[V]``, a weight for every class; or None.
        ignore_index: a target that counts for nothing.
        reduction: "mean", "sum" or "none".
        label_smoothing: from 0 to 1, the share of the uniform distribution in the targets.
        z_loss: adds ``z_loss · logsumexp²`` to every sample's loss.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(
                'LinearCrossEntropyLoss: reduction must be "none", "mean" or "sum", '
                f"got {reduction!r}"
            )
        self.register_buffer("class_weight", class_weight)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss

    def forward(
        self, x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The loss of the logits ``x @ weight.T + bias``.

        Args:
            x: ``[..., D]``.
            weight: ``[V, D]``, of the layer.
            target: integers ``[...]``.
            bias: ``[V]``, of the layer; or None.
        """
        return F.linear_cross_entropy(
            x,
            weight,
            target,
            bias,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options, as torch.nn prints them."""
        options: dict[str, Any] = {
            "ignore_index": self.ignore_index,
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
        }
        return ", ".join(f"{name}={value!r}" for name, value in options.items())
