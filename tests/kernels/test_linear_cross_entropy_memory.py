"""The memory that linear_cross_entropy takes: less than its logits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_PEAK = """
import resource, sys, torch
from nnarch import functional as F
n, d, v, fused = 2048, 32, 50257, sys.argv[1] == "fused"
torch.set_num_threads(1)
x, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
target = torch.randint(0, v, (n,))
def step(n):
    if fused:
        return F.linear_cross_entropy(x[:n], weight, target[:n], reduction=sys.argv[2])
    return torch.nn.functional.cross_entropy(x[:n] @ weight.t(), target[:n])
step(8).sum().backward()  # loads what is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(n).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def _peak(*arguments: str) -> int:
    """Bytes by which the memory of a process grew in a step; its logits would be 412 MB."""
    run = subprocess.run(
        [sys.executable, "-c", _PEAK, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kB on Linux")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_logits_in_memory(reduction):
    """2048 samples and 50257 classes, forward and backward, in a quarter of the logits' memory."""
    assert _peak("fused", reduction) < 100e6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kB on Linux")
def test_the_measurement_sees_logits():
    assert _peak("torch", "mean") > 400e6
