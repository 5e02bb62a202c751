"""Every test_numba_*.py that needs Numba's simulator, in a process of its own: no GPU is needed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    run = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, f"{name} simulated:\n{run.stdout}{run.stderr}"
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and "skipped" not in run.stdout, run.stdout
