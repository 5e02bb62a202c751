"""The same cases under pytest-benchmark, to see regressions between commits:

    pytest bench/test_kernels.py --benchmark-autosave           # before
    pytest bench/test_kernels.py --benchmark-compare            # after
    pytest bench/test_kernels.py -k "conv1x1 and n8"

Only nnarch is timed here; bench/compare.py has the peers and the protocol of record.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nnarch.benchmarking.cases import CASES
from nnarch.benchmarking.correctness import Problem
from nnarch.benchmarking.peers import Unavailable, select

pytest.importorskip("pytest_benchmark")

PAIRS = [
    pytest.param(case, provider, id=f"{case.name}-{provider.name}")
    for case in CASES
    for provider in select()
    if provider.ours and provider.takes(case)
]


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case, provider", PAIRS)
def test_kernel(case, provider, benchmark, one_thread):
    """Right against float64, then timed on one thread."""
    with torch.set_grad_enabled(case.backward):
        problem = Problem(case)
        try:
            contender = provider.prepare(problem, 1)
        except Unavailable as error:
            pytest.skip(str(error))
        contender.call()
        verdict = problem.judge(contender.outputs())
        assert verdict.right, verdict.reason
        benchmark.group = case.group
        benchmark.extra_info["gflop"] = case.total_flops / 1e9
        benchmark(contender.call)
