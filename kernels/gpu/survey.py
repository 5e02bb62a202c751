"""Every Triton kernel on every target, compiled without a GPU: resources, rules, predictions.

The prediction is a bound, not a timing: a launch takes the longer of its arithmetic, with padded
tiles and a last wave of programs that leaves processors idle, and of its memory traffic, each
tensor that it is given moved once. The roofline is the same two for the operation alone. Caches,
latencies and launch overhead are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import triton

from nnarch.kernels.gpu.launch import Launch
from nnarch.kernels.gpu.static import (
    Binary,
    StaticCase,
    Variant,
    compile_launch,
    precisions,
    variants,
)
from nnarch.kernels.gpu.targets import Target
from nnarch.kernels.gpu.tiles import Problem, Tile

LEAST_ROOFLINE = 0.6
"""What the default tile must be predicted to reach at the shape that it is meant for."""


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one target.

    Attributes:
        index: of the launch within its case.
        precision: "float16", or how float32 is multiplied ("ieee", "tf32x3", "tf32"), or
            "float32".
    """

    case: StaticCase
    target: Target
    precision: str
    variant: Variant
    index: int

    @property
    def launch(self) -> Launch:
        """The launch to compile."""
        return self.variant.launches[self.index]

    @property
    def main(self) -> bool:
        """Whether this launch does the work; the others prepare or finish it."""
        return self.index == self.case.main


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one target; one row of the table.

    Attributes:
        case, kernel, target, precision, tile: which.
        default: "yes" where the tile is what runs without a search.
        programs: of the launch.
        registers: 32-bit vector registers of a thread.
        spills: bytes of a thread's local memory, where spilled registers go.
        shared: bytes of shared memory of a program.
        matrix_instructions: in the code.
        roofline: predicted, 0 to 1, of the whole operation; empty but for its main kernel.
        broken: the rules that it breaks, in words; empty if none.
    """

    case: str
    kernel: str
    target: str
    precision: str
    tile: str
    default: str
    programs: int
    registers: int
    spills: int
    shared: int
    matrix_instructions: int
    roofline: float | None
    broken: str


# ---------------------------------------------------------------------------------- what to compile


def all_jobs(cases: Iterable[StaticCase], targets: Iterable[Target]) -> Iterator[Job]:
    """Every case on every target in every precision with its default tile.

    The other tiles that fit come with the first case that takes the same path through a kernel;
    further shapes would change its constants alone.
    """
    seen: set[tuple[str, str, str]] = set()
    for case, target in itertools.product(cases, list(targets)):
        for precision in precisions(case, target):
            for variant in variants(case, target, precision):
                path = (_code_path(variant.launches[case.main]), target.name, precision)
                if not variant.default and path in seen:
                    break
                for index in range(len(variant.launches)):
                    yield Job(case, target, precision, variant, index)
            seen.add(path)


def each_kernel(cases: Iterable[StaticCase], targets: Iterable[Target]) -> Iterator[Job]:
    """Every path through every kernel once: with the default tile of its first case, in float16
    where it runs in that."""
    seen: set[tuple[str, str]] = set()
    for job in all_jobs(cases, targets):
        key = (_code_path(job.launch), job.target.name)
        wanted = job.precision == (job.case.only or "float16")
        if wanted and job.variant.default and key not in seen:
            seen.add(key)
            yield job


def each_tile(cases: Iterable[StaticCase], targets: Iterable[Target]) -> Iterator[Job]:
    """Every tile in float16 (or all that its case has), the default also in float32, at the first
    case of its table."""
    first: dict[str, StaticCase] = {}
    for job in all_jobs(cases, targets):
        table = job.variant.table
        if job.main and table and first.setdefault(table, job.case) is job.case:  # noqa: SIM102
            if job.precision == (job.case.only or "float16") or job.variant.default:
                yield job


def _code_path(launch: Launch) -> str:
    """A kernel with the constexpr arguments that make two kernels of it."""
    names = ("FLAT", "SWAP", "CELL", "MASK")
    switches = [f"{k}={launch.arguments[k]}" for k in names if k in launch.arguments]
    return " ".join([_kernel_name(launch), *switches])


def _kernel_name(launch: Launch) -> str:
    return launch.kernel.__name__


# ----------------------------------------------------------------------------- compile and judge


def compile_job(job: Job) -> Compiled:
    """Compile one kernel and hold it against the rules."""
    binary = compile_launch(job.launch, job.target)
    launch = job.launch
    roofline = predicted_roofline(job) if job.main else None
    return Compiled(
        case=job.case.name,
        kernel=_kernel_name(launch),
        target=job.target.name,
        precision=job.precision,
        tile=str(job.variant.tile or ""),
        default="yes" if job.variant.default else "",
        programs=_programs(launch),
        registers=binary.registers,
        spills=binary.spills,
        shared=binary.shared,
        matrix_instructions=binary.matrix_instructions,
        roofline=roofline,
        broken="; ".join(broken_rules(job, binary, roofline)),
    )


def broken_rules(job: Job, binary: Binary, roofline: float | None) -> list[str]:
    """What a shipped tile must not do: spill, be miscompiled, pass the shared memory, miss the
    matrix units, and, where it is the default, fall short of the roofline.

    Products without loss ("ieee") have no matrix instruction on NVIDIA's targets.
    """
    broken = []
    if binary.spills:
        broken.append(f"spills {binary.spills} bytes")
    elif binary.stack_reads:
        broken.append("reads the stack pointer and has no stack")
    if binary.shared > job.target.shared_bytes:
        broken.append(f"{binary.shared} bytes of shared memory, {job.target.shared_bytes} exist")
    multiplies = job.case.matrix and job.main and _multiplied(job) != "ieee"
    if multiplies and not binary.matrix_instructions:
        broken.append(f"no {job.target.matrix}")
    if roofline is not None and job.variant.default and roofline < LEAST_ROOFLINE:
        broken.append(f"predicted {roofline:.0%} of the roofline")
    return broken


# --------------------------------------------------------------------------------- the prediction


def predicted_roofline(job: Job) -> float:
    """Time at the roofline over predicted time of the whole operation, 0 to 1."""
    target, case = job.target, job.case
    itemsize = 2 if job.precision == "float16" else 4
    peak = _peak(job)
    moved = case.elements * itemsize + case.fixed_bytes
    ideal = max(case.flops / peak, moved / (target.gigabytes_per_s * 1e9))
    seconds = 0.0
    for index, launch in enumerate(job.variant.launches):
        idle = max(1.0, target.processors / _programs(launch))
        memory = _traffic(launch) / (target.gigabytes_per_s * 1e9) * idle
        math = _math_seconds(job, peak) if index == case.main else 0.0
        seconds += max(memory, math)
    return min(1.0, ideal / seconds)


def _multiplied(job: Job) -> str:
    """The job's precision, or "ieee" where a kernel takes the products of float32 without loss."""
    problem = job.variant.problem
    return "ieee" if problem is not None and problem.precision == "ieee" else job.precision


