"""What Numba-CUDA kernels share: compiling without a GPU, and how large a cooperative grid may be.

Triton has its own helpers beside this file (static.py, targets.py). Here, too, three words are kept
apart: *interpreted* (ran in Numba's simulator), *compiled* (built for a named target), *measured*.

    ptx = compile_to_ptx(_kernel, (float32[::1], int64), (9, 0))   # a @cuda.jit kernel or function
    usage = assemble(ptx, (9, 0))                                  # registers, spills, shared bytes
    blocks = cooperative_grid_limit((9, 0), threads=256, registers=usage.registers)
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from nnarch import library

from . import plans
from .targets import TARGETS

CAPABILITIES = ((8, 0), (9, 0))
"""The compute capabilities that Numba kernels are compiled for in the tests."""


def simulating() -> bool:
    """Whether Numba's simulator runs kernels on the CPU (NUMBA_ENABLE_CUDASIM=1 before import)."""
    return os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


@contextlib.contextmanager
def _removed_from_numpy() -> Iterator[None]:
    """Give numpy.row_stack back while numba_cuda is imported.

    numba-cuda 0.30 registers an implementation under that name for every NumPy from 2.0 on; NumPy
    2.5 removed it. The function is only a key there, and no kernel calls it.
    """
    missing = not hasattr(np, "row_stack")
    if missing:
        np.row_stack = lambda *_, **__: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if missing:
            del np.row_stack  # type: ignore[attr-defined]


@functools.cache
def _import_numba() -> tuple[Any, str]:
    """The package or, where it cannot be imported, why; tried once, for a failure takes long."""
    try:
        with _removed_from_numpy():
            import numba
            from numba import cuda  # noqa: F401

            if not simulating():  # what it leaves to the first compilation
                import numba.cuda.np.arrayobj
        return numba, ""
    except Exception as error:  # of a package, not ours: whatever it raises, there is no Numba
        return None, f"Numba cannot be imported: {type(error).__name__}: {error}"


def load_numba() -> Any:
    """The package `numba` with `numba.cuda`, complete.

    Raises:
        ImportError: with the reason, whatever the import raised.
    """
    package, why = _import_numba()
    if package is None:
        raise ImportError(why)
    return package


def has_numba(instead: str) -> bool:
    """Whether Numba can be imported; where not, one FallbackWarning says what runs instead."""
    package, why = _import_numba()
    if package is None:
        _warn_once(f"{instead}: {why}")
    return package is not None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, library.FallbackWarning, stacklevel=3)


def check_device(op: str, *tensors: torch.Tensor | None) -> None:
    """Refuse CPU tensors outside the simulator, and CUDA tensors inside it.

    Raises:
        NotImplementedError: naming the backend, the operation and the way out.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type == "cpu" and not simulating():
            raise NotImplementedError(
                f"backend 'numba' lacks nnarch::{op} for CPU tensors "
                "(NUMBA_ENABLE_CUDASIM=1, set before import, simulates it)"
            )
        if tensor.device.type != "cpu" and simulating():
            raise NotImplementedError(
                f"backend 'numba' lacks nnarch::{op} for {tensor.device.type} tensors in the "
                "simulator (NUMBA_ENABLE_CUDASIM=1 was set)"
            )


def as_array(tensor: torch.Tensor) -> Any:
    """The same memory as a kernel argument: NumPy in the simulator, a device array on a GPU."""
    plans.refuse("a Numba kernel")
    tensor = tensor.detach()
    if simulating():
        return tensor.numpy()
    return load_numba().cuda.as_cuda_array(tensor)


def stream_of(tensor: torch.Tensor) -> Any:
    """Torch's current stream, for a launch in order with torch: `kernel[grid, block, stream]`."""
    if simulating():
        return 0
    return load_numba().cuda.external_stream(torch.cuda.current_stream(tensor.device).cuda_stream)


# ---------------------------------------------------------------------------- compiled, not run


@contextlib.contextmanager
def _pretended_device(capability: tuple[int, int]) -> Iterator[None]:
    """Device functions ask for the current device while they are compiled; answer for it."""
    from numba.cuda import dispatcher

    original = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        yield
    finally:
        dispatcher.get_current_device = original


def compile_to_ptx(kernel: Any, signature: Any, capability: tuple[int, int]) -> str:
    """Compile for a target that need not be here. A kernel's device functions are included.

    Args:
        kernel: a ``@cuda.jit`` kernel, or the plain Python function.
        signature: its Numba argument types, a tuple.
        capability: compute capability such as (9, 0).
    """
    cuda = load_numba().cuda
    with _pretended_device(capability):
        return cuda.compile_ptx(getattr(kernel, "py_func", kernel), signature, cc=capability)[0]


@dataclass(frozen=True)
class Usage:
    """What one thread (registers, spilled bytes) and one block (static shared bytes) take."""

    registers: int
    spilled: int
    shared: int


def assembler() -> str | None:
    """The path of ptxas, which ships inside the triton package; None without it."""
    try:
        import triton
    except ImportError:
        return None
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # The one for Blackwell is of a newer toolkit, which reads newer PTX; it knows old targets too.
    found = [folder / name for name in ("ptxas-blackwell", "ptxas") if (folder / name).exists()]
    return str(found[0]) if found else None


