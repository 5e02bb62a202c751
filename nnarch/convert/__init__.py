"""Checkpoints that people already have, loaded into nnarch's models."""

from nnarch.convert.checkpoint import load_checkpoint, load_weights, read_checkpoint
from nnarch.convert.keras import keras_recurrent_weights, load_keras_recurrent
from nnarch.convert.marian import load_marian, marian_config, marian_weights

__all__ = [
    "keras_recurrent_weights",
    "load_checkpoint",
    "load_keras_recurrent",
    "load_marian",
    "load_weights",
    "marian_config",
    "marian_weights",
    "read_checkpoint",
]
