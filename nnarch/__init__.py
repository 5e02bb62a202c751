"""nnarch: hand-written kernels for PyTorch under drop-in modules and classic architectures."""

__version__ = "0.1.0"

from nnarch import functional, nn
from nnarch.accelerate import accelerate, register_transformers_attention
from nnarch.backends import backends, trace, use_backend
from nnarch.library import FallbackWarning, empty_cache
from nnarch.models import create_model, list_models, model_info, summary
from nnarch.precision import get_precision, set_precision

__all__ = [
    "FallbackWarning",
    "accelerate",
    "backends",
    "create_model",
    "empty_cache",
    "functional",
    "get_precision",
    "list_models",
    "model_info",
    "nn",
    "register_transformers_attention",
    "set_precision",
    "summary",
    "trace",
    "use_backend",
]
