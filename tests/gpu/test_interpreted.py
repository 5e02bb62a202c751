"""Every test_triton_*.py, run in Triton's interpreter: no GPU is needed.

One process for each file, because TRITON_INTERPRET=1 must be set before Triton is imported and
would take compiling away from the other tests. To work on one file:
``TRITON_INTERPRET=1 python -m pytest tests/gpu/test_triton_conv2d.py``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

HERE = Path(__file__).parent
QUICK = ("test_triton_activation.py", "test_triton_linear.py")
FILES = [
    pytest.param(path.name, marks=() if path.name in QUICK else pytest.mark.slow)
    for path in sorted(HERE.glob("test_triton_*.py"))
]


@pytest.mark.parametrize("name", FILES)
def test_interpreted(name):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    run = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, f"{name} interpreted:\n{run.stdout}{run.stderr}"
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and "skipped" not in run.stdout, run.stdout
