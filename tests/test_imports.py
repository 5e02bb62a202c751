"""`import nnarch` needs torch and NumPy alone, asks no device, compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest


def _run(program: str, **environment: str) -> str:
    """The output of a program in a new Python."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BLOCK = """
    import sys
    for name in ("triton", "numba", "numba_cuda", "cupy", "torchvision", "timm", "skimage"):
        sys.modules[name] = None  # importing it raises ImportError
"""
WORK = """
    import torch, nnarch
    layer = nnarch.nn.Conv2d(3, 4, 3)
    layer(torch.randn(1, 3, 8, 8)).sum().backward()
    model = nnarch.create_model("resnet18", num_classes=3).eval()
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
        nnarch.accelerate(model)(torch.randn(1, 3, 32, 32))
"""


def test_without_optional_packages():
    program = BLOCK + WORK + "    print(nnarch.backends()['triton'])"
    assert _run(program) == "not installed (pip install triton)"


def test_import_is_light():
    """No GPU package, no compiler, no plotting: they come when they are used."""
    heavy = "triton numba cupy torchvision torch._inductor torch._dynamo matplotlib typer"
    program = f"""
        import sys, torch
        before = set(sys.modules)
        import nnarch
        print(*sorted({{n for n in set(sys.modules) - before if n in "{heavy}".split()}}))
    """
    assert _run(program) == ""


def test_import_asks_no_device_and_compiles_nothing():
    program = """
        import subprocess, sys, torch

        def forbidden(*args, **kwargs):
            raise AssertionError("asked for a device or started a compiler")

        torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = forbidden
        torch.cuda.get_device_properties = torch.compile = subprocess.Popen = forbidden
        import nnarch
        assert not torch.cuda.is_initialized()
        nnarch.create_model("resnet18")
        print("imported")
    """
    assert _run(program) == "imported"


@pytest.mark.parametrize(
    ("library", "reason"),
    [("/nowhere/_native.so", "is not built"), (__file__, "does not load")],
    ids=["missing", "broken"],
)
def test_without_native_library(library, reason):
    """The reference implementations serve everything, with one warning an operation."""
    program = f"""
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
    {textwrap.indent(textwrap.dedent(WORK), " " * 12)}
        import collections
        counts = collections.Counter(
            str(w.message) for w in caught if w.category is nnarch.FallbackWarning
        )
        assert counts and set(counts.values()) == {{1}}, counts
        assert all("{reason}" in message for message in counts), counts
        assert "{reason}" in nnarch.backends()["cpu"]
        assert nnarch.empty_cache() == 0
        print(sum("nnarch::conv2d " in message for message in counts))
    """
    assert _run(program, NNARCH_LIBRARY=library) == "1"


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "nnarch", "--help"], capture_output=True)
    assert done.returncode == 0
