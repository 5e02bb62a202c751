"""How an operation is declared: schema, backends, fake function and autograd, in one place.

`kernels/<family>/op.py` calls :func:`declare` once per operation. PyTorch's own dispatcher does the
rest: CPU tensors reach the native library, CUDA tensors a Triton or Numba launcher that is imported
at first use, meta tensors the fake function. No dispatcher of our own stands beside it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nnarch import calls, direct
from nnarch.nodes import Backward

NAMESPACE = "nnarch"

_definitions = torch.library.Library(NAMESPACE, "FRAGMENT")


class FallbackWarning(UserWarning):
    """An operation ran on its reference implementation, because no kernel serves its input."""


# --------------------------------------------------------------------------- the native library


def _load_native() -> tuple[ctypes.CDLL | None, str]:
    """Load the native library; return (handle, "") or (None, why not)."""
    override = os.environ.get("NNARCH_LIBRARY")
    candidates = [Path(override)] if override else _installed_libraries()
    for path in candidates:
        if path.exists():
            try:
                torch.ops.load_library(path)
                return ctypes.CDLL(os.fspath(path)), ""
            except OSError as error:
                return None, f"{path.name} does not load: {error}"
    if override:
        return None, f"the native library is not built: NNARCH_LIBRARY={override} is no file"
    return None, "the native library is not built (pip install . builds it)"


def _installed_libraries() -> list[Path]:
    """Where an installed or editable nnarch has its native library."""
    import nnarch

    return [Path(folder) / "_native.so" for folder in nnarch.__path__]


native, native_error = _load_native()


def native_string(symbol: str) -> str:
    """Call the native `const char* symbol()`; "" without the native library."""
    if native is None:
        return ""
    function = getattr(native, symbol)
    function.restype = ctypes.c_char_p
    return function().decode()


class _Ran(threading.local):
    algorithm = ""


ran = _Ran()
"""What a launcher in Python says about itself to :func:`nnarch.trace`; native code has its own."""


class pooled_memory:
    """A scope in which large outputs reuse the memory of earlier ones (kernels/cpu/pool.h)."""

    def __enter__(self) -> None:
        if native is not None:
            native.nnarch_pool_enter()

    def __exit__(self, *_: Any) -> None:
        if native is not None:
            native.nnarch_pool_leave()


def empty_cache() -> int:
    """Give idle memory of activations, packed weights and scratch back; return its bytes."""
    if native is None:
        return 0
    native.nnarch_pool_clear.restype = ctypes.c_int64
    return native.nnarch_pool_clear()


# --------------------------------------------------------------------------------- declaration


def _declined(*_: Any) -> Any:
    return direct.DECLINED


@dataclass
class Op:
    """A declared operation and its implementations by backend name."""

    name: str
    overload: Any
    reference: Callable[..., Any]
    check: Callable[..., None] | None
    gpu: str | None  # "module:function" of the Triton or Numba launcher
    gpu_backend: str
    direct: Callable[..., Any] = field(default=_declined, repr=False)  # see nnarch/direct.py
    direct_first: Callable[..., Any] = field(default=_declined, repr=False)  # the first output
    _launcher: Callable[..., Any] | None = field(default=None, repr=False)
    _planned: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def has_native(self) -> bool:
        """Whether the loaded native library registers this operation."""
        return native is not None and self.name in native_op_names()

    def launcher(self) -> Callable[..., Any]:
        """The GPU launcher, imported at first use; ImportError where its package is missing."""
        if self._launcher is None:
            if self.gpu is None:
                raise NotImplementedError(f"{NAMESPACE}::{self.name} has no GPU kernel")
            module, function = self.gpu.split(":")
            self._launcher = getattr(importlib.import_module(module), function)
        assert self._launcher is not None
        return self._launcher

    def implementation(self, backend: str) -> Callable[..., Any]:
        """The Python callable that runs this operation on a forced backend."""
        if backend == "reference":
            return self.checked(self.reference)
        if backend == "cpu":
            if not self.has_native:
                raise NotImplementedError(
                    f"backend 'cpu' lacks {NAMESPACE}::{self.name}: "
                    + (native_error or "no native kernel")
                )
            return self.overload
        if backend == self.gpu_backend and self.gpu is not None:
            if self._planned is None:
                from nnarch.kernels.gpu.plans import planned

                self._planned = planned(self.checked(self.launcher()), self.direct)
            return self._planned
        raise NotImplementedError(f"backend {backend!r} lacks {NAMESPACE}::{self.name}")

    def checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` behind this operation's argument checks."""
        if self.check is None:
            return function
        check = self.check

        @functools.wraps(function)
        def run(*args: Any) -> Any:
            check(*args)
            return function(*args)

        return run


