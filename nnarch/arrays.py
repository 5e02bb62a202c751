"""What public functions do with their arguments before the operation sees them: arrays of NumPy and
CuPy become tensors without a copy, and torch.autocast is obeyed."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnarch import library


def public(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of tensors also take NumPy, CuPy and other DLPack arrays, without copies.

    The result comes back as the kind of array that the first argument is. Anything that overrides
    ``__torch_function__`` (an fx Proxy, say) sees the call as PyTorch's own functions show theirs.
    """
    return _public(function, lower_precision=False)


def public_lower_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """As :func:`public`, for a function whose inputs `torch.autocast` rounds to its dtype."""
    return _public(function, lower_precision=True)


def _public(function: Callable[..., Any], lower_precision: bool) -> Callable[..., Any]:
    name = next(iter(inspect.signature(function).parameters))
    in_autocast = torch._C._is_any_autocast_enabled

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if args:
            x = args[0]
        else:
            if "input" in kwargs and name not in kwargs:  # torch's name for it
                kwargs[name] = kwargs.pop("input")
            x = kwargs.get(name)
        if type(x) is Tensor or isinstance(x, Tensor):  # its metaclass answers, slowly
            if lower_precision and in_autocast():
                args, kwargs = _autocast(x.device.type, args, kwargs)
            return function(*args, **kwargs)
        if hasattr(x, "__torch_function__"):
            return torch.overrides.handle_torch_function(wrapper, (x,), *args, **kwargs)
        return _on_arrays(function, name, x, args, kwargs)

    return wrapper


def _autocast(device: str, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments as torch.autocast gives them to torch's own function."""
    if not library.autocasts(device):
        return args, kwargs
    dtype = torch.get_autocast_dtype(device)

    def cast(value: Any) -> Any:
        eligible = (
            isinstance(value, torch.Tensor)
            and value.is_floating_point()
            and value.dtype != torch.float64
        )
        return value.to(dtype) if eligible else value

    # Packed weights stay: they are kept in the dtype that kernels compute in.
    named = {name: a if name.endswith("packed") else cast(a) for name, a in kwargs.items()}
    return tuple(map(cast, args)), named


def _on_arrays(function: Callable[..., Any], first: str, x: Any, args: tuple, kwargs: dict) -> Any:
    op = function.__name__
    if not args and first not in kwargs:
        raise TypeError(f"{op}: the argument {first} is missing")
    if not hasattr(x, "__dlpack__"):
        raise TypeError(
            f"{op}: {first} must be a tensor or an array with DLPack, got {type(x).__name__}"
        )
    try:
        arguments = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"{op}: {error}") from None
    back = _array_converter(op, x)
    with torch.no_grad():
        result = function(**{name: to_tensor(op, name, a) for name, a in arguments.items()})
    return tuple(map(back, result)) if isinstance(result, tuple) else back(result)


def to_tensor(op: str, name: str, value: Any) -> Any:
    """An array as a tensor, without a copy where that can be; anything else as it is.

    Raises:
        TypeError: an array that no tensor can be.
    """
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dlpack__"):
        return value
    try:
        return _from_numpy(value) if isinstance(value, np.ndarray) else torch.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{op}: {name} cannot become a tensor: {error}") from None


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    """A tensor on the array's memory, or on a copy where strides are negative: torch has none."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("its mask would be lost")
    backwards = any(stride < 0 for stride in array.strides)
    if array.flags.writeable and not backwards:
        return torch.from_numpy(array)
    with warnings.catch_warnings():  # kernels do not write to their inputs
        warnings.simplefilter("ignore")
        tensor = torch.from_numpy(array.copy() if backwards else array)
    setattr(tensor, _READ_ONLY, True)
    return tensor


_READ_ONLY = "_nnarch_read_only"


def is_read_only(tensor: torch.Tensor | None) -> bool:
    """Whether an update in place would not reach, or not be welcome to, the caller's array."""
    return getattr(tensor, _READ_ONLY, False)


def _array_converter(op: str, like: Any) -> Callable[[torch.Tensor], Any]:
    kind = type(like)
    package = kind.__module__.split(".", 1)[0]
    name = {"jaxlib": "jax.dlpack"}.get(package, package)
    convert = getattr(importlib.import_module(name), "from_dlpack", None)
    if convert is None:
        raise TypeError(
            f"{op}: {kind.__module__}.{kind.__qualname__} has DLPack, but {name} has no "
            "from_dlpack to give the result back: pass torch.from_dlpack(array)"
        )
    return convert
