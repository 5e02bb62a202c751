"""Capsule routing and squash in Triton's interpreter, forward and backward."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate
from torch import Tensor
from triton_cases import DTYPES, FORMATS, VIEWS, check, poisoned_memory

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from nnarch import library  # noqa: E402
from nnarch.kernels.capsule_routing import reference, triton_squash  # noqa: E402
from nnarch.kernels.capsule_routing import triton_kernel as kernel  # noqa: E402

# B, I, D_in, O, D_out: no power of two anywhere, more input capsules than a split has, one of each.
SHAPES = [(3, 21, 5, 5, 6), (17, 9, 4, 3, 7), (1, 1, 1, 1, 1), (2, 8, 3, 4, 16)]
EMPTY = [(0, 7, 3, 4, 5), (2, 0, 3, 4, 5), (2, 7, 0, 4, 5), (2, 7, 3, 4, 0)]


def _capsules(b: int, i: int, k: int, o: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(b, i, k),
        torch.randn(o, i, d, k) * max(1, k) ** -0.5,
        torch.randn(o, d) * 0.3,
    )


def _compare(x: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, detach: bool) -> None:
    """Forward and backward against the reference, in the tensors' dtype and in float64."""
    grad = torch.randn(x.shape[0], weight.shape[0], weight.shape[2]).to(x.dtype)

    def run(module, dtype: torch.dtype | None) -> list[Tensor]:
        t = [v if v is None or dtype is None else v.to(dtype) for v in (x, weight, bias, grad)]
        v, sums = module.capsule_routing(*t[:3], iterations, detach, None)
        return [v, sums, *module.capsule_routing_grad(t[3], *t[:2], sums, detach, None)]

    with poisoned_memory():
        mine = run(kernel, None)
    truth = run(reference, torch.float64)
    names = ("output", "sums", "dx", "dweight", "dbias")
    for what, a, b, c in zip(names, mine, run(reference, None), truth, strict=True):
        assert_as_accurate(a, b, c, what=what, ulps=64 if x.dtype == torch.float32 else 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_routing(shape, dtype):
    for iterations, detach in ((1, False), (2, False), (3, False), (3, True), (1, True)):
        x, weight, bias = (t.to(dtype) for t in _capsules(*shape))
        _compare(x, weight, bias if iterations == 3 else None, iterations, detach)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    x, weight, bias = (view(t) for t in _capsules(3, 9, 4, 3, 5))
    _compare(x, weight, bias, 2, False)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_to_route(shape):
    _compare(*_capsules(*shape), 2, False)


def test_input_capsules_in_several_splits(monkeypatch):
    calls = []
    monkeypatch.setattr(
        kernel, "launch", lambda k, grid, *a: (calls.append(grid), launch.launch(k, grid, *a))
    )
    _compare(*_capsules(2, 37, 3, 3, 4), 2, False)
    assert calls[0][0] == 5  # 37 input capsules, 8 a program


def test_int64_offsets(monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    monkeypatch.setattr(kernel, "needs_int64", lambda *_: True)
    monkeypatch.setattr(triton_squash, "needs_int64", lambda *_: True)
    _compare(*_capsules(3, 9, 4, 3, 5), 2, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_squash(memory_format, dtype):
    x = torch.randn(2, 9, 5, 7).to(dtype).contiguous(memory_format=FORMATS[memory_format])
    x[0, :, 1] = 0
    for dim in (0, 1, 2, -1):
        y = check(triton_squash.squash, reference.squash, [x], dim)
        assert y.stride() == library.new_output(x, y.shape).stride()
        dx = check(triton_squash.squash_grad, reference.squash_grad, [torch.randn_like(x), x], dim)
        assert dx.stride() == y.stride()


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_squash_of_any_strides(view):
    x, grad = view(torch.randn(3, 6, 5)), view(torch.randn(3, 6, 5))
    for dim in (1, 2):
        check(triton_squash.squash, reference.squash, [x], dim)
        check(triton_squash.squash_grad, reference.squash_grad, [grad, x], dim, ulps=8)


def test_what_is_refused():
    x, weight, _ = _capsules(2, 3, 4, 5, 6)
    with pytest.raises(NotImplementedError, match=r"capsule_routing for torch\.float64"):
        kernel.capsule_routing(x.double(), weight.double(), None, 2, False, None)
    with pytest.raises(NotImplementedError, match="200 output capsules of 64 values"):
        kernel.capsule_routing(x, torch.randn(200, 3, 64, 4), None, 2, False, None)
    with pytest.raises(NotImplementedError, match="squash for vectors of 9000"):
        triton_squash.squash(torch.randn(2, 9000), 1)
