"""Which of these files a process can run, and on what.

Triton decides at import whether it interprets kernels. With TRITON_INTERPRET=1 the test_triton_*.py
files run on CPU tensors; on a machine with a GPU they run on it, marked `gpu`. A plain run without
a GPU collects test_interpreted.py, which starts the former in processes of their own.
"""

from __future__ import annotations

import itertools
import os
import sys

import pytest
import torch

from nnarch.kernels.gpu import plans

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = not INTERPRETED and torch.cuda.is_available()
EVERY_CASE = os.environ.get("NNARCH_EVERY_CASE") == "1"
IN_TURN = {"dtype", "memory_format"}
if ON_GPU:  # where every variant is compiled; interpreted, all of them run
    IN_TURN |= {"reverse", "band", "tile"}
BROKEN_CONTEXT = ("CUDA error", "illegal memory access", "unspecified launch failure")

if INTERPRETED:
    import interpreter

    interpreter.hasten()
    collect_ignore_glob = ["test_interpreted.py", "test_on_a_gpu*.py", "test_static.py"]
elif not ON_GPU:
    collect_ignore_glob = ["test_triton_*.py"]


def _for_interpreter_or_gpu(item: pytest.Item) -> bool:
    return item.path.name.startswith("test_triton_")


def _redundant(items: list[pytest.Item]) -> set[pytest.Item]:
    """What need not run of test_triton_*.py, whose time is that of compiling or interpreting.

    Where a test has three cases or more, each case keeps one of the dtypes, formats, …, in turn.
    """
    tests: dict[tuple[str, str], dict[str, list[pytest.Item]]] = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        per_tile = item.name.startswith("test_every_tile")
        if _for_interpreter_or_gpu(item) and not per_tile and params.keys() & IN_TURN:
            case = repr({name: value for name, value in params.items() if name not in IN_TURN})
            test = tests.setdefault((item.path.name, item.originalname), {})
            test.setdefault(case, []).append(item)
    found: set[pytest.Item] = set()
    for test in tests.values():
        if len(test) >= 3:
            found.update(item for case in test.values() for item in case)
            found -= _in_turn(list(test.values()))
    return found


def _in_turn(cases: list[list[pytest.Item]]) -> set[pytest.Item]:
    """One item of every case."""
    values: dict[str, list[str]] = {}
    for item in itertools.chain(*cases):
        for name in item.callspec.params.keys() & IN_TURN:
            seen, value = values.setdefault(name, []), repr(item.callspec.params[name])
            if value not in seen:
                seen.append(value)
    kept = set()
    for i, case in enumerate(cases):
        turn = {name: seen[(i + i // len(seen)) % len(seen)] for name, seen in values.items()}
        match = (x for x in case if all(repr(x.callspec.params[n]) == v for n, v in turn.items()))
        kept.add(next(match, case[0]))
    return kept


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what runs on the GPU; leave out what is redundant."""
    for item in items:
        if ON_GPU and _for_interpreter_or_gpu(item):
            item.add_marker(pytest.mark.gpu)
    if not EVERY_CASE and (left_out := _redundant(items)):
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def pytest_report_header() -> str | None:
    if (ON_GPU or INTERPRETED) and not EVERY_CASE:
        return "test_triton_*: cases in one dtype and format each; NNARCH_EVERY_CASE=1 runs all"
    return None


@pytest.fixture(autouse=True)
def _on_the_gpu(request: pytest.FixtureRequest):
    """Float32 is float32, in torch and in ours; new tensors of test_triton_*.py are on the GPU.

    Torch's default for convolutions is TF32, which our kernels follow: test_on_a_gpu_tf32.py.
    """
    if not ON_GPU:
        yield
        return
    backends = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    with torch.device("cuda" if _for_interpreter_or_gpu(request.node) else "cpu"):
        yield
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


@pytest.fixture(autouse=True)
def _no_plans() -> None:
    """A test that changes what a launcher decides must not meet the plan of another."""
    plans.forget()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """End a worker whose GPU context is broken: every later test would fail in it too."""
    in_worker = ON_GPU and "PYTEST_XDIST_WORKER" in os.environ
    if in_worker and report.failed and any(t in report.longreprtext for t in BROKEN_CONTEXT):
        print(f"{report.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)
        os._exit(1)
