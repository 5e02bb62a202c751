"""Losses and learning procedures that torch.nn does not have."""

from nnarch.objectives.capsule import CapsuleLoss, margin_loss, reconstruction_loss

__all__ = ["CapsuleLoss", "margin_loss", "reconstruction_loss"]