def _peak(job: Job) -> float:
    """FLOP/s that the operation's arithmetic can reach at best."""
    rate = _multiplied(job) if job.case.matrix else "vector"
    return job.target.tflops[rate] * 1e12


def _math_seconds(job: Job, peak: float) -> float:
    """The main launch's arithmetic: tiles with their padding, whole waves of programs."""
    programs = _programs(job.variant.launches[job.case.main])
    waves = triton.cdiv(programs, job.target.processors)
    padding = _padding(job.variant.tile, job.variant.problem) if job.case.matrix else 1.0
    return job.case.flops * padding / programs * waves * job.target.processors / peak


def _padding(tile: Tile | None, problem: Problem | None) -> float:
    """Multiply-adds of the tiles over those of the problem."""
    if tile is None or problem is None:
        return 1.0
    factor = 1.0
    for extent, block in ((problem.m, "BLOCK_M"), (problem.n, "BLOCK_N"), (problem.k, "BLOCK_K")):
        size = dict(tile.block).get(block, 1)
        factor *= triton.cdiv(extent, size) * size / extent
    return factor


def _programs(launch: Launch) -> int:
    product = 1
    for extent in launch.grid:
        product *= extent
    return product


def _traffic(launch: Launch) -> float:
    """Bytes of the tensors that a launch is given, each once; a tensor given twice counts once."""
    tensors = {id(v): v for v in launch.arguments.values() if isinstance(v, torch.Tensor)}
    return float(sum(t.numel() * t.element_size() for t in tensors.values()))
