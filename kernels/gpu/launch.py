"""What every Triton launcher does around its kernels: dtype and device rules, grids, offsets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from nnarch.kernels.gpu import assembler, plans, targets
from nnarch.kernels.gpu.tiles import Tile

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on CPU tensors (TRITON_INTERPRET=1 at import)."""

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Launch options of every kernel. Triton 3.10 changes the default of FP fusion, so it is named."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

MAX_GRID_YZ = 65535
"""Most programs on the second and third axis of a CUDA grid."""


@dataclass(frozen=True)
class Launch:
    """A kernel launch that was recorded and not run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


_recorder: list[Launch] | None = None
_recorded_dots = ""


@contextlib.contextmanager
def record(target: targets.Target, float32_dots: str = "") -> Iterator[list[Launch]]:
    """Collect the launches of launchers called with meta tensors; none runs.

    Args:
        target: the GPU that launchers shall believe in.
        float32_dots: what :func:`dot_precision` shall answer; the target's most exact if empty.
    """
    global _recorder, _recorded_dots
    launches: list[Launch] = []
    _recorder, _recorded_dots = launches, float32_dots or target.dot_precisions[0]
    try:
        with targets.pretend(target), plans.paused():
            yield launches
    finally:
        _recorder = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
    tile: Tile | None = None,
    cooperative: bool = False,
) -> None:
    """Run a Triton kernel, the one way that every launcher does it.

    Args:
        kernel: the ``@triton.jit`` function.
        grid: programs on one to three axes; nothing is launched where one is 0.
        arguments: every argument of the kernel by name but those in `tile`. A None stands for an
            absent tensor and is known at compile time.
        tile: the block sizes and launch options.
        cooperative: all programs must run at the same time, for they wait for one another; the
            driver refuses a grid that does not fit.
    """
    if 0 in grid:
        return
    options = OPTIONS | {"launch_cooperative_grid": True} if cooperative else OPTIONS
    if tile is not None:
        arguments = arguments | dict(tile.block)
        options = options | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        if tile.registers and targets.current_target().backend == "cuda" and not INTERPRETED:
            options["maxnreg"] = min(tile.registers, 65536 // (32 * tile.num_warps))
    if INTERPRETED or _recorder is not None:
        unknown = arguments.keys() - set(kernel.arg_names)  # the interpreter takes anything
        if unknown:
            raise TypeError(f"{kernel.__name__} has no argument {', '.join(sorted(unknown))}")
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments, options))
        return
    if not INTERPRETED:
        assembler.prepare()
    plans.launch(kernel, grid, arguments, options)


def check_dtype(op: str, *tensors: torch.Tensor | None) -> None:
    """Refuse what the Triton kernels cannot compute correctly.

    Args:
        op: the operation's name without its namespace.
        tensors: its tensor arguments; None is skipped.

    Raises:
        NotImplementedError: a dtype outside float32, float16 and bfloat16; bfloat16 in the
            interpreter, which computes on its raw bits; a CPU tensor outside the interpreter.
    """
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise NotImplementedError(f"backend 'triton' lacks nnarch::{op} for {tensor.dtype}")
        if INTERPRETED and tensor.dtype == torch.bfloat16:
            raise NotImplementedError(
                f"backend 'triton' lacks nnarch::{op} for {tensor.dtype} in the interpreter"
            )
        if not INTERPRETED and tensor.device.type == "cpu":
            raise NotImplementedError(
                f"backend 'triton' lacks nnarch::{op} for CPU tensors "
                "(TRITON_INTERPRET=1, set before import, interprets it)"
            )


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the device of `tensor` current; Triton launches on the current device."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def needs_int64(*tensors: torch.Tensor | None) -> bool:
    """Whether an element offset into one of `tensors` can pass 2**31 - 1.

    The kernels take it as the constexpr ``INT64`` and widen their row indices with it. The slack
    of 2**24 elements covers the lanes of a tile that lie beyond the end and are masked.
    """
    return any(t is not None and _span(t) >= 2**31 - 2**24 for t in tensors)


def _span(tensor: torch.Tensor) -> int:
    """Largest element offset inside `tensor`."""
    return sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def flat_grid(programs: int) -> tuple[int, ...]:
    """A one-dimensional grid; CUDA allows 2**31 - 1 programs on its first axis."""
    if programs >= 2**31:
        raise ValueError(f"a launch of {programs} programs passes the limit of 2**31 - 1")
    return (programs,)


def vector(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A per-channel argument (bias, scale, shift) with stride 1; None stays None."""
    return None if tensor is None else tensor.contiguous()


def named_strides(name: str, dims: str, tensor: torch.Tensor | None) -> dict[str, int]:
    """{"stride_<name><dim>": elements} for each letter of `dims`; zeros for None."""
    values = (0,) * len(dims) if tensor is None else tensor.stride()
    return {f"stride_{name}{dim}": s for dim, s in zip(dims, values, strict=True)}


def dot_precision(kind: str) -> str:
    """The ``input_precision`` of float32 dots that the user's torch settings ask for.

    Args:
        kind: "conv" follows ``torch.backends.cudnn.conv``, "matmul" ``torch.backends.cuda.matmul``.

    Returns:
        "tf32" where torch itself would use it on a CUDA device. Otherwise the most exact of the
        target: "tf32x3" with TF32 matrix units (ADR 9), "ieee" without and in the interpreter.
    """
    if _recorder is not None:
        return _recorded_dots
    if INTERPRETED:
        return "ieee"
    known = targets.current_target().dot_precisions
    backend = torch.backends.cudnn.conv if kind == "conv" else torch.backends.cuda.matmul
    return "tf32" if backend.fp32_precision == "tf32" and "tf32" in known else known[0]
