"""What this machine is, and what it can do at most: FMA peak and memory bandwidth, measured."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

KIB = 1024
MIB = 1024 * KIB

# Working sets that fit L1/L2, L3 and nothing but memory, on most machines. Close together where
# the last level ends: with 32 MB of it the rate falls from 68 to 23 GB/s between 16 and 48 MB, and
# a line from 16 to 64 would say 31 there.
BANDWIDTH_SIZES = (256 * KIB, *(size * MIB for size in (1, 4, 16, 32, 48, 64, 256)))

_CALIBRATION_ROUNDS = 3


@dataclass(frozen=True)
class Machine:
    """The machine and the software on it.

    Args:
        cpu: processor name as the system reports it.
        cores: logical processors this process may use.
        isa: instruction set that nnarch's kernels picked.
        caches: size in bytes by level, such as {"L1d": 32768}.
        memory: bytes of main memory, 0 where unknown.
        system: operating system and architecture.
        torch: version of PyTorch.
    """

    cpu: str
    cores: int
    isa: str
    caches: dict[str, int]
    memory: int
    system: str
    torch: str

    @property
    def slug(self) -> str:
        """A file name for this machine's results, such as "amd-epyc-7763-avx2"."""
        text = f"{self.cpu}-{self.isa}".lower()
        return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


@dataclass(frozen=True)
class Roof:
    """The upper limits that a kernel can be held against, for a number of threads.

    Args:
        peak: floating-point operations per second (an FMA counts as two).
        bandwidth: (working set in bytes, bytes read per second), by ascending working set.
        source: "native" for nnarch's own loops; "torch" for the lower bound that torch's sgemm and
            dot product reach, where the native library is missing.
        threads: threads it was measured with.
    """

    peak: float
    bandwidth: tuple[tuple[int, float], ...]
    source: str
    threads: int

    @property
    def dram(self) -> float:
        """Bytes per second from main memory."""
        return self.bandwidth[-1][1]

    def bandwidth_at(self, size: float) -> float:
        """Bytes per second for a working set of `size` bytes, interpolated in its logarithm."""
        sizes = [point[0] for point in self.bandwidth]
        i = bisect_left(sizes, size)
        if i == 0:
            return self.bandwidth[0][1]
        if i == len(sizes):
            return self.dram
        (low, slow), (high, fast) = self.bandwidth[i - 1], self.bandwidth[i]
        part = math.log(size / low) / math.log(high / low)
        return slow + part * (fast - slow)

    def seconds(self, flops: float, size: float) -> tuple[float, str]:
        """The least time for `flops` operations on `size` bytes, and the bound that sets it."""
        compute, memory = flops / self.peak, size / self.bandwidth_at(size)
        return (compute, "compute") if compute > memory else (memory, "memory")


def describe() -> Machine:
    """The machine this runs on. Asks files and the operating system only."""
    return Machine(
        cpu=_cpu_name(),
        cores=_cores(),
        isa=_isa(),
        caches=_caches(),
        memory=_memory(),
        system=f"{platform.system()} {platform.machine()}",
        torch=torch.__version__,
    )


def calibrate(threads: int = 1) -> Roof:
    """Measure the peak and the bandwidth of `threads` threads, in about two seconds.

    Args:
        threads: how many run the loops at once. Their best rates are added although nothing makes
            them coincide, so for more than one thread the result is an upper bound.
    """
    loops = _native_loops() or _torch_loops()
    with ThreadPoolExecutor(threads) as pool:

        def rate(function: Callable[[], float]) -> float:
            rounds = [
                sum(pool.map(lambda _: function(), range(loops.workers(threads))))
                for _ in range(_CALIBRATION_ROUNDS)
            ]
            return max(rounds)

        return Roof(
            peak=rate(loops.flops),
            bandwidth=tuple(
                (size, rate(functools.partial(loops.bytes_read, size // loops.workers(threads))))
                for size in BANDWIDTH_SIZES
            ),
            source=loops.source,
            threads=threads,
        )


# ---------------------------------------------------------------------------- calibration loops


@dataclass(frozen=True)
class _Loops:
    """Two loops that return the rate they reached, per second."""

    source: str
    flops: Callable[[], float]
    bytes_read: Callable[[int], float]
    threaded_inside: bool  # torch's operations use the threads themselves

    def workers(self, threads: int) -> int:
        return 1 if self.threaded_inside else threads


def _native_loops() -> _Loops | None:
    """nnarch's own loops: independent FMA chains in registers, and a streaming read."""
    from nnarch.library import native

    if native is None or not hasattr(native, "nnarch_peak_flops"):
        return None
    flops, read = native.nnarch_peak_flops, native.nnarch_read_bandwidth
    flops.restype = read.restype = ctypes.c_double
    flops.argtypes, read.argtypes = [], [ctypes.c_int64]
    return _Loops("native", flops, read, threaded_inside=False)


def _torch_loops() -> _Loops:
    """The best that torch's sgemm and dot product reach: a lower bound of the machine."""
    a = torch.ones(768, 768)
    buffer = torch.ones(BANDWIDTH_SIZES[-1] // a.element_size())

    def flops() -> float:
        return 2 * 768**3 / _fastest(lambda: torch.mm(a, a), 1)

    def read(size: int) -> float:
        half = size // 2 // buffer.element_size()
        left, right = buffer[:half], buffer[half : 2 * half]
        calls = max(1, 4 * MIB // size)
        return size / _fastest(lambda: torch.dot(left, right), calls)

    return _Loops("torch", flops, read, threaded_inside=True)


def _fastest(call: Callable[[], object], calls: int, blocks: int = 3) -> float:
    """Seconds per call, the minimum over a few blocks after one for warm-up."""
    best = math.inf
    for _ in range(blocks + 1):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


# -------------------------------------------------------------------------------- description


def _cpu_name() -> str:
    fields = _cpuinfo()
    name = fields.get("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*", "", name)
    if "cpu family" in fields and not re.search(r"\d", name):
        # A virtual machine often hides the model's number; the family still tells the design.
        name += f" family {fields['cpu family']} model {fields.get('model', '?')}"
    return " ".join(name.split())


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    lines = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in lines}


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _isa() -> str:
    from nnarch.library import native, native_string

    if native is not None and hasattr(native, "nnarch_isa"):
        return native_string("nnarch_isa")
    return torch.backends.cpu.get_cpu_capability().lower()


def _caches() -> dict[str, int]:
    """Cache sizes of the first core, where Linux tells them."""
    found = {}
    for folder in _sorted_glob("/sys/devices/system/cpu/cpu0/cache", "index*"):
        try:
            level, kind, size = (
                (folder / entry).read_text().strip() for entry in ("level", "type", "size")
            )
        except OSError:
            continue
        if kind != "Instruction":
            name = f"L{level}" + ("d" if kind == "Data" else "")
            found[name] = int(size.rstrip("KM")) * (MIB if size.endswith("M") else KIB)
    return found


def _sorted_glob(folder: str, pattern: str) -> Iterable[Path]:
    return sorted(Path(folder).glob(pattern))


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
