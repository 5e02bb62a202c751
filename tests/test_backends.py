"""backends(), use_backend() and trace(): which kernels may run, which must, and which did."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from op_samples import all_ops, run, samples

import nnarch
from nnarch import functional as F
from nnarch import library, nn

OPS = all_ops()
X, W = torch.randn(2, 6, 8, 8), torch.randn(4, 6, 3, 3)


def test_backends_names_all_with_a_reason():
    table = nnarch.backends()
    assert set(table) == {"cpu", "triton", "numba", "reference"}
    assert table["reference"] == "usable"
    assert re.fullmatch(r"usable \((generic|avx2|avx512)\)", table["cpu"])
    for name, package in (("triton", "triton"), ("numba", "numba-cuda")):
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            assert table[name] == f"not installed (pip install {package})"
        else:
            assert table[name].startswith(("usable", "no GPU"))


# ----------------------------------------------------------------------------------- use_backend


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_forced_backend_runs(name, backend):
    for args in samples(name):
        with nnarch.use_backend(backend), nnarch.trace() as t:
            run(name, *args)
        assert [(entry.op, entry.backend) for entry in t] == [(name, backend)]


@pytest.mark.parametrize("name", OPS)
def test_missing_backend_names_operation_and_backend(name):
    args = samples(name)[0]
    message = rf"backend 'numba' lacks nnarch::{name}\b"
    with nnarch.use_backend("numba"), pytest.raises(NotImplementedError, match=message):
        run(name, *args)


@pytest.mark.parametrize("name", OPS)
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_missing_dtype_names_operation_and_dtype(name):
    """Triton kernels have no float64; nothing falls back where a backend is forced."""
    if name.endswith("_pack"):
        pytest.skip("nothing to compute: GPU kernels read the weight as it is")
    if library.OPS[name].gpu_backend != "triton":
        pytest.skip("its GPU kernel is Numba's, which has float64")
    args = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in samples(name)[0]
    ]
    message = rf"backend 'triton' lacks nnarch::{name} for torch.float64"
    with nnarch.use_backend("triton"), pytest.raises(NotImplementedError, match=message):
        run(name, *args)


def test_public_functions_obey():
    for backend in ("cpu", "reference"):
        with nnarch.use_backend(backend), nnarch.trace() as t:
            F.conv2d(X, W, activation="relu")
        assert [entry.backend for entry in t] == [backend]


def test_backward_obeys():
    x = X.clone().requires_grad_()
    with nnarch.use_backend("reference"), nnarch.trace() as t:
        F.conv2d(x, W).sum().backward()
    assert [(e.op, e.backend) for e in t] == [
        ("conv2d", "reference"),
        ("conv2d_input_grad", "reference"),
    ]


def test_the_innermost_wins_and_errors_unwind():
    with nnarch.trace() as t:
        with nnarch.use_backend("reference"):
            with nnarch.use_backend("cpu"):
                F.conv2d(X, W)
            F.conv2d(X, W)
            with pytest.raises(KeyError), nnarch.use_backend("numba"):
                raise KeyError
            F.conv2d(X, W)
        F.conv2d(X, W)
    assert [e.backend for e in t] == ["cpu", "reference", "reference", "cpu"]


def test_threads_force_backends_of_their_own():
    seen: list[str] = []

    def other() -> None:
        with nnarch.trace() as t:
            F.conv2d(X, W)
        seen.extend(e.backend for e in t)

    with nnarch.use_backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert seen == ["cpu"]


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton")
def test_triton_interpreted():
    """Forced in a process that interprets: the same numbers, forward and backward."""
    program = textwrap.dedent("""
        import torch, nnarch
        from nnarch import functional as F

        assert nnarch.backends()["triton"].startswith("usable on CPU tensors, interpreted")

        def step(backend):
            torch.manual_seed(0)
            x = torch.randn(2, 3, 7, 7, requires_grad=True)
            w = torch.randn(4, 3, 3, 3, requires_grad=True)
            with nnarch.use_backend(backend), nnarch.trace() as t:
                y = F.conv2d(x, w, padding=1, activation="relu")
                gradients = torch.autograd.grad(y.square().sum(), (x, w))
            assert {entry.backend for entry in t} == {backend}, str(t)
            return y, *gradients

        torch.testing.assert_close(step("triton"), step("cpu"), rtol=1e-4, atol=1e-4)
        print("equal")
    """)
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "equal", done.stderr


# ----------------------------------------------------------------------------------------- trace


def test_trace_records_what_ran():
    x = torch.randn(2, 12, 8, 8)
    with nnarch.trace() as t:
        F.conv2d(x, torch.randn(4, 12, 3, 3), torch.randn(4))
        F.linear(torch.randn(3, 5), torch.randn(7, 5))
    conv, linear = t
    assert (conv.op, conv.backend, conv.algorithm) == ("conv2d", "cpu", "implicit_gemm")
    assert conv.shapes == ((2, 12, 8, 8), (4, 12, 3, 3), (4,))
    assert (linear.op, linear.algorithm) == ("linear", "gemv")
    assert all(0 < entry.seconds < 60 for entry in t)
    assert t.ops == ["conv2d", "linear"]
    assert "cpu/implicit_gemm" in str(t) and "2×12×8×8" in str(t)


def test_traces_nest():
    with nnarch.trace() as outer:
        F.linear(X[..., 0], torch.randn(3, 8))
        with nnarch.trace() as inner:
            F.conv2d(X, W)
        F.max_pool2d(X, 2)
    F.conv2d(X, W)  # after the end: recorded nowhere
    assert inner.ops == ["conv2d"]
    assert outer.ops == ["linear", "conv2d", "max_pool2d"]


def test_empty_trace_says_so():
    with nnarch.trace() as t:
        torch.relu(X)
    assert len(t) == 0
    assert str(t) == "(no nnarch operation ran)"


def test_trace_leaves_results_and_gradients_alone():
    layer = nn.Conv2d(6, 4, 3)
    plain = torch.autograd.grad(layer(X).square().sum(), list(layer.parameters()))
    with nnarch.trace():
        traced = torch.autograd.grad(layer(X).square().sum(), list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))


def test_trace_of_meta_tensors():
    with nnarch.trace() as t:
        F.conv2d(X.to("meta"), W.to("meta"))
    assert [e.backend for e in t] == ["fake"]


# ------------------------------------------------------------------------------------- fallbacks


@pytest.fixture
def operation(monkeypatch):
    """linear as a machine has it on which no native kernel serves it."""
    op = library.OPS["linear"]
    monkeypatch.setattr(library, "native_op_names", tuple)
    monkeypatch.setattr(library, "native_error", "the native library is not built")
    library._warn_fallback.cache_clear()
    yield op
    library._warn_fallback.cache_clear()


def test_without_native_kernels_the_reference_runs_and_warns_once(operation):
    args = samples("linear")[0]
    with nnarch.trace() as t:
        with pytest.warns(nnarch.FallbackWarning, match="nnarch::linear .*not built"):
            y = run("linear", *args)
        run("linear", *args)  # a second warning would be an error (pyproject.toml)
    assert [e.backend for e in t] == ["reference", "reference"]
    assert torch.equal(y, operation.reference(*args))


@pytest.mark.parametrize(
    ("launcher", "reason"),
    [("nnarch.no_such_module:linear", "no_such_module"), ("test_backends:refusing", "for float64")],
    ids=["not installed", "dtype"],
)
def test_a_gpu_kernel_that_cannot_run_falls_back_and_warns(
    operation, monkeypatch, launcher, reason
):
    monkeypatch.setattr(operation, "gpu", launcher)
    monkeypatch.setattr(operation, "_launcher", None)
    monkeypatch.setattr(operation, "_planned", None)
    args = samples("linear")[0]
    with pytest.warns(nnarch.FallbackWarning, match=reason):
        backend, y = library.run_without_native(operation, True, args)
    assert backend == "reference"
    torch.testing.assert_close(y, run("linear", *args))


def refusing(*args):
    """A launcher that lacks a dtype."""
    raise NotImplementedError("backend 'triton' lacks nnarch::linear for float64")


def test_forced_cpu_without_native_kernels_raises(operation):
    args = samples("linear")[0]
    message = "backend 'cpu' lacks nnarch::linear: the native library is not built"
    with nnarch.use_backend("cpu"), pytest.raises(NotImplementedError, match=message):
        run("linear", *args)


def test_machinery_below_operations_is_not_recorded():
    """The loss's backward scales a gradient in place by native code that is no operation."""
    x, target = torch.randn(5, 7, requires_grad=True), torch.randint(7, (5,))
    with nnarch.trace() as record:
        (2 * F.cross_entropy(x, target)).backward()
    assert "cross_entropy" in record.ops
    expected = torch.autograd.grad(2 * torch.nn.functional.cross_entropy(x, target), x)[0]
    torch.testing.assert_close(x.grad, expected)
