"""Winograd with 2×2 taps, in the phases of transposed convolutions: its results and its errors.

The README of kernels/conv_transpose2d states the errors; here they are bounds.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import ACTIVATIONS, FORMATS, check_under_isa, name_of, on_fresh_memory
from torch.nn import functional as TF
from transposed_cases import WINOGRAD, Transposed

import nnarch
from nnarch import functional as F

# Of the largest output; as the 3×3 kernels' (test_winograd.py), 3 × the largest measured.
BOUNDS = {3: 2e-6, 4: 5e-6}


def error(y, case, tensors):
    """The largest difference from float64 over the largest output."""
    truth = case.theirs(**{name: t.double() for name, t in tensors.items()})
    return float((y - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("tile", BOUNDS)
@pytest.mark.parametrize("case", WINOGRAD, ids=str)
def test_every_tile(case, tile, memory_format):
    t = case.tensors(torch.float32, memory_format)
    packed = case.packed(t["weight"], tile)
    with nnarch.trace() as trace:
        case.ours(**t, packed=packed)
    assert [entry.algorithm[:12] for entry in trace] == [f"winograd_{tile}x{tile}"]
    y = on_fresh_memory(lambda: case.ours(**t, packed=packed))
    assert error(y, case, t) < BOUNDS[tile]
    scaled = {"scale": torch.rand(case.k) + 0.5, "shift": torch.randn(case.k)}
    residual = torch.randn_like(y)
    for activation in (None, "relu", "silu"):
        full = case.ours(**t, **scaled, residual=residual, packed=packed, activation=activation)
        wide = {n: v.double() for n, v in (t | scaled).items()}
        truth = case.theirs(**wide, residual=residual.double(), activation=activation)
        torch.testing.assert_close(full.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [16, 64, 256, 1024])
@pytest.mark.parametrize("tile", BOUNDS)
def test_error_as_stated(tile, channels):
    case = Transposed(2, channels, 13, 11, 32, (4, 4), 2, 1)
    t = case.tensors(torch.float32, torch.channels_last)
    y = case.ours(**t, packed=case.packed(t["weight"], tile))
    assert error(y, case, t) < BOUNDS[tile]


def chosen(case: Transposed) -> str | None:
    with nnarch.trace() as trace:
        case.ours(**case.tensors(torch.float32, torch.channels_last))
    (entry,) = trace
    return entry.algorithm


def test_the_precision_forbids_it():
    case = Transposed(4, 256, 16, 16, 128, (4, 4), 2, 1)
    assert chosen(case) == "winograd_4x4_phases"
    nnarch.set_precision("highest")
    try:
        assert chosen(case) == "implicit_gemm_phases"
        assert case.layout(torch.empty(256, 128, 4, 4)) == 0
    finally:
        nnarch.set_precision("high")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    case = Transposed(4, 128, 16, 16, 64, (4, 4), 2, 1)
    t = case.tensors(dtype, torch.channels_last)
    truth = case.theirs(**{name: v.double() for name, v in t.items()})
    y = case.ours(**t)
    ulp = torch.finfo(dtype).eps
    assert float((y.double() - truth).abs().max() / truth.abs().max()) < ulp


def test_float64_stays_a_sum_of_products():
    case = Transposed(4, 64, 16, 16, 64, (4, 4), 2, 1)
    t = case.tensors(torch.float64, torch.contiguous_format)
    torch.testing.assert_close(case.ours(**t), case.theirs(**t), rtol=1e-12, atol=1e-12)


def test_gradients_of_a_training_step():
    """Forward and both gradients, each by whatever algorithm is chosen."""
    case = Transposed(4, 96, 16, 16, 64, (4, 4), 2, 1)
    t = case.tensors(torch.float32, torch.channels_last)
    grad = torch.randn(4, 64, 32, 32)
    leaves = {name: v.requires_grad_() for name, v in t.items()}
    mine = torch.autograd.grad(case.ours(**leaves), list(leaves.values()), grad)
    wide = {name: v.detach().double().requires_grad_() for name, v in t.items()}
    truth = torch.autograd.grad(case.theirs(**wide), list(wide.values()), grad.double())
    for a, b in zip(mine, truth, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 8e-6


def test_input_gradients_of_strided_convolutions_use_it():
    x = torch.randn(4, 64, 32, 32, requires_grad=True)
    weight = torch.randn(128, 64, 4, 4) / 32
    with nnarch.trace() as trace:
        y = F.conv2d(x, weight, None, 2, 1)
        (mine,) = torch.autograd.grad(y.square().sum(), x)
    names = {entry.op: entry.algorithm for entry in trace}
    assert names["conv2d_input_grad"] == "winograd_4x4_phases"
    wide = x.detach().double().requires_grad_()
    y = TF.conv2d(wide, weight.double(), None, 2, 1)
    (truth,) = torch.autograd.grad(y.square().sum(), wide)
    assert float((mine - truth).abs().max() / truth.abs().max()) < 8e-6


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_nan_stays_where_it_is(activation):
    """An infinite or NaN input reaches every output of its tile, and no other image."""
    case = Transposed(2, 64, 16, 16, 64, (4, 4), 2, 1)
    t = case.tensors(torch.float32, torch.channels_last)
    t["x"][0, 3, 5, 5] = float("nan")
    y = case.ours(**t, packed=case.packed(t["weight"], 4), activation=activation)
    truth = case.theirs(**t)
    assert bool(y[0][truth[0].isnan()].isnan().all())
    assert bool(torch.isfinite(y[1]).all())


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_under_every_instruction_set(isa):
    check_under_isa(isa, check_all)


def check_all() -> None:
    """Every case with every tile; runs in a process of its own."""
    for case in WINOGRAD:
        for tile, bound in BOUNDS.items():
            t = case.tensors(torch.float32, torch.channels_last)
            assert error(case.ours(**t, packed=case.packed(t["weight"], tile)), case, t) < bound
