"""The GPUs that the kernels are compiled for without owning one: limits, rates, instructions."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """One compile target and a representative product, from the vendor's public data sheet.

    Attributes:
        name: as people say it, such as "sm_90".
        product: whose rates follow.
        backend, arch, warp_size: the arguments of ``triton.backends.compiler.GPUTarget``.
        shared_bytes: shared memory (LDS) that one program may use.
        max_registers: 32-bit vector registers of one thread.
        processors: streaming multiprocessors or compute units.
        gigabytes_per_s: DRAM bandwidth.
        tflops: dense rate by dot precision; "vector" is float32 outside the matrix units.
        matrix: what a matrix instruction of this target is called in its assembly, a regex.
        operands: where its matrix instructions find their operands: "registers" or "shared".
        descriptors: whether the tensor memory accelerator loads tiles by a tensor's descriptor.
        dot_precisions: how ``tl.dot`` multiplies float32 operands, most exact first: "tf32x3" by
            three products of TF32 parts, "tf32" by one, "ieee" without loss.
    """

    name: str
    product: str
    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int
    max_registers: int
    processors: int
    gigabytes_per_s: float
    tflops: dict[str, float]
    matrix: str
    operands: str = "registers"
    descriptors: bool = False
    dot_precisions: tuple[str, ...] = ("tf32x3", "tf32")


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target(
            name="sm_80",
            product="A100 SXM 80 GB",
            backend="cuda",
            arch=80,
            warp_size=32,
            shared_bytes=163 * 1024,
            max_registers=255,
            processors=108,
            gigabytes_per_s=2039,
            tflops={"float16": 312, "tf32": 156, "tf32x3": 52, "ieee": 19.5, "vector": 19.5},
            matrix="HMMA",
        ),
        Target(
            name="sm_90",
            product="H100 SXM",
            backend="cuda",
            arch=90,
            warp_size=32,
            shared_bytes=227 * 1024,
            max_registers=255,
            processors=132,
            gigabytes_per_s=3350,
            tflops={"float16": 989, "tf32": 494, "tf32x3": 165, "ieee": 66.9, "vector": 66.9},
            matrix="HGMMA",
            descriptors=True,
            operands="shared",
        ),
        Target(
            name="sm_100",
            product="B200",
            backend="cuda",
            arch=100,
            warp_size=32,
            shared_bytes=227 * 1024,
            max_registers=255,
            processors=148,
            gigabytes_per_s=8000,
            tflops={"float16": 2250, "tf32": 1125, "tf32x3": 375, "ieee": 75, "vector": 75},
            matrix="UTC[A-Z]*MMA",
            descriptors=True,
            operands="shared",
        ),
        Target(
            name="sm_120",
            product="RTX 5090",
            backend="cuda",
            arch=120,
            warp_size=32,
            shared_bytes=99 * 1024,
            max_registers=255,
            processors=170,
            gigabytes_per_s=1792,
            tflops={"float16": 209.5, "tf32": 104.8, "tf32x3": 35, "ieee": 104.8, "vector": 104.8},
            matrix="HMMA",
            descriptors=True,
        ),
        Target(
            name="gfx942",
            product="MI300X",
            backend="hip",
            arch="gfx942",
            warp_size=64,
            shared_bytes=64 * 1024,
            max_registers=512,
            processors=304,
            gigabytes_per_s=5300,
            tflops={"float16": 1307, "ieee": 163.4, "vector": 163.4},
            matrix="v_mfma",
            dot_precisions=("ieee",),
        ),
    )
}


_recorded: list[Target] = []


@contextlib.contextmanager
def pretend(target: Target) -> Iterator[None]:
    """Let launchers choose as if `target` were the current GPU, to compile for it without one."""
    _recorded.append(target)
    try:
        yield
    finally:
        _recorded.pop()


def recording() -> bool:
    """Whether :func:`pretend` is in force."""
    return bool(_recorded)


def current_target() -> Target:
    """The entry that describes the GPU in use: its own, else the nearest with less shared memory.

    Without a GPU (in the interpreter) it is sm_80, the least capable CUDA target.
    """
    if _recorded:
        return _recorded[-1]
    return _device_target(torch.cuda.current_device() if torch.cuda.is_available() else -1)


@functools.cache
def _device_target(device: int) -> Target:
    if device < 0:
        return TARGETS["sm_80"]
    if torch.version.hip is not None:
        return TARGETS["gfx942"]
    major, minor = torch.cuda.get_device_capability(device)
    exact = TARGETS.get(f"sm_{major}{minor}")
    if exact is not None:
        return exact
    family = {9: "sm_90", 10: "sm_100"}  # the others (8.6, 8.9, 12.x) have 99 KiB a program
    return TARGETS[family.get(major, "sm_120")]
