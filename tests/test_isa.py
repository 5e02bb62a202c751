"""Every instruction set that this machine can run: all operations, forward and backward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from alone import run_pytest

ISAS = ("generic", "avx2", "avx512")
TESTS = Path(__file__).parent


def _python(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that is told to use `isa`: it is chosen once a process."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"NNARCH_ISA": isa},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
    )


def _status(isa: str) -> str:
    done = _python(isa, "-c", "import nnarch; print(nnarch.backends()['cpu'])")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("isa", ISAS)
def test_operations(isa):
    status = _status(isa)
    if status != f"usable ({isa})":
        assert isa != "generic" and "no instruction set of this CPU" in status
        pytest.skip(f"this CPU lacks {isa}")
    select = "agree or algorithm or views or packed_weight"
    tests = [
        "test_library.py",
        *(f"kernels/test_{f}.py" for f in ("conv2d", "linear", "depthwise", "reservoir")),
    ]
    files = (str(TESTS / t) for t in tests)
    run_pytest("-x", "-k", select, *files, environment={"NNARCH_ISA": isa})


def test_an_unknown_isa_is_refused_by_name():
    """At the first operation: importing and asking what is wrong still work."""
    assert _status("sse9") == "NNARCH_ISA=sse9: no instruction set of this CPU"
    done = _python(
        "sse9", "-c", "import nnarch, numpy as n; nnarch.functional.linear(*[n.eye(3)]*2)"
    )
    assert "NNARCH_ISA must be generic, avx2 or avx512, got sse9" in done.stderr
