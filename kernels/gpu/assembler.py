"""NVIDIA's assembler as Triton calls it: on Hopper not one that is known to write wrong code.

Triton hands its kernels to ptxas. Those of CUDA 12.8 to 13.0 lose descriptors and registers of
Hopper's matrix products (kernels/gpu/MEASURED.md has the two kernels of ours that they broke), and
Triton before 3.9 brings and uses one of them there.
"""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from collections.abc import Iterable
from typing import Any

import torch

RIGHT = (13, 1)
"""The first release of CUDA whose ptxas is not known to be wrong."""

_PATH = "TRITON_PTXAS_PATH"


@functools.cache
def prepare() -> None:
    """Let Triton use the newest assembler of this machine, where a GPU needs it; once a process.

    A user's own choice (the variable TRITON_PTXAS_PATH) stays.
    """
    hopper = any(
        torch.cuda.get_device_capability(device)[0] == 9
        for device in range(torch.cuda.device_count())
    )
    if not hopper or torch.version.hip or _PATH in os.environ:
        return
    from triton.backends.nvidia import compiler

    used = compiler.get_ptxas(90)
    if _release(used) >= RIGHT:
        return
    tool = newest(used, _paths())
    if tool is not used:
        from triton import knobs

        knobs.nvidia.ptxas = tool.path
        compiler.get_ptxas_version.cache_clear()  # it is part of a compiled kernel's key
    if _release(tool) < RIGHT:
        warnings.warn(
            f"Triton assembles for this GPU with ptxas {tool.version}, which is known to write "
            "wrong code for matrix products on Hopper; set TRITON_PTXAS_PATH to the ptxas of "
            "CUDA 13.1 or newer, or use Triton 3.9",
            RuntimeWarning,
            stacklevel=2,
        )


def newest(used: Any, paths: Iterable[str]) -> Any:
    """The newest of the assembler in use and of those at some paths, as Triton describes them."""
    from triton import knobs

    found = (knobs.NvidiaTool.from_path(path) for path in paths)
    return max([used, *filter(None, found)], key=_release)


def _paths() -> list[str]:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    homes.append("/usr/local/cuda")
    return [*filter(None, [shutil.which("ptxas")])] + [f"{h}/bin/ptxas" for h in homes if h]


def _release(tool: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in tool.version.split("."))
