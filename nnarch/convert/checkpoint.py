"""Reading checkpoints, safely, and putting them into models."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

# What training scripts put around the weights, and wrappers in front of every key.
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and DistributedDataParallel; torch.compile

_SHOWN = 5


def load_checkpoint(model: Module, path: str | os.PathLike[str], *, strict: bool = True) -> None:
    """Load the weights in a file into `model`, in place.

    Args:
        model: receives the weights; each is converted to the parameter's dtype and device.
        path: a safetensors file, or one written by ``torch.save``. Nothing in it is executed:
            torch files are read with ``weights_only=True``.
        strict: whether missing or unexpected names are errors. Wrong shapes always are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no weights, or other ones than `model` has; the message lists
            the differences, and `model` is left as it was.
    """
    load_weights(model, read_checkpoint(path), strict=strict, source=Path(path).name)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The named tensors in a checkpoint file, on the CPU, without wrapper prefixes.

    Args:
        path: a safetensors file, or one written by ``torch.save``: a state_dict, bare or under
            "state_dict", "model_state_dict" or "model".

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or holds something else than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_checkpoint: there is no file {os.fspath(path)!r}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(content, Mapping):
        for name in _CONTAINERS:
            if isinstance(content.get(name), Mapping):
                content = content[name]
                break
    if not (isinstance(content, Mapping) and content and _are_named_tensors(content)):
        raise ValueError(
            f"read_checkpoint: {path.name} must hold a state_dict (names to tensors), got "
            f"{_describe(content)}"
        )
    return strip_wrappers(content)


def strip_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` without the "module." or "_orig_mod." that a wrapper put before every name."""
    stripped = dict(weights)
    while prefix := next((p for p in _WRAPPERS if _all_start_with(stripped, p)), None):
        stripped = {name.removeprefix(prefix): value for name, value in stripped.items()}
    return stripped


def load_weights(
    model: Module,
    weights: Mapping[str, Tensor],
    *,
    strict: bool = True,
    source: str = "the checkpoint",
) -> None:
    """Copy named tensors into `model`, all or none.

    Args:
        model: receives the weights.
        weights: parameters and buffers by name. ``num_batches_tracked`` may be missing, as it is
            in files from before it existed.
        strict: whether missing or unexpected names are errors. Wrong shapes always are.
        source: what error messages call `weights`.

    Raises:
        ValueError: names or shapes differ; `model` is left as it was.
    """
    own = model.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    problems = [
        f"{name} is {_shape(value)}, the model has {_shape(own[name])}"
        for name, value in weights.items()
        if name in own and value.shape != own[name].shape
    ]
    if strict:
        problems += [f"{name} is missing" for name in own if name not in {*weights, *counters}]
        problems += [f"{name} is not in the model" for name in weights if name not in own]
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise ValueError(
            f"load_weights: {source} does not fit {type(model).__name__}:\n  {shown}{more}"
        )
    model.load_state_dict({**own, **{k: v for k, v in weights.items() if k in own}})


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"read_checkpoint: {path.name} is no safetensors file: {error}") from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # foreign bytes raise anything in an unpickler
        # torch's own message is pages long, and tells people to load unsafely.
        foreign = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        reason = "it is damaged, or was not written by torch.save"
        if foreign:
            reason = f"it holds a {foreign[1]}; save model.state_dict() alone"
        raise ValueError(
            f"read_checkpoint: {path.name} cannot be read as weights only: {reason}"
        ) from error


def _are_named_tensors(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def _all_start_with(weights: Mapping[str, Tensor], prefix: str) -> bool:
    return bool(weights) and all(name.startswith(prefix) for name in weights)


def _describe(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = ", ".join(map(repr, list(content)[:_SHOWN]))
    return f"a mapping with {names}" if content else "an empty mapping"


def _shape(value: Tensor) -> str:
    return "×".join(map(str, value.shape)) or "a scalar"
