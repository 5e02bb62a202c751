"""Layer and RMS normalization under compilers and autocast, on every machine, in fresh memory."""

from __future__ import annotations

import itertools

import pytest
import test_layer_norm
import torch
from kernel_cases import DTYPES, check_under_isa, name_of, needs_poison, on_fresh_memory
from layer_norm_cases import EPS, dropped
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch.kernels.layer_norm import derivatives
from nnarch.kernels.layer_norm import op as ops


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compile(dropout_p, dynamic):
    torch._dynamo.reset()

    def block(x, residual, weight):
        y, s = F.rms_norm(
            x * 2, (10,), weight, residual=residual, dropout_p=dropout_p, return_sum=True
        )
        return F.layer_norm(y + s, (10,), weight)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        tensors = [torch.randn(2, rows, 10), torch.randn(2, rows, 10), torch.rand(10)]
        tensors = [t.requires_grad_() for t in tensors]
        results = []
        for f in (compiled, block):
            torch.manual_seed(1)
            y = f(*tensors)
            results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
        if dropout_p == 0:
            for mine, expected in zip(*results, strict=True):
                torch.testing.assert_close(mine, expected)
        with torch.no_grad():
            assert compiled(*tensors).shape == tensors[0].shape


def test_export():
    class Block(torch.nn.Module):
        def forward(self, x, residual):
            return F.layer_norm(x, (10,), residual=residual)

    x, residual = torch.randn(3, 10), torch.randn(3, 10)
    exported = torch.export.export(Block(), (x, residual))
    assert torch.equal(exported.module()(x, residual), Block()(x, residual))


def test_autocast_keeps_the_dtype_of_the_input():
    x, weight = torch.randn(3, 16), torch.rand(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.layer_norm(x, (16,), weight).dtype == torch.float32
        assert F.layer_norm(x.bfloat16(), (16,), weight, weight).dtype == torch.bfloat16


@needs_poison
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_reads_no_uninitialised_memory(dtype):
    x, other, grad = (torch.randn(70, 67).to(dtype) for _ in range(3))
    weight, seed = torch.rand(67).to(dtype), torch.tensor([3])

    def everything():
        y, s, stats = ops.layer_norm_train(x, weight, weight, other, seed, 67, EPS, 0.3, False)
        first = ops.layer_norm_backward(grad, other, s, weight, stats, 67, 7)
        second = derivatives.layer_norm_backward_backward(
            other, weight.to(stats.dtype) if dtype == torch.float64 else weight, weight,
            grad, s, weight, stats, 67,
        )  # fmt: skip
        return [y, s, stats, *first, *second, ops.row_dropout(x, seed, 67, 0.5)]

    for fresh, usual in zip(on_fresh_memory(everything), everything(), strict=True):
        assert torch.equal(fresh, usual)


def _everything(rms: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    results = []
    for rows, columns in ((1, 3000), (700, 130), (1033, 48), (67, 768)):
        generator = torch.Generator().manual_seed(rows)
        leaves = [
            torch.randn(rows, columns, generator=generator).to(dtype).requires_grad_()
            for _ in range(2)
        ]
        weight = torch.randn(columns, generator=generator).to(dtype).requires_grad_()
        y, s = _both(rms, leaves, weight, columns)
        first = torch.autograd.grad((y.square() * s).sum(), [*leaves, weight], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [*leaves, weight])
        results += [t.detach() for t in (y, s, *first, *second)]
    return results


def _both(rms: bool, leaves: list[Tensor], weight: Tensor, columns: int):
    if rms:
        return F.rms_norm(leaves[0], (columns,), weight, residual=leaves[1], return_sum=True)
    return F.layer_norm(leaves[0], (columns,), weight, weight, residual=leaves[1], return_sum=True)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_one_and_two_threads_agree(rms):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(_everything(rms))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def _against_reference() -> None:
    """What test_every_instruction_set runs, each in a process of its own."""
    for rms, dtype in itertools.product((False, True), DTYPES[:2]):
        results = _everything(rms, dtype)
        with nnarch.use_backend("reference"):
            expected = _everything(rms, dtype)
        for mine, definition in zip(results, expected, strict=True):
            scale = float(definition.abs().max())
            torch.testing.assert_close(mine, definition, rtol=1e-4, atol=1e-5 * scale)
    test_every_half_survives_its_conversion()
    for dtype in DTYPES[2:]:
        for size in ((7, 16), (9, 31), (2, 4099), (67, 100)):
            test_layer_norm.test_forward_and_backward(size, False, dtype)
    for p, columns in itertools.product((0.1, 0.9), (3, 64, 130)):
        x, seed = torch.randn(5, columns), torch.tensor([2**40 + 17])
        assert torch.equal(ops.row_dropout(x, seed, columns, p), dropped(x, int(seed), p))


def test_every_half_survives_its_conversion():
    """All 2¹⁶ of each type, by dropping nothing: denormals, infinities and NaN among them."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype, columns in itertools.product((torch.float16, torch.bfloat16), (2**16, 2**8, 1)):
        x = bits.view(dtype).view(-1, columns)
        y = ops.row_dropout(x, torch.tensor([1]), columns, 0.0)
        if dtype == torch.bfloat16:  # its denormals are those of float32, which are flushed
            x = torch.where(x.abs() < torch.finfo(dtype).tiny, torch.zeros_like(x), x)
            y = torch.where(y.abs() < torch.finfo(dtype).tiny, torch.zeros_like(y), y)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y[~y.isnan()], x[~x.isnan()])


def test_rounding_to_halves_is_torchs():
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(50, 64).to(dtype)
        scale = torch.logspace(-9, 4, 50)[:, None].to(dtype)
        y = ops.row_dropout((x * scale), torch.tensor([1]), 64, 1 - 1 / 1.37)
        expected = dropped((x * scale).float(), 1, 1 - 1 / 1.37).to(dtype)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, _against_reference)


def test_arrays_of_numpy():
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    y, s = F.layer_norm(x.numpy(), (8,), residual=residual.numpy(), return_sum=True)
    assert torch.equal(torch.from_numpy(s), x + residual)
    torch.testing.assert_close(torch.from_numpy(y), TF.layer_norm(x + residual, (8,)))


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_on_cuda_gives_float32_as_torch(enabled):
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    try:
        with FakeTensorMode():
            x, w = (torch.empty(s, dtype=torch.float16, device="cuda") for s in ((5, 8), (8,)))
            mine = F.layer_norm(x, (8,), w, w)
            others = (F.rms_norm(x, (8,), w), *F.layer_norm(x, (8,), residual=x, return_sum=True))
            torchs = torch.nn.functional.layer_norm(x, (8,), w, w)
            on_the_cpu = F.layer_norm(torch.empty(5, 8, dtype=torch.float16), (8,))
    finally:
        torch.set_autocast_enabled("cuda", before)
    assert torchs.dtype == (torch.float32 if enabled else torch.float16)
    assert {y.dtype for y in (mine, *others)} == {torchs.dtype}
    assert on_the_cpu.dtype == torch.float16
