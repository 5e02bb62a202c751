"""Winograd for 9×9 kernels with stride 2, forward and both gradients, in phases."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    FORMATS,
    VIEWS,
    check_under_isa,
    compare,
    name_of,
    needs_poison,
    on_fresh_memory,
)
from tolerances import assert_as_accurate
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch import library, nn
from nnarch.kernels.conv2d.geometry import padding_of
from nnarch.kernels.conv2d.op import input_grad, weight_grad

pytestmark = [
    pytest.mark.skipif(library.native is None, reason="only the native kernels have Winograd"),
    pytest.mark.usefixtures("default_precision_after"),
]

# (n, c, h, w, k, padding, groups): tails of channels, panels and tiles, pixels that no window
# reads, several chunks of channels, several blocks of tiles, an image of more than a block.
SHAPES = [
    (3, 64, 20, 20, 48, 0, 1),
    (2, 40, 33, 28, 33, (2, 3), 1),
    (3, 150, 17, 22, 24, (4, 1, 0, 3), 1),
    (4, 48, 22, 19, 32, 4, 2),
    (48, 17, 15, 16, 20, 2, 1),
    (1, 16, 94, 95, 16, 4, 1),
    (2, 70, 12, 9, 80, 4, 1),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
GEOMETRY = ((2, 2), (0, 0, 0, 0), (1, 1), 1)


def tensors(shape, memory_format=torch.contiguous_format):
    n, c, h, w, k, _, groups = shape
    weight = torch.randn(k, c // groups, 9, 9) * (2 * groups / (81 * c)) ** 0.5
    return (
        torch.randn(n, c, h, w).contiguous(memory_format=memory_format),
        weight.contiguous(memory_format=memory_format),
        torch.randn(k),
    )


def torch_conv2d(x, weight, bias, padding, groups=1):
    top, left, bottom, right = padding_of(padding, weight, (2, 2), (1, 1))
    return TF.conv2d(TF.pad(x, (left, right, top, bottom)), weight, bias, 2, groups=groups)


def by_winograd(x, weight, bias, padding, groups=1, **epilogue):
    with nnarch.trace() as record:
        y = F.conv2d(x, weight, bias, 2, padding, 1, groups, **epilogue)
    assert record.entries[0].algorithm == "winograd_strided"
    return y


@shapes
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_forward(shape, memory_format):
    x, weight, bias = tensors(shape, memory_format)
    y = by_winograd(x, weight, bias, *shape[5:])
    theirs = torch_conv2d(x, weight, bias, *shape[5:])
    truth = torch_conv2d(x.double(), weight.double(), bias.double(), *shape[5:])
    assert_as_accurate(y, theirs, truth, factor=3, ulps=16)  # as for 4×4 tiles of 3×3 taps
    assert y.is_contiguous(memory_format=memory_format)


@shapes
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_gradients(shape, memory_format):
    x, weight, bias = tensors(shape, memory_format)
    padding, groups = shape[5:]
    y = torch_conv2d(x, weight, bias, padding, groups)
    compare(
        lambda x, weight, bias: F.conv2d(x, weight, bias, 2, padding, 1, groups),
        lambda x, weight, bias: torch_conv2d(x, weight, bias, padding, groups),
        {"x": x, "weight": weight, "bias": bias},
        torch.randn_like(y),
        factor=3,
        ulps=32,  # as for 3×3
    )


def test_gradients_run_by_winograd():
    x, weight, _ = tensors(SHAPES[0])
    y = F.conv2d(x.requires_grad_(), weight.requires_grad_(), None, 2)
    with nnarch.trace() as record:
        y.sum().backward()
    assert {e.algorithm for e in record} == {"winograd_strided", "winograd_strided_weight_grad"}
    assert weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("channels", [16, 64, 256, 512])
def test_error_bound(channels):
    """5e-6 of the largest output, and of the largest value of each gradient, as for 3×3."""
    x, weight, _ = tensors((6, channels, 20, 20, 64, 0, 1))
    y = by_winograd(x, weight, None, 0)
    grad = torch.randn_like(y)
    ours = y, input_grad(grad, weight, tuple(x.shape), *GEOMETRY)
    ours = *ours, weight_grad(grad, x, tuple(weight.shape), *GEOMETRY)
    x64, weight64 = x.double().requires_grad_(), weight.double().requires_grad_()
    y64 = TF.conv2d(x64, weight64, None, 2)
    truth = y64.detach(), *torch.autograd.grad(y64, (x64, weight64), grad.double())
    for mine, exact in zip(ours, truth, strict=True):
        assert (mine - exact).abs().max() <= 5e-6 * exact.abs().max()


@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
def test_epilogue(activation):
    x, weight, bias = tensors((2, 24, 21, 19, 41, 1, 1))
    scale, shift, residual = torch.rand(41) + 0.5, torch.randn(41), torch.randn(2, 41, 8, 7)
    epilogue = dict(scale=scale, shift=shift, residual=residual, activation=activation)
    y = by_winograd(x, weight, bias, 1, **epilogue)
    nnarch.set_precision("highest")
    direct = F.conv2d(x, weight, bias, 2, 1, **epilogue)
    torch.testing.assert_close(y, direct, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    x, weight, bias = tensors((2, 24, 19, 22, 20, 2, 1))
    x, weight = VIEWS[view](x), VIEWS[view](weight)
    dense = by_winograd(x.contiguous(), weight.contiguous(), bias, 2)
    assert torch.equal(by_winograd(x, weight, bias, 2), dense)
    grad = VIEWS[view](torch.randn_like(dense))
    geometry = ((2, 2), (2, 2, 2, 2), (1, 1), 1)
    for run in (
        lambda grad, x, weight: input_grad(grad, weight, tuple(x.shape), *geometry),
        lambda grad, x, weight: weight_grad(grad, x, tuple(weight.shape), *geometry),
    ):
        expected = run(grad.contiguous(), x.contiguous(), weight.contiguous())
        assert torch.equal(run(grad, x, weight), expected)


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (1, 2, 4)], ids=str)
def test_reads_no_uninitialised_memory(shape):
    needs_poison()
    x, weight, _ = tensors(shape)
    padding = padding_of(shape[5], weight, (2, 2), (1, 1))
    geometry = ((2, 2), padding, (1, 1), 1)

    def everything():
        y = by_winograd(x, weight, None, padding)
        grad = torch.cos(y * 100)
        return torch.cat(
            [
                y.flatten(),
                input_grad(grad, weight, tuple(x.shape), *geometry).flatten(),
                weight_grad(grad, x, tuple(weight.shape), *geometry).flatten(),
            ]
        )

    assert torch.equal(on_fresh_memory(everything), everything())


def test_double_backward():
    x = torch.randn(2, 24, 17, 18, requires_grad=True)
    weight = (torch.randn(20, 24, 9, 9) / 44).requires_grad_()

    def penalty(convolve, x, weight):
        y = convolve(x, weight, None, 2, 1).square().sum()
        dx, dw = torch.autograd.grad(y, (x, weight), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, weight))

    truth = penalty(TF.conv2d, x.double(), weight.double())
    for mine, exact in zip(penalty(F.conv2d, x, weight), truth, strict=True):
        torch.testing.assert_close(
            mine.double(), exact, rtol=1e-4, atol=2e-5 * exact.abs().max().item()
        )


def algorithm(x, weight, *geometry, **options):
    with nnarch.trace() as record:
        F.conv2d(x, weight, None, *geometry, **options)
    return record.entries[-1].algorithm


def test_when_it_is_chosen():
    x, weight, _ = tensors(SHAPES[0])
    assert algorithm(x, weight, 2) == "winograd_strided"
    assert algorithm(x.double(), weight.double(), 2) == "implicit_gemm"
    assert algorithm(x, weight, 1) == "implicit_gemm"
    assert algorithm(x, weight, (2, 1)) == "implicit_gemm"
    assert algorithm(x, weight, 2, 8, 2) == "implicit_gemm"
    assert algorithm(x, weight[:, :, :7, :7], 2) == "implicit_gemm"
    assert algorithm(x[:1, :, :9, :9], weight, 2) == "implicit_gemm"  # one output: no tile to fill
    nnarch.set_precision("highest")
    assert algorithm(x, weight, 2) == "implicit_gemm"


def test_half_precision_is_storage():
    x, weight, bias = tensors(SHAPES[0])
    y = by_winograd(x.half(), weight.half(), bias.half(), 0)
    wide = by_winograd(x.half().float(), weight.half().float(), bias.half().float(), 0)
    assert torch.equal(y, wide.half())


def test_module():
    conv = nn.Conv2d(64, 48, 9, stride=2)
    x = torch.randn(3, 64, 20, 20)
    conv(x).sum().backward()
    torch.testing.assert_close(
        conv(x), TF.conv2d(x, conv.weight, conv.bias, 2), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 3, 4, 5)], ids=str)
def test_one_and_two_threads(shape):
    x, weight, bias = tensors(shape)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = F.conv2d(*leaves, bias, 2, shape[5], 1, shape[6])
        results.append([y, *torch.autograd.grad(y, leaves, torch.cos(y.detach() * 100))])
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def check_all():
    for shape in SHAPES[:4]:
        test_forward(shape, torch.contiguous_format)
        test_gradients(shape, torch.channels_last)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    check_under_isa(isa, check_all)
