"""Which backend runs an operation: see them, force one, or record what ran."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

from nnarch import library

BACKENDS = ("cpu", "triton", "numba", "reference")


def backends() -> dict[str, str]:
    """Every backend with "usable" or the reason why it is not."""
    return {
        "cpu": _cpu_status(),
        "triton": _gpu_status("triton", "TRITON_INTERPRET"),
        "numba": _gpu_status("numba_cuda", "NUMBA_ENABLE_CUDASIM", package="numba-cuda"),
        "reference": "usable",
    }


def isa() -> str:
    """The instruction set that the native kernels run on: generic, avx2, avx512 (or "")."""
    return library.native_string("nnarch_isa")


def _cpu_status() -> str:
    if library.native is None:
        return library.native_error
    if not isa():
        return f"NNARCH_ISA={os.environ.get('NNARCH_ISA')}: no instruction set of this CPU"
    return f"usable ({isa()})"


def _gpu_status(module: str, interpreter: str, package: str = "") -> str:
    if importlib.util.find_spec(module) is None:
        return f"not installed (pip install {package or module})"
    if os.environ.get(interpreter) == "1":
        return f"usable on CPU tensors, interpreted ({interpreter}=1)"
    if not torch.cuda.is_available():
        return f"no GPU ({interpreter}=1 interprets its kernels on the CPU)"
    return f"usable on {torch.cuda.get_device_name()}"


@dataclass(frozen=True)
class TraceEntry:
    """One operation that ran."""

    op: str
    backend: str
    algorithm: str
    shapes: tuple[tuple[int, ...], ...]
    seconds: float

    def __str__(self) -> str:
        shapes = " ".join("×".join(map(str, s)) or "scalar" for s in self.shapes)
        via = f"{self.backend}/{self.algorithm}" if self.algorithm else self.backend
        return f"{self.op:<28} {via:<28} {self.seconds * 1e6:>10.1f} µs  {shapes}"


@dataclass(eq=False)
class Trace:
    """What :func:`trace` recorded, in order."""

    entries: list[TraceEntry] = field(default_factory=list)

    def __iter__(self) -> Iterator[TraceEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __str__(self) -> str:
        return "\n".join(map(str, self.entries)) or "(no nnarch operation ran)"

    @property
    def ops(self) -> list[str]:
        """The names of the operations, in order."""
        return [entry.op for entry in self.entries]


class _Interceptor(TorchDispatchMode):
    """Sees every nnarch operation while a backend is forced or a trace is open.

    What was asked for lies in the mode itself: torch hands it on to the threads in which autograd
    runs a GPU's backward, which see nothing of this thread's own.
    """

    def __init__(self, forced: str | None = None, record: Trace | None = None) -> None:
        super().__init__()
        modes = [m for m in _get_current_dispatch_mode_stack() if isinstance(m, _Interceptor)]
        outer = modes[-1] if modes else None
        self.forced = forced or (outer.forced if outer else None)
        self.records = [*(outer.records if outer else ()), *([] if record is None else [record])]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != library.NAMESPACE or func._opname not in library.OPS:
            return func(*args, **(kwargs or {}))  # torch's, or the machinery below operations
        with _disable_current_modes():  # the innermost stands for all: run each op once
            return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = library.OPS[func._opname]
        args = positional(func, args, kwargs)
        library.ran.algorithm = ""
        started = time.perf_counter()
        with torch._C._AutoDispatchBelowAutograd():
            backend, result = self._on_its_backend(op, func, args)
        seconds = time.perf_counter() - started
        algorithm = library.ran.algorithm
        if backend == "cpu":
            algorithm = library.native_string("nnarch_last_algorithm")
        shapes = tuple(tuple(a.shape) for a in args if isinstance(a, torch.Tensor))
        for record in self.records:
            record.entries.append(TraceEntry(op.name, backend, algorithm, shapes, seconds))
        return result

    def _on_its_backend(self, op: library.Op, func: Any, args: tuple[Any, ...]) -> tuple[str, Any]:
        if self.forced:
            return self.forced, op.implementation(self.forced)(*args)
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        if device == "cuda" or (device == "cpu" and not op.has_native):
            return library.run_without_native(op, device == "cuda", args)
        return "cpu" if device == "cpu" else "fake", func(*args)


def positional(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments by position, defaults filled in, sizes expanded, as launchers expect them."""
    values = list(args)
    for argument in func._schema.arguments[len(args) :]:
        values.append(kwargs.get(argument.name, argument.default_value))
    for i, argument in enumerate(func._schema.arguments):
        if isinstance(values[i], int) and argument.type.kind() == "ListType":
            values[i] = [values[i]] * argument.N
    return tuple(values)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every nnarch operation in the block onto one backend.

    Args:
        name: "cpu", "triton", "numba" or "reference".

    Raises:
        ValueError: unknown name.
        NotImplementedError: from the operation that the backend lacks.
    """
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name must be one of {', '.join(BACKENDS)}, got {name!r}")
    with _Interceptor(forced=name):
        yield


@contextmanager
def trace() -> Iterator[Trace]:
    """Record every nnarch operation in the block: op, backend, algorithm, shapes, seconds."""
    record = Trace()
    with _Interceptor(record=record):
        yield record
