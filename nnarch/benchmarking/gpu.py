"""Cases on a GPU: warmed up by many processes, measured by one.

Triton compiles a kernel when it first runs, one after the other, for seconds. So many processes run
every case once, which fills Triton's cache on disk; then a process of its own measures. A case that
crashes or hangs ends its process, not the run (:mod:`nnarch.benchmarking.workers`).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from nnarch.benchmarking import cases, machine, peers, replays, results, runner, timing, workers
from nnarch.benchmarking.case import Case
from nnarch.benchmarking.correctness import Problem
from nnarch.benchmarking.gpu_cases import GPU_CASES
from nnarch.benchmarking.machine import Machine, Roof
from nnarch.benchmarking.results import UNAVAILABLE, Row

PROVIDERS = ("nnarch", "eager", "channels_last", "torch_csr")
# Blocks of many calls: the figure is the larger of launch and kernel. No rests: a GPU cools down.
PLAN = timing.Plan(blocks=5, block_seconds=0.010, pause_seconds=0, attempts=2)
_MIB = 2**20
_WARM_UP_SHARE = 0.5  # of the time there is
# The most that a case may take, the start of a process included; past the end of all.
_WARM_UP_SECONDS, _CASE_SECONDS, _GRACE_SECONDS = 180.0, 40.0, 8.0


@dataclass(frozen=True)
class Job:
    """A case by its name, which a worker can be sent.

    Args:
        case: its name.
        device: where to run it.
        providers: who runs it.
    """

    case: str
    device: str = "cuda"
    providers: tuple[str, ...] = PROVIDERS


def run(
    chosen: Sequence[Case],
    *,
    device: str = "cuda",
    providers: Sequence[str] = PROVIDERS,
    seconds: float | None = None,
    processes: int | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> Iterator[list[Row]]:
    """Warm up and measure, and yield the rows of every case as they come.

    Args:
        chosen: cases out of `GPU_CASES` or `nnarch.benchmarking.cases.CASES`.
        device: of torch.
        providers: names out of :data:`nnarch.benchmarking.peers.PROVIDERS`.
        seconds: after which no case is begun.
        processes: that warm up; by default all processors but two. 0: none.
        report: is told how far it is.
    """
    start = time.monotonic()
    deadline = None if seconds is None else start + seconds
    jobs = [Job(case.name, device, tuple(providers)) for case in chosen]
    broken: dict[str, str] = {}
    warmed = 0
    if processes is None:
        processes = max(1, (os.cpu_count() or 1) - 2)
    if processes and "nnarch" in providers:
        until = None if seconds is None else start + _WARM_UP_SHARE * seconds
        for outcome in workers.run_each(
            warm,
            _longest_first(jobs),
            processes=processes,
            timeout=_WARM_UP_SECONDS,
            deadline=until,
        ):
            if outcome.error and not outcome.cut:
                broken[outcome.job.case] = outcome.error
            warmed += not outcome.error
        report(
            f"warm-up: {time.monotonic() - start:.0f} s, {warmed} of {len(jobs)} cases; "
            f"{len(broken)} failed"
        )
    sound = [job for job in jobs if job.case not in broken]
    for name, error in broken.items():
        yield [_failed(name, error)]
    for outcome in workers.run_each(
        measure, sound, timeout=_CASE_SECONDS, deadline=deadline, grace=_GRACE_SECONDS
    ):
        if not outcome.cut:
            yield [_failed(outcome.job.case, outcome.error)] if outcome.error else outcome.result


def _longest_first(jobs: Sequence[Job]) -> list[Job]:
    """Networks have the most kernels: they begin first, and nobody waits for them at the end."""
    return sorted(jobs, key=lambda job: "resnet" not in job.case)


def find(name: str) -> Case:
    """The case of this name."""
    return next(case for case in (*GPU_CASES, *cases.CASES) if case.name == name)


def _failed(name: str, error: str) -> Row:
    case = find(name)
    return Row(
        case.name, case.group, case.title, "nnarch", ours=True, status=UNAVAILABLE, note=error,
        dtype=str(case.dtype).removeprefix("torch."), commit=results.commit(),
    )  # fmt: skip


# -------------------------------------------------------------------------- inside a worker


def warm(job: Job) -> None:
    """Run nnarch's side of a case once."""
    _set_up()
    case = dataclasses.replace(find(job.case), device=job.device)
    ours = peers.PROVIDERS["nnarch"]
    if ours.takes(case):
        with torch.set_grad_enabled(case.backward):
            ours.prepare(Problem(case), 1).call()
    _release(job.device)


def measure(job: Job) -> list[Row] | workers.Last:
    """Check and time a case."""
    _set_up()
    case = dataclasses.replace(find(job.case), device=job.device)
    on_gpu = job.device == "cuda"
    rows = runner.run_case(
        case,
        peers.select(job.providers),
        PLAN,
        calibrate(job.device, case.dtype),
        describe(job.device),
        measure=functools.partial(_measure, job.device),
        capture=replays.capture if on_gpu else None,
    )
    try:
        _release(job.device)
    except RuntimeError:  # an error of a kernel, which stays with the process
        return workers.Last(rows)
    # A capture that failed half way may leave the allocator in its state.
    failed = any(row.note.startswith(replays.NOT_CAPTURED) for row in rows)
    return workers.Last(rows) if failed else rows


def _set_up() -> None:
    """float32 stays float32: TF32 is off for all, so that the bound on errors is the same. cuDNN
    may search for its fastest algorithm. A fallback of ours to plain torch is an error."""
    from nnarch.library import FallbackWarning

    torch.set_num_threads(1)  # many processes share the CPU
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    warnings.simplefilter("error", FallbackWarning)


def _settle(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def _release(device: str) -> None:
    """Wait for the last kernel, and give memory back: many processes share the GPU.

    Raises:
        RuntimeError: a kernel failed, now or before.
    """
    _settle(device)()
    if device == "cuda":
        torch.cuda.empty_cache()


def _measure(
    device: str, calls: Mapping[str, timing.Call], plan: timing.Plan
) -> dict[str, timing.Timing]:
    return timing.measure(calls, plan, settle=_settle(device))


@functools.cache
def describe(device: str) -> Machine:
    """The machine, named after its GPU."""
    here = machine.describe()
    if device != "cuda":
        return here
    properties = torch.cuda.get_device_properties(0)
    isa = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip is not None:
        isa = properties.gcnArchName.partition(":")[0]
    return dataclasses.replace(here, cpu=properties.name, cores=1, isa=isa)


@functools.cache
def calibrate(
    device: str, dtype: torch.dtype = torch.float32, size: int = 8192, megabytes: int = 512
) -> Roof:
    """What torch's matrix product and a copy reach: a lower bound of the device's limits.

    Args:
        device: where to measure.
        dtype: of the matrices.
        size: their rows and columns.
        megabytes: of the buffer that is copied; past every cache.
    """
    size, megabytes = (size, megabytes) if device == "cuda" else (512, 16)
    a = torch.randn(size, size, device=device).to(dtype)  # constants would be faster
    source = torch.ones(megabytes * _MIB // 4, device=device)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(a, a), "copy": lambda: target.copy_(source)}
    timings = _measure(device, calls, dataclasses.replace(PLAN, attempts=1))
    moved = 2 * megabytes * _MIB
    return Roof(
        peak=2 * size**3 / timings["product"].best,
        bandwidth=((moved, moved / timings["copy"].best),),
        source="torch",
        threads=1,
    )
