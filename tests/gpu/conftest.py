"""Which of these files a process can run, and on what.

Triton decides at import whether it interprets kernels. With TRITON_INTERPRET=1 the test_triton_*.py
files run on CPU tensors; on a machine with a GPU they run on it, marked `gpu`. A plain run without
a GPU collects test_interpreted.py, which starts the former in processes of their own.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

from nnarch.kernels.gpu import plans

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = not INTERPRETED and torch.cuda.is_available()
BROKEN_CONTEXT = ("CUDA error", "illegal memory access", "unspecified launch failure")

if INTERPRETED:
    collect_ignore_glob = ["test_interpreted.py", "test_on_a_gpu*.py", "test_static.py"]
elif not ON_GPU:
    collect_ignore_glob = ["test_triton_*.py"]


def _for_interpreter_or_gpu(item: pytest.Item) -> bool:
    return item.path.name.startswith("test_triton_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs on the GPU."""
    for item in items:
        if ON_GPU and _for_interpreter_or_gpu(item):
            item.add_marker(pytest.mark.gpu)


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
