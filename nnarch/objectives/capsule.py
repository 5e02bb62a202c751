"""The objective of capsule networks: a margin on the capsules' lengths, and the reconstruction.

Source: Sabour, Frosst and Hinton, 2017, Dynamic Routing Between Capsules, equation 4 and section
4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def margin_loss(
    lengths: Tensor,
    target: Tensor,
    *,
    present: float = 0.9,
    absent: float = 0.1,
    down_weight: float = 0.5,
    reduction: str = "mean",
) -> Tensor:
    """How far capsules' lengths are from the right side of their margins.

    ``T · max(0, present - length)² + down_weight · (1 - T) · max(0, length - absent)²``, summed
    over the classes; T is 1 for classes that are there.

    Args:
        lengths: ``[N, classes]``.
        target: ``[N]``, int64, one class a sample; or ``[N, classes]``, 1 for every class that is
            there (several digits in an image).
        present: lengths of what is there shall be above.
        absent: lengths of what is not there shall be below.
        down_weight: of absent classes, so that they do not shrink all capsules at first.
        reduction: over samples: "mean", "sum" or "none".

    Raises:
        ValueError: shapes that do not fit together, an unknown reduction.
        TypeError: classes that are not int64.
    """
    if lengths.dim() != 2:
        raise ValueError(f"margin_loss: lengths must be [N, classes], got {tuple(lengths.shape)}")
    if target.shape == lengths.shape:
        there = target.to(lengths.dtype)
    elif target.dim() == 1 and target.shape[0] == lengths.shape[0]:
        if target.dtype != torch.int64:
            raise TypeError(f"margin_loss: a target of classes must be int64, got {target.dtype}")
        there = torch.nn.functional.one_hot(target, lengths.shape[1]).to(lengths.dtype)
    else:
        raise ValueError(
            f"margin_loss: target must be [N] or [N, classes] for lengths {tuple(lengths.shape)}, "
            f"got {tuple(target.shape)}"
        )
    missing = (present - lengths).relu().square()
    surplus = (lengths - absent).relu().square()
    loss = (there * missing + down_weight * (1 - there) * surplus).sum(1)
    return _reduce("margin_loss", loss, reduction)


def reconstruction_loss(
    reconstruction: Tensor, images: Tensor, *, weight: float = 0.0005, reduction: str = "mean"
) -> Tensor:
    """`weight` times the sum of squared differences of each image.

    Args:
        reconstruction, images: ``[N, ...]`` of one shape.
        weight: the paper's 0.0005 keeps it from dominating the margins.
        reduction: over samples: "mean", "sum" or "none".

    Raises:
        ValueError: shapes that differ, an unknown reduction.
    """
    if reconstruction.shape != images.shape:
        raise ValueError(
            f"reconstruction_loss: reconstruction must have the shape of images, "
            f"{tuple(images.shape)}, got {tuple(reconstruction.shape)}"
        )
    if images.dim() < 2:
        raise ValueError(
            f"reconstruction_loss: images must be [N, ...], got {images.dim()} dimensions"
        )
    difference = reconstruction - images
    wide = torch.promote_types(difference.dtype, torch.float32)  # float16 ends at 65504
    loss = weight * difference.to(wide).square().flatten(1).sum(1)
    dtype = difference.dtype if difference.is_floating_point() else wide
    return _reduce("reconstruction_loss", loss, reduction).to(dtype)


def _reduce(name: str, loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return loss.mean() if reduction == "mean" else loss.sum()


class CapsuleLoss(torch.nn.Module):
    """Margin loss plus weighted reconstruction.

    Args:
        reconstruction_weight: of the squared differences.
        present, absent, down_weight: as :func:`margin_loss` has them.
    """

    def __init__(
        self,
        reconstruction_weight: float = 0.0005,
        *,
        present: float = 0.9,
        absent: float = 0.1,
        down_weight: float = 0.5,
    ) -> None:
        super().__init__()
        self.reconstruction_weight = reconstruction_weight
        self.present, self.absent, self.down_weight = present, absent, down_weight

    def forward(
        self, lengths: Tensor, target: Tensor, reconstruction: Tensor, images: Tensor
    ) -> Tensor:
        """The mean over the samples."""
        rebuilt = reconstruction_loss(reconstruction, images, weight=self.reconstruction_weight)
        margins = margin_loss(
            lengths,
            target,
            present=self.present,
            absent=self.absent,
            down_weight=self.down_weight,
        )
        return margins + rebuilt
