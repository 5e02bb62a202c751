"""Every test_triton_*.py, run in Triton's interpreter: no GPU is needed.

One process for each file, because TRITON_INTERPRET=1 must be set before Triton is imported and
would take compiling away from the other tests. To work on one file:
``TRITON_INTERPRET=1 python -m pytest tests/gpu/test_triton_conv2d.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from alone import run_pytest

pytest.importorskip("triton", reason="needs triton")

HERE = Path(__file__).parent
QUICK = ("test_triton_activation.py", "test_triton_linear.py")
FILES = [
    pytest.param(path.name, marks=() if path.name in QUICK else pytest.mark.slow)
    for path in sorted(HERE.glob("test_triton_*.py"))
]


@pytest.mark.parametrize("name", FILES)
def test_interpreted(name):
    output = run_pytest(str(HERE / name), environment={"TRITON_INTERPRET": "1"})
    assert re.search(r"\d+ passed", output) and "skipped" not in output, output