def _run_assembler(
    ptxas: str, ptx: str, arch: str, limit: list[str]
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, "utf-8")
        return subprocess.run(
            # -c: a grid barrier calls a function of CUDA's device runtime, linked in at load.
            [ptxas, "-c", f"-arch={arch}", "-v", *limit, str(source), "-o", f"{source}.cubin"],
            capture_output=True,
            text=True,
        )


def assemble(ptx: str, capability: tuple[int, int], max_registers: int | None = None) -> Usage:
    """Assemble PTX down to machine code and report what ptxas says about it.

    Args:
        ptx: from :func:`compile_to_ptx`.
        capability: such as (9, 0).
        max_registers: as given to ``@cuda.jit``; it does not show in the PTX.

    Raises:
        RuntimeError: ptxas is missing, or refuses the code.
    """
    ptxas = assembler()
    if ptxas is None:
        raise RuntimeError("assemble: needs ptxas, which the triton package brings")
    arch = f"sm_{capability[0]}{capability[1]}"
    limit = [f"-maxrregcount={max_registers}"] if max_registers else []
    done = _run_assembler(ptxas, ptx, arch, limit)
    newer = re.search(r"Unsupported \.version (\S+); current version is '(\S+)'", done.stderr)
    if newer:  # NVVM is of a newer toolkit than triton's ptxas: the instructions are the same
        older = ptx.replace(f".version {newer[1]}", f".version {newer[2]}", 1)
        done = _run_assembler(ptxas, older, arch, limit)
    report = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"assemble: ptxas for {arch}: {report[-2000:]}")

    def largest(pattern: str) -> int:
        return max((int(n) for n in re.findall(pattern, report)), default=0)

    return Usage(
        registers=largest(r"Used (\d+) registers"),
        spilled=largest(r"(\d+) bytes spill stores"),
        # Relocatable code has its shared memory laid out when it is linked; the PTX declares it.
        shared=sum(
            int(n) for n in re.findall(r"^\s*(?:\.visible )?\.shared .*\[(\d+)\];", ptx, re.M)
        ),
    )


# ------------------------------------------------------------------------------- cooperative grids


@dataclass(frozen=True)
class _Processor:
    """What one streaming multiprocessor holds at a time (CUDA programming guide, table of
    compute capabilities)."""

    threads: int
    blocks: int
    registers: int = 65536


_PROCESSORS = {8: _Processor(2048, 32), 9: _Processor(2048, 32), 10: _Processor(2048, 32)}
_SMALLER = _Processor(1536, 24)  # 8.6, 8.9 and 12.x
_REGISTER_UNIT, _SHARED_UNIT, _SHARED_RESERVED = 256, 128, 1024


def cooperative_grid_limit(
    capability: tuple[int, int],
    *,
    threads: int,
    registers: int,
    shared_bytes: int = 0,
    processors: int | None = None,
) -> int:
    """How many blocks a cooperative launch may have: those that fit on the GPU at the same time.

    A grid barrier waits for all blocks, so one that is not resident is waited for forever; CUDA
    refuses the launch instead. This is the bound for a GPU that is not here;
    :func:`resident_blocks` asks the one that is.

    Args:
        capability: such as (9, 0).
        threads: of one block.
        registers: of one thread, as :func:`assemble` reports them.
        shared_bytes: of one block, static and dynamic.
        processors: streaming multiprocessors; those of the product in targets.py by default.
    """
    major, minor = capability
    entry = TARGETS.get(f"sm_{major}{minor}") or TARGETS["sm_120"]
    processor = _PROCESSORS[major] if minor == 0 and major in _PROCESSORS else _SMALLER
    warps = -(-threads // 32)
    unit = _REGISTER_UNIT
    a_warp = -(-max(registers, 1) * 32 // unit) * unit
    resident = min(
        processor.blocks, processor.threads // (warps * 32), processor.registers // (a_warp * warps)
    )
    a_block = -(-shared_bytes // _SHARED_UNIT) * _SHARED_UNIT
    if shared_bytes:
        # `shared_bytes` of a target is what one block may have; a processor has 1 KiB more.
        whole = entry.shared_bytes + _SHARED_RESERVED
        resident = min(resident, whole // (a_block + _SHARED_RESERVED))
    return resident * (entry.processors if processors is None else processors)


def resident_blocks(kernel: Any, arguments: tuple[Any, ...], threads: int, shared: int = 0) -> int:
    """The same bound, asked of the GPU in use for a compiled kernel; no bound in the simulator.

    Args:
        kernel: a ``@cuda.jit`` kernel.
        arguments: those of the launch, from which its specialisation follows.
        threads: of one block.
        shared: bytes of dynamic shared memory of one block.
    """
    if simulating():
        return 1 << 30
    numba = load_numba()
    types = tuple(numba.typeof(numba.cuda.as_cuda_array(a) if hasattr(a, "data_ptr") else a)
                  for a in arguments)  # fmt: skip
    compiled = kernel.overloads.get(types) or kernel.compile(types)
    return compiled.max_cooperative_grid_blocks(threads, shared)
