"""A loss as the Triton kernels take it: targets, options, and what a mean divides by."""

from __future__ import annotations

import copy

import torch

from nnarch.kernels.cross_entropy.reference import MEAN, NONE
from nnarch.kernels.cross_entropy.triton_sums import divisors, sum_of
from nnarch.kernels.gpu.launch import named_strides, needs_int64


def as_ncl(x: torch.Tensor | None) -> torch.Tensor | None:
    """[N, C] as [N, C, 1]."""
    return x if x is None or x.dim() == 3 else x.unsqueeze(2)


class Loss:
    """What the kernels know of a loss.

    Args:
        target: classes [positions], or probabilities.
        class_weight: [C] float32 or None.
        classes: C.
        ignore_index, smoothing, z_loss, reduction: its options.

    Attributes:
        weights, count: what means divide by, one number each: the weights of the targets that are
            not ignored, and how many there are. None for other reductions.
    """

    def __init__(
        self,
        target: torch.Tensor,
        class_weight: torch.Tensor | None,
        classes: int,
        ignore_index: int,
        smoothing: float,
        z_loss: float,
        reduction: int,
    ) -> None:
        soft = target.is_floating_point()
        self.target = None if soft else target.contiguous()
        self.q = as_ncl(target) if soft else None
        self.class_weight = None if class_weight is None else class_weight.contiguous()
        self.classes, self.ignore_index, self.reduction = classes, ignore_index, reduction
        self.of_target = 1.0 - smoothing
        self.rest = smoothing / classes
        self.z_loss = z_loss or None
        self.factors = soft or smoothing != 0.0
        self.weights, self.count = self._divisors() if reduction == MEAN else (None, None)

    def _divisors(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.target is None:
            assert self.q is not None
            positions = self.q.numel() // self.classes
            count = self.q.new_full((), positions, dtype=torch.float32)
            return count, count
        if self.target.numel() == 0:
            count = self.target.new_zeros((), dtype=torch.float32)
            return count, count
        return divisors(self.target, self.class_weight, self.classes, self.ignore_index)

    def part(self, first: int, end: int) -> Loss:
        """The same for positions from `first` to `end`, whose targets are classes."""
        assert self.target is not None
        part = copy.copy(self)
        part.target = self.target[first:end]
        return part

    def totals(self) -> torch.Tensor | None:
        """Σ a of every position, or the one number that it is for all; None where a is not used."""
        if self.q is not None:
            q = self.q.float() * self.of_target + self.rest
            weight = self.class_weight
            return (q if weight is None else q * weight[:, None]).sum(1).reshape(-1)
        if not self.factors:
            return None
        if self.class_weight is not None:
            return self.class_weight.sum() * self.rest
        assert self.target is not None
        return self.target.new_full((), self.rest * self.classes, dtype=torch.float32)

    def reduced(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The loss, from those of all positions."""
        if self.reduction == NONE:
            return values.to(dtype)
        if values.numel() == 0:
            return values.new_full((), float("nan") if self.reduction == MEAN else 0.0, dtype=dtype)
        return sum_of(values, dtype)

    def arguments(self, x: torch.Tensor, *others: torch.Tensor | None) -> dict[str, object]:
        """Of both kernels, for logits x [N, width, L]."""
        return {
            **{"x_ptr": x, "target_ptr": self.target, "q_ptr": self.q},
            **{"weight_ptr": self.class_weight, "FACTORS": self.factors},
            **{"weights_ptr": self.weights, "count_ptr": self.count},
            **{"ignore_index": self.ignore_index, "positions": x.shape[0] * x.shape[2]},
            **{"classes": self.classes, "width": x.shape[1], "length": x.shape[2]},
            **{"of_target": self.of_target, "rest": self.rest, "z_loss": self.z_loss},
            **named_strides("x", "ncl", x),
            **named_strides("q", "ncl", self.q),
            "INT64": needs_int64(x, self.q, *others),
        }
