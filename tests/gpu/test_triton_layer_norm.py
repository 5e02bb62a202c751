"""Layer and RMS normalization in Triton's interpreter: forward, first and second derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerances import assert_as_accurate
from triton_cases import DTYPES, VIEWS, poisoned_memory

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from nnarch.kernels.layer_norm import reference  # noqa: E402
from nnarch.kernels.layer_norm import triton_kernel as kernel  # noqa: E402

EPS = 1e-5


def _seed_tensor():
    return torch.tensor([2**41 + 5])


def _wide(value):
    return (
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
    )


def compare(name: str, *arguments, ulps: float = 16.0) -> list[torch.Tensor]:
    """Assert that all results of an operation are as accurate as the reference's; return them."""
    with poisoned_memory():
        mine = getattr(kernel, name)(*arguments)
    theirs = getattr(reference, name)(*arguments)
    truth = getattr(reference, name)(*map(_wide, arguments))
    results = [r if isinstance(r, tuple) else (r,) for r in (mine, theirs, truth)]
    for i, (a, b, c) in enumerate(zip(*results, strict=True)):
        assert_as_accurate(a, b, c, ulps=ulps, what=f"{name}[{i}]")
        assert a.is_contiguous()
    return list(results[0])


def inputs(shape, columns, dtype):
    x, other, grad = (torch.randn(shape).to(dtype) for _ in range(3))
    return x, other, grad, (torch.rand(columns) + 0.5).to(dtype), torch.randn(columns).to(dtype)


@pytest.fixture(params=[8192, 8], ids=["whole", "parts"])
def longest(request, monkeypatch):
    """Rows of more columns than this are read in parts."""
    monkeypatch.setattr(kernel, "_LONGEST", request.param)
    return request.param


SHAPES = [(5, 37), (3, 1), (1, 64), (2, 3, 30), (70, 12)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_derivatives(shape, rms, dtype, longest):
    columns = shape[-1]
    x, other, grad, weight, bias = inputs(shape, columns, dtype)
    bias = None if rms else bias
    compare("layer_norm", x, weight, bias, None, columns, EPS, rms)
    compare("layer_norm", x, None, None, other, columns, EPS, rms)
    for residual, seed, p in ((other, None, 0.0), (other, _seed_tensor(), 0.4), (None, None, 0.0)):
        _, total, stats = compare(
            "layer_norm_train", x, weight, bias, residual, seed, columns, EPS, p, rms
        )
    s = x if residual is None else total
    if columns == 1:  # derivatives are rounding errors
        return
    for added, scale, wanted in ((None, weight, 7), (other, None, 7), (other, weight, 1)):
        compare("layer_norm_backward", grad, added, s, scale, stats, columns, wanted)
    for vectors in ((weight, weight), (None, None)):
        compare(
            "layer_norm_backward_backward", other, *vectors, grad, s, weight, stats, columns,
            ulps=64.0,
        )  # fmt: skip


def test_only_parameters(longest):
    x, _, grad, weight, _ = inputs((6, 20), 20, torch.float32)
    _, _, stats = kernel.layer_norm_train(x, weight, None, None, None, 20, EPS, 0.0, False)
    for wanted in (2, 4, 6):
        compare("layer_norm_backward", grad, None, x, weight, stats, 20, wanted)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    x, other, grad, weight, bias = inputs((2, 6, 5, 8), 8, torch.float32)
    x, other, grad = view(x), view(other), view(grad)
    _, s, stats = compare("layer_norm_train", x, weight, bias, other, None, 8, EPS, 0.0, False)
    compare("layer_norm_backward", grad, other, view(s), weight, stats, 8, 7)
    compare("row_dropout", x, _seed_tensor(), 8, 0.5)


@pytest.mark.parametrize("columns", [1, 5, 64, 130])
def test_dropout(columns, longest):
    for dtype, p in itertools.product(DTYPES, (0.0, 0.25, 1.0)):
        compare("row_dropout", torch.randn(3, columns).to(dtype), _seed_tensor(), columns, p)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(shape):
    x, vector = torch.randn(shape), torch.rand(shape[1])
    _, _, stats = compare("layer_norm_train", x, vector, vector, x, None, shape[1], EPS, 0.0, False)
    compare("layer_norm_backward", x, x, x, vector, stats, shape[1], 7)
    compare("layer_norm_backward_backward", x, vector, vector, x, x, vector, stats, shape[1])
    compare("row_dropout", x, _seed_tensor(), shape[1], 0.5)


def test_int64_offsets(monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    monkeypatch.setattr(kernel, "needs_int64", lambda *_: True)
    x, other, grad, weight, bias = inputs((7, 24), 24, torch.float32)
    _, s, stats = compare(
        "layer_norm_train", x, weight, bias, other, _seed_tensor(), 24, EPS, 0.2, False
    )
    compare("layer_norm_backward", grad, other, s, weight, stats, 24, 7)
    compare("layer_norm_backward_backward", x, weight, bias, grad, s, weight, stats, 24, ulps=64.0)
    compare("row_dropout", x, _seed_tensor(), 24, 0.5)


def test_float64_is_refused():
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"layer_norm for torch\.float64"):
        kernel.layer_norm(x, None, None, None, 4, EPS, False)
