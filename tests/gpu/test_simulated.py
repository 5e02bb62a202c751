"""Every test_numba_*.py that needs Numba's simulator, in a process of its own: no GPU is needed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from alone import run_pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda")

HERE = Path(__file__).parent
FILES = sorted(
    path.name
    for path in HERE.glob("test_numba_*.py")
    if "NUMBA_ENABLE_CUDASIM=1 before import" in path.read_text("utf-8")
)


@pytest.mark.parametrize("name", FILES)
def test_simulated(name):
    if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
        pytest.skip("is simulating already")
    output = run_pytest(str(HERE / name), environment={"NUMBA_ENABLE_CUDASIM": "1"})
    assert re.search(r"\d+ passed", output) and "skipped" not in output, output
