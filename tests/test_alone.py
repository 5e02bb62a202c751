"""What tests of instruction sets and of memory rely on: a process of its own tells the truth."""

from __future__ import annotations

import os
import time

import pytest
import torch
from alone import alone, measures_memory, peak

MB = 1 << 20


def _facts() -> tuple[int, str | None, int]:
    return os.getpid(), os.environ.get("NNARCH_TEST"), torch.get_num_threads()


def _fail() -> None:
    raise ValueError("on purpose")


def _grow(size: int) -> int:
    before = peak()
    torch.ones(size, dtype=torch.uint8)
    return peak() - before


def test_result_environment_and_threads():
    process, value, threads = alone(_facts, environment={"NNARCH_TEST": "here"})
    assert process != os.getpid()
    assert (value, threads) == ("here", 1)
    assert "NNARCH_TEST" not in os.environ
    assert alone(_facts)[1] is None


def test_failures_reach_the_caller():
    with pytest.raises(AssertionError, match="ValueError: on purpose"):
        alone(_fail)
    with pytest.raises(AssertionError, match="died, exit code 7"):
        alone(os._exit, 7)
    with pytest.raises(AssertionError, match=r"more than 0\.5 seconds"):
        alone(time.sleep, 60, timeout=0.5)


@measures_memory
def test_a_peak_of_this_process_hides_no_growth():
    """A subprocess's peak begins with that of the process that starts it."""
    torch.ones(300 * MB, dtype=torch.uint8)
    assert 90 * MB < alone(_grow, 100 * MB) < 110 * MB