OPS: dict[str, Op] = {}


@functools.cache
def native_op_names() -> tuple[str, ...]:
    """The operations that the native library registers, in the order of its table."""
    return tuple(native_string("nnarch_native_ops").split())


def define_native(schema: str) -> Any:
    """Define an operation that is native code and nothing else, and return it.

    Declared operations (:func:`declare`) are what users call; this is for the machinery below them.
    """
    _definitions.define(schema)
    return getattr(torch.ops.nnarch, schema.split("(", 1)[0]).default


def direct_native(overload: Any) -> Callable[..., Any]:
    """The direct function (nnarch/direct.py) of an operation that is native code and nothing else.

    Unlike declared operations it may write its arguments.
    """
    name = overload._schema.name.partition("::")[2]
    if name not in native_op_names():
        return _declined
    number = native_op_names().index(name)
    return direct.function(native, number, overload._schema, writes=True) or _declined


def declare(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    check: Callable[..., None] | None = None,
    gpu: str | None = None,
    gpu_backend: str = "triton",
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    nodes: Sequence[Backward] = (),
) -> Callable[..., Any]:
    """Declare ``nnarch::<schema>`` once and return the callable that runs it cheaply.

    Args:
        schema: in PyTorch's schema language, without the namespace.
        reference: pure torch definition with the same arguments; any dtype, any device.
        fake: shape, dtype and strides of the outputs; runs on meta tensors.
        check: raises ValueError or TypeError for bad arguments. It explains what the native code
            rejected, and guards the backends written in Python.
        gpu: "module:function" of the GPU launcher, imported at first use.
        gpu_backend: "triton" or "numba".
        backward, setup_context: as in :func:`torch.library.register_autograd`. Without them a
            backward through the operation raises. `setup_context` may return how many of the
            outputs, from the first, have gradients: autograd sees no others in eager mode, where
            the callable has None in their place, and `backward` gets no gradients for them. It
            spares 1 µs each.
        nodes: the backwards that are one native operation; a call takes the first that suits its
            arguments, and none where it has to go by `backward`.

    Returns:
        A callable with the operation's positional arguments.
    """
    name = schema.split("(", 1)[0]
    backward = backward or _no_backward(name)
    _definitions.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.nnarch, name).default
    op = OPS[name] = Op(name, overload, reference, check, gpu, gpu_backend)
    if op.has_native:
        _make_direct(op, nodes)

    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, op.checked(fake), lib=_definitions)
    torch.library.register_autograd(
        qualified,
        backward,
        setup_context=setup_context,
        lib=_definitions,
    )
    if not op.has_native:
        _definitions.impl(name, lambda *args: run_without_native(op, False, args)[1], "CPU")

    def run_on_a_gpu(args: tuple[Any, ...]) -> Any:
        return run_without_native(op, True, args)[1]

    _definitions.impl(name, lambda *args: run_on_a_gpu(args), "CUDA")
    return calls.cheap_call(op, run_on_a_gpu, backward, setup_context)


def _make_direct(op: Op, backwards: Sequence[Backward]) -> None:
    """Give an operation its direct functions (nnarch/direct.py), and these their nodes."""
    names, schema = native_op_names(), op.overload._schema
    number = names.index(op.name)
    op.direct = direct.function(native, number, schema) or _declined
    if op.direct is not _declined and len(schema.returns) > 1:
        op.direct_first = direct.function(native, number, schema, first=True) or _declined
    for function in (op.direct, op.direct_first):
        if backwards and function is not _declined:
            direct.give_nodes(native, function, schema, backwards, names)


