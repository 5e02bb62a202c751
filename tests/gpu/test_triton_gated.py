"""Gated activations and the gated linear layer in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from triton_cases import ACTIVATIONS, ALPHA, DTYPES, VIEWS, check  # noqa: E402

import nnarch  # noqa: E402
from nnarch import functional as F  # noqa: E402
from nnarch.kernels.activation import reference as activations  # noqa: E402
from nnarch.kernels.activation import triton_gated as gates  # noqa: E402
from nnarch.kernels.gpu import tiles  # noqa: E402
from nnarch.kernels.linear import reference, triton_gated  # noqa: E402


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate(activation, dtype):
    tensors = [torch.randn(3, 7, 70).to(dtype) for _ in range(2)]
    check(gates.gate, activations.gate, tensors, activation, ALPHA)
    grad = torch.randn(3, 7, 70).to(dtype)
    wide = [t.double() for t in (grad, *tensors)]
    mine = gates.gate_grad(grad, *tensors, activation, ALPHA)
    theirs = activations.gate_grad(grad, *tensors, activation, ALPHA)
    truth = activations.gate_grad(*wide, activation, ALPHA)
    for a, b, c in zip(mine, theirs, truth, strict=True):
        assert_as_accurate(a, b, c)


@pytest.mark.parametrize("view", VIEWS)
def test_gate_views(view):
    gate, value, grad = (VIEWS[view](torch.randn(4, 6, 5)) for _ in range(3))
    torch.testing.assert_close(
        gates.gate(gate, value, 6, 0.0), activations.gate(gate, value, 6, 0.0)
    )
    torch.testing.assert_close(
        gates.gate_grad(grad, gate, value, 6, 0.0),
        activations.gate_grad(grad, gate, value, 6, 0.0),
    )


def inputs(m, c, k, dtype=torch.float32):
    weights = [(torch.randn(k, c) / max(1, c) ** 0.5).to(dtype) for _ in range(2)]
    return torch.randn(m, c).to(dtype), *weights


# One row, a few rows, both products in one kernel.
@pytest.mark.parametrize("size", [(1, 33, 5), (7, 64, 48), (33, 19, 67), (70, 130, 21)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_linear(size, dtype):
    biases = [torch.randn(size[2]).to(dtype) for _ in range(2)]
    x, gate, up = inputs(*size, dtype)
    for pair in ([None, None], biases, [biases[0], None]):
        tensors = [x, gate, up, *pair, None]
        check(triton_gated.gated_linear, reference.gated_linear, tensors, 6, 0.0)


@pytest.mark.parametrize("tile", triton_gated.GATED.tiles["half"], ids=str)
def test_every_tile(tile):
    with tiles.force(gated_linear=tile):
        tensors = [*inputs(130, 70, 75), None, None, None]
        check(triton_gated.gated_linear, reference.gated_linear, tensors, 7, 0.0)


@pytest.mark.parametrize("view", VIEWS)
def test_gated_linear_views(view):
    x, gate, up = (VIEWS[view](t) for t in inputs(40, 24, 18))
    tensors = [x, gate, up, None, None, None]
    # One number alone is summed in "scalar", so each of 24 additions rounds alike in all outputs.
    ulps = 24 if view == "scalar" else None
    check(triton_gated.gated_linear, reference.gated_linear, tensors, 6, 0.0, ulps=ulps)


def test_gradients():
    leaves = [t.requires_grad_() for t in inputs(40, 9, 7)]
    with nnarch.use_backend("triton"):
        mine = torch.autograd.grad(F.gated_linear(*leaves).square().sum(), leaves)
    x, gate, up = leaves
    y = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(mine, torch.autograd.grad(y.square().sum(), leaves))
