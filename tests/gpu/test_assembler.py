"""Which of NVIDIA's assemblers Triton is given, without a GPU."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
knobs = pytest.importorskip("triton.knobs", reason="needs a triton with knobs")
from triton.backends.nvidia import compiler  # noqa: E402

from nnarch.kernels.gpu import assembler  # noqa: E402


def tool(folder, release):
    """A program that answers --version as ptxas does."""
    path = folder / f"ptxas-{release}"
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.9'\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A Hopper GPU whose Triton brings ptxas 12.8; returns where further ones may be put."""
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    brought = knobs.NvidiaTool.from_path(tool(tmp_path, "12.8"))
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: brought)
    monkeypatch.setattr(assembler, "_paths", lambda: [str(p) for p in tmp_path.iterdir()])
    yield tmp_path
    knobs.nvidia.__dict__.pop("ptxas", None)
    os.environ.pop("TRITON_PTXAS_PATH", None)


def prepare():
    assembler.prepare.__wrapped__()


@pytest.mark.filterwarnings("error")
def test_the_newest_is_used(hopper):
    path = tool(hopper, "13.2")
    tool(hopper, "13.1")
    prepare()
    assert knobs.nvidia.ptxas.path == path


def test_none_is_right(hopper):
    path = tool(hopper, "13.0")
    with pytest.warns(RuntimeWarning, match=r"ptxas 13\.0, which is known to write wrong code"):
        prepare()
    assert knobs.nvidia.ptxas.path == path


@pytest.mark.filterwarnings("error")
def test_the_users_choice_stays(hopper, monkeypatch):
    tool(hopper, "13.2")
    mine = tool(hopper, "12.9")
    monkeypatch.setenv("TRITON_PTXAS_PATH", mine)
    prepare()
    assert knobs.nvidia.ptxas.path == mine


@pytest.mark.filterwarnings("error")
def test_other_gpus_keep_theirs(hopper, monkeypatch):
    tool(hopper, "13.2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    prepare()
    assert "TRITON_PTXAS_PATH" not in os.environ


@pytest.mark.filterwarnings("error")
def test_a_right_one_stays(hopper, monkeypatch):
    tool(hopper, "13.4")
    right = knobs.NvidiaTool.from_path(tool(hopper, "13.1"))
    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: right)
    prepare()
    assert "TRITON_PTXAS_PATH" not in os.environ