def _no_backward(name: str) -> Callable[..., Any]:
    def backward(*_: Any) -> None:
        raise NotImplementedError(
            f"{NAMESPACE}::{name} is not differentiable (once_differentiable)"
        )

    return backward


def run_without_native(op: Op, gpu: bool, args: tuple[Any, ...]) -> tuple[str, Any]:
    """Run an operation where no native kernel is registered: by its GPU kernel, or the reference.

    Returns:
        The name of the backend that ran, and the result.
    """
    why = "no GPU kernel" if gpu else native_error or "no native kernel"
    if gpu and op.gpu is not None:
        try:
            return op.gpu_backend, op.implementation(op.gpu_backend)(*args)
        except (ImportError, NotImplementedError) as error:
            why = str(error)
    _warn_fallback(op.name, why)
    return "reference", op.implementation("reference")(*args)


@functools.cache
def _warn_fallback(name: str, why: str) -> None:
    warnings.warn(
        f"{NAMESPACE}::{name} runs on its reference implementation: {why}",
        FallbackWarning,
        stacklevel=_callers_level(),
    )


def _callers_level() -> int:
    """For the function that asks: the stack level of who called nnarch, by way of torch or not."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in ("nnarch", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def autocasts(device: str) -> bool:
    """Whether torch.autocast is on for this type of device; some, "meta" say, have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of the autocast region that we are in, or None."""
    if not torch._C._is_any_autocast_enabled() or not autocasts(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def first_output(call: Any) -> Callable[..., Any]:
    """What :func:`declare` returned, returning the first output alone, and sooner for it."""
    return calls.first_output(call, OPS[call.__name__].direct_first)


# ------------------------------------------------------------------------------- shared helpers


_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_tensor(op: str, name: str, tensor: Any) -> None:
    """Raise TypeError unless `tensor` is a dense tensor of a dtype that kernels compute with."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _FLOATS:
        kinds = "floating point"
        if tensor.is_floating_point():
            kinds = "float32, float64, float16 or bfloat16"
        raise TypeError(f"{op}: {name} must be {kinds}, got {tensor.dtype}")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{op}: {name} must be dense, got {layout}")


def check_same(op: str, name: str, tensor: torch.Tensor, like: torch.Tensor, of: str = "x") -> None:
    """Raise TypeError or ValueError unless `tensor` has the dtype and device of `like`."""
    if tensor.dtype != like.dtype:
        raise TypeError(f"{op}: {name} must be {like.dtype} as {of}, got {tensor.dtype}")
    check_device(op, name, tensor, like, of)


def check_device(
    op: str, name: str, tensor: torch.Tensor, like: torch.Tensor, of: str = "x"
) -> None:
    """Raise ValueError unless `tensor` is where `like` is."""
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} as {of}, got {tensor.device}")


def output_format(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.memory_format:
    """The memory format of a 4-D output that follows `x` (the native code has the same rule).

    An image of one channel or of one pixel is dense both ways: a convolution's `weight` decides.
    """
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    if not x.is_contiguous() or (weight is not None and _looks_channels_last(weight)):
        return torch.channels_last
    return torch.contiguous_format


def _looks_channels_last(t: torch.Tensor) -> bool:
    """Whether strides tell of channels_last, those of size 1 among them, as torch reads them."""
    least = 0
    for d in (1, 3, 2, 0):
        stride = t.stride(d)
        if stride < max(least, 1) or t.shape[d] == 0 or (d == 0 and least == t.stride(1)):
            return False
        least = stride * max(t.shape[d], 1)
    return True


def new_output(
    x: torch.Tensor, size: Sequence[int], weight: torch.Tensor | None = None
) -> torch.Tensor:
    """An uninitialised tensor of `size` in the dtype, device and memory format of `x`."""
    format = output_format(x, weight) if len(size) == 4 else torch.contiguous_format
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=format)
