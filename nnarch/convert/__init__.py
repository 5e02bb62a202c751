"""Checkpoints that people already have, loaded into nnarch's models."""

from nnarch.convert.checkpoint import load_checkpoint, load_weights, read_checkpoint

__all__ = ["load_checkpoint", "load_weights", "read_checkpoint"]
