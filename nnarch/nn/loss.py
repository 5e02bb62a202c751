"""Losses: the constructors of torch.nn, our kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nnarch import functional as F
from nnarch.nn.linear import Linear


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
    """Cross-entropy of the logits of a linear layer that it holds, without the logits in memory.

    The constructor and the state_dict are those of torch.nn's class of torch 2.13; `z_loss` is
    ours. A weight that is tied to an embedding is assigned: ``loss.linear.weight = table.weight``.

    Call it under `torch.no_grad` where no backward will follow: with gradients wanted, a reduced
    loss makes them at once.

    Args:
        in_features: D of the layer.
        num_classes: V of the layer.
        out_features: places of a sample that have a loss each; with them logits are in memory.
        bias: whether the layer has one.
        device, dtype: of the layer.
        reduction: "mean", "sum" or "none".
        weight: ``[V]``, a weight for every class; or None.
        ignore_index: a target that counts for nothing; None: -100.
        label_smoothing: from 0 to 1, the share of the uniform distribution in the targets.
        options: how torch's own class cuts its work; not used.
        z_loss: adds ``z_loss · logsumexp²`` to every sample's loss.

    Raises:
        ValueError: an option outside its range.
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        name = "LinearCrossEntropyLoss"
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(
                f'{name}: reduction must be "none", "mean" or "sum", got {reduction!r}'
            )
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"{name}: label_smoothing must be from 0 to 1, got {label_smoothing}")
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise ValueError(
                f"{name}: weight must have the shape ({num_classes},), got {tuple(weight.shape)}"
            )
        self.register_buffer("weight", weight)
        self.num_classes = num_classes
        self.out_features = out_features
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.z_loss = z_loss
        outputs = math.prod(out_features, start=num_classes)
        self.linear = Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of the logits that the layer would make of `input`.

        Args:
            input: ``[..., D]``.
            target: integers ``[...]``, or as :class:`CrossEntropyLoss` takes them.
        """
        weight, bias = self.linear.weight, self.linear.bias
        if self.out_features:
            places = (self.num_classes, *self.out_features)
            weight = weight.reshape(*places, self.linear.in_features)
            bias = None if bias is None else bias.reshape(places)
        return F.linear_cross_entropy(
            input,
            weight,
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )

    def extra_repr(self) -> str:
        """The options, as torch.nn prints them."""
        names = ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing")
        options = {name: getattr(self, name) for name in (*names, "z_loss")}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())
