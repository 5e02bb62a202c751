"""The architectures, one file each, the registry that finds them by name, and decoding."""

from nnarch.models import (
    capsnet,
    forecaster,
    language_model,
    mobilenet_v2,
    resnet,
    seq2seq,
    sequence_classifier,
    transformer,
)
from nnarch.models.registry import ModelInfo, create_model, list_models, model_info, register_model
from nnarch.models.summary import summary

__all__ = [
    "ModelInfo",
    "capsnet",
    "create_model",
    "forecaster",
    "language_model",
    "list_models",
    "mobilenet_v2",
    "model_info",
    "register_model",
    "resnet",
    "seq2seq",
    "sequence_classifier",
    "summary",
    "transformer",
]
