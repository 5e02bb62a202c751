"""What nnarch found on this machine: which backends run here, which do not, and why."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata

import torch

from nnarch import library, nodes
from nnarch.backends import backends, isa
from nnarch.benchmarking import machine

_PACKAGES = ("triton", "numba-cuda", "cupy", "onnxruntime", "openvino", "scikit-image")


def healthy() -> bool:
    """Whether the native CPU kernels are built, load, and run on this CPU."""
    return library.native is not None and isa() != ""


def sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Every section of the report as (title, [(what, how it is)])."""
    yield "machine", _machine()
    yield "torch", _torch()
    yield "native library", _native()
    yield "backends", list(backends().items())
    yield "optional packages", [(name, _version(name)) for name in _PACKAGES]


def _machine() -> list[tuple[str, str]]:
    here = machine.describe()
    caches = ", ".join(f"{level} {_size(size)}" for level, size in here.caches.items())
    rows = [
        ("CPU", here.cpu),
        ("cores", f"{here.cores} usable by this process"),
        ("caches", caches or "unknown"),
        ("memory", _size(here.memory) if here.memory else "unknown"),
        ("system", here.system),
        ("Python", platform.python_version()),
    ]
    return rows


def _torch() -> list[tuple[str, str]]:
    rows = [
        ("version", torch.__version__),
        ("threads", f"{torch.get_num_threads()} (torch.set_num_threads changes it)"),
        ("its own CPU kernels", torch.backends.cpu.get_cpu_capability()),
    ]
    count = torch.cuda.device_count()
    if count == 0:
        built = torch.version.cuda or torch.version.hip
        why = "no device found" if built else "this torch is built without CUDA or ROCm"
        return [*rows, ("GPU", f"none: {why}")]
    return rows + [(f"GPU {i}", _gpu(i)) for i in range(count)]


def _gpu(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return f"{properties.name}, {_size(properties.total_memory)}, compute capability {capability}"


def _native() -> list[tuple[str, str]]:
    if library.native is None:
        return [("state", f"not loaded: {library.native_error}")]
    forced = os.environ.get("NNARCH_ISA")
    origin = f"NNARCH_ISA={forced}" if forced else "by cpuid; NNARCH_ISA=generic|avx2|avx512 forces"
    names = sorted(library.OPS)
    lacking = [name for name in names if not library.OPS[name].has_native]
    return [
        ("file", str(library.native._name)),
        ("instruction set", f"{isa() or 'none of this CPU'} ({origin})"),
        ("operations", f"{len(names) - len(lacking)} of {len(names)}"),
        ("training calls", "nodes in C++" if _has_nodes() else "torch.autograd.Function (slower)"),
        *([("GPU calls", _gpu_calls())] if torch.cuda.device_count() else []),
        *([("on the reference instead", ", ".join(lacking))] if lacking else []),
    ]


def _has_nodes() -> bool:
    return library.native is not None and nodes.available(library.native._name)


def _gpu_calls() -> str:
    try:
        from nnarch.kernels.gpu import replay
    except ImportError as error:
        return f"on the reference ({error})"
    return "launched by it" if replay.is_available() else "launched from Python (slower)"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _size(count: int) -> str:
    """A number of bytes in the largest unit that keeps it at 1 or more."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count} B"
