"""Winograd convolution on the CPU: accuracy, borders, gradients, and when it is chosen."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    FORMATS,
    VIEWS,
    compare,
    machine_with,
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
from nnarch.kernels.conv2d.op import weight_grad

pytestmark = [
    pytest.mark.skipif(library.native is None, reason="only the native kernels have Winograd"),
    pytest.mark.usefixtures("default_precision_after"),
]

# Against torch's direct kernel on the same input, whose error depends on layout and machine; where
# it is nearly nothing, some units in the last place of the largest output are left.
TOLERANCE = {2: dict(factor=2, ulps=4), 4: dict(factor=3, ulps=16)}
TOLERANCE |= {tile: dict(factor=12, ulps=128) for tile in (5, 6)}
TILES = tuple(TOLERANCE)

# (n, c, h, w, k, padding, groups): tails of channels, panels, tiles and blocks.
SHAPES = [
    (1, 16, 8, 8, 32, 1, 1),
    (2, 20, 9, 13, 40, 0, 1),
    (3, 33, 7, 5, 35, (0, 2), 1),
    (1, 64, 15, 30, 70, (2, 1, 0, 3), 1),
    (2, 48, 6, 11, 24, 4, 2),
    (1, 300, 5, 4, 17, "same", 1),  # a sum in two parts
    (5, 24, 28, 31, 16, 1, 1),  # several blocks of tiles
    (1, 17, 1, 2, 33, 1, 1),
    (3, 24, 14, 14, 33, 1, 1),  # tiles at the ends of both, of columns, of rows
    (2, 20, 13, 9, 40, 1, 1),
    (9, 16, 10, 12, 20, 1, 1),
    (2, 40, 12, 7, 18, 1, 1),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
tiles = pytest.mark.parametrize("tile", TILES)


def tensors(shape, memory_format=torch.contiguous_format):
    n, c, h, w, k, _, groups = shape
    return (
        torch.randn(n, c, h, w).contiguous(memory_format=memory_format),
        torch.randn(k, c // groups, 3, 3) * (2 * groups / (9 * c)) ** 0.5,
        torch.randn(k),
    )


def torch_conv2d(x, weight, bias, padding, groups):
    top, left, bottom, right = padding_of(padding, weight, (1, 1), (1, 1))
    return TF.conv2d(TF.pad(x, (left, right, top, bottom)), weight, bias, groups=groups)


def by_tile(x, weight, bias, padding, groups, tile, **epilogue):
    packed = F.pack_conv2d_weight(weight, groups, tile=tile)
    with torch.no_grad(), nnarch.trace() as record:
        y = F.conv2d(x, weight, bias, 1, padding, 1, groups, packed=packed, **epilogue)
    assert record.entries[0].algorithm == f"winograd_{tile}x{tile}"
    return y


@tiles
@shapes
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_forward(shape, tile, memory_format):
    x, weight, bias = tensors(shape, memory_format)
    geometry = shape[5:]
    y = by_tile(x, weight, bias, *geometry, tile)
    truth = torch_conv2d(x.double(), weight.double(), bias.double(), *geometry)
    assert_as_accurate(y, torch_conv2d(x, weight, bias, *geometry), truth, **TOLERANCE[tile])
    assert y.is_contiguous(memory_format=memory_format)


@tiles
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "silu", ("leaky_relu", 0.1)])
def test_epilogue(tile, activation):
    shape = (2, 24, 11, 9, 41, 1, 1)
    x, weight, bias = tensors(shape)
    scale, shift, residual = torch.rand(41) + 0.5, torch.randn(41), torch.randn(2, 41, 11, 9)
    epilogue = dict(scale=scale, shift=shift, residual=residual, activation=activation)
    y = by_tile(x, weight, bias, 1, 1, tile, **epilogue)
    nnarch.set_precision("highest")
    direct = F.conv2d(x, weight, bias, 1, 1, **epilogue)
    torch.testing.assert_close(y, direct, rtol=1e-5, atol=5e-5 if tile > 4 else 1e-5)


@pytest.mark.parametrize("channels", [16, 64, 256, 512, 1024])
@pytest.mark.parametrize("size", [8, 14, 28])
def test_default_error_bound(channels, size):
    """5e-6 of the largest output, for inputs of unit variance and He-scaled weights."""
    x, weight, _ = tensors((1, channels, size, size, 64, 1, 1))
    y = F.conv2d(x, weight, padding=1)
    truth = TF.conv2d(x.double(), weight.double(), padding=1)
    assert (y - truth).abs().max() <= 5e-6 * truth.abs().max()
    theirs = TF.conv2d(x.contiguous(memory_format=torch.channels_last), weight, padding=1)
    slack = 1.5e-6 * truth.abs().max()
    assert (y - truth).abs().max() <= 3 * (theirs - truth).abs().max() + slack


GRADIENT_SHAPES = [s for s in SHAPES if s[2] > 4]
# Large enough for Winograd in the gradient of the weight, with ends of every size.
TRAINED = [(2, 64, 29, 27, 72, 1, 1), (8, 64, 14, 14, 64, 1, 1), (7, 64, 13, 13, 72, 1, 1)]
TRAINED += [(16, 64, 7, 7, 64, 1, 1), (4, 64, 14, 20, 64, 1, 1), (5, 64, 16, 15, 80, 1, 1)]


@pytest.mark.parametrize("precision_level", ["high", "medium"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("shape", [*GRADIENT_SHAPES, *TRAINED], ids=str)
def test_gradients(shape, memory_format, precision_level):
    nnarch.set_precision(precision_level)
    x, weight, bias = tensors(shape, memory_format)
    padding, groups = shape[5:]
    y = torch_conv2d(x, weight, bias, padding, groups)
    ulps = 32 if precision_level == "high" else 128  # 4e-6 and 15e-6
    compare(
        lambda x, weight, bias: F.conv2d(x, weight, bias, 1, padding, 1, groups),
        lambda x, weight, bias: torch_conv2d(x, weight, bias, padding, groups),
        {"x": x, "weight": weight, "bias": bias},
        torch.randn_like(y),
        **TOLERANCE[4 if precision_level == "high" else 6] | {"ulps": ulps},
    )


def test_gradients_run_by_winograd():
    x = torch.randn(1, 32, 28, 28, requires_grad=True)
    weight = torch.randn(32, 32, 3, 3, requires_grad=True)
    y = F.conv2d(x, weight, padding=1)
    with nnarch.trace() as record:
        y.sum().backward()
    assert {entry.algorithm for entry in record} == {"winograd_4x4", "winograd_weight_grad"}


@pytest.mark.parametrize("shape", TRAINED, ids=str)
def test_weight_gradients_run_by_winograd(shape):
    needs_poison()
    x, weight, _ = tensors(shape)
    grad = torch.randn(shape[0], shape[4], *shape[2:4])

    def gradient():
        return weight_grad(grad, x, tuple(weight.shape), (1, 1), (1, 1, 1, 1), (1, 1), 1)

    with nnarch.trace() as record:
        assert torch.equal(on_fresh_memory(gradient), gradient())
    assert {entry.algorithm for entry in record} == {"winograd_weight_grad"}


def test_double_backward():
    x = torch.randn(2, 24, 9, 10, requires_grad=True)
    weight = (torch.randn(20, 24, 3, 3) / 15).requires_grad_()

    def penalty(convolve, x, weight):
        y = convolve(x, weight, None, 1, 1).square().sum()
        dx, dw = torch.autograd.grad(y, (x, weight), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, weight))

    truth = penalty(TF.conv2d, x.double(), weight.double())
    for mine, exact in zip(penalty(F.conv2d, x, weight), truth, strict=True):
        torch.testing.assert_close(
            mine.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item()
        )


@tiles
@pytest.mark.parametrize("view", VIEWS)
def test_views(tile, view):
    shape = (2, 24, 9, 12, 20, 1, 1)
    x, weight, bias = tensors(shape)
    x, weight = VIEWS[view](x), VIEWS[view](weight)
    dense = by_tile(x.contiguous(), weight.contiguous(), bias, 1, 1, tile)
    assert torch.equal(by_tile(x, weight, bias, 1, 1, tile), dense)


@tiles
@shapes
def test_reads_no_uninitialised_memory(shape, tile):
    needs_poison()
    x, weight, bias = tensors(shape)
    y = by_tile(x, weight, bias, *shape[5:], tile)
    assert torch.equal(on_fresh_memory(lambda: by_tile(x, weight, bias, *shape[5:], tile)), y)


@shapes
def test_transformed_on_the_way_or_before(shape):
    """Weights that come unpacked give the same bits, where no sum is cut (up to 96 channels)."""
    x, weight, bias = tensors(shape)
    padding, groups = shape[5:]
    packed = F.pack_conv2d_weight(
        weight, groups, tile=F.conv2d_tile(weight, x.shape, 1, padding, 1, groups)
    )
    with nnarch.trace() as record:
        ours = F.conv2d(x, weight, bias, 1, padding, 1, groups)
        theirs = F.conv2d(x, weight, bias, 1, padding, 1, groups, packed=packed)
    if record.entries[0].algorithm == record.entries[1].algorithm:
        assert torch.equal(ours, theirs)
    else:  # packing weighs more than it gains
        assert record.entries[0].algorithm == "implicit_gemm"


def test_more_tiles_than_memory_holds():
    """Tiles of 10 MB, for weights that outgrow L2: two groups, each through all panels of weights.

    With an L2 that holds the weights, blocks of tiles stay in it; the sums are the same.
    """
    shape = (1, 240, 66, 70, 80, 1, 1)
    x, weight, bias = tensors(shape)
    results = []
    for l2_kib in (256, 64 << 10):
        with machine_with(l2_kib, far_l3=True):
            results.append(by_tile(x, weight, bias, *shape[5:], 4))
            results.append(F.conv2d(x, weight, bias, padding=1))
    assert torch.equal(results[0], results[2])
    truth = TF.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    for y in results:
        assert_as_accurate(y, TF.conv2d(x, weight, bias, padding=1), truth, **TOLERANCE[4])


@pytest.mark.parametrize("shape", [(1, 64, 8, 8, 96, 1, 1), (6, 32, 28, 28, 64, 1, 1)], ids=str)
def test_one_and_two_threads(shape):
    x, weight, bias = tensors(shape)
    x.requires_grad_()
    weight.requires_grad_()

    def run():
        y = F.conv2d(x, weight, bias, padding=1)
        return [y, *torch.autograd.grad(y.square().sum(), (x, weight))]

    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run())
    torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage(dtype):
    x, weight, bias = (t.to(dtype) for t in tensors((1, 32, 12, 12, 32, 1, 1)))
    y = by_tile(x, weight, bias, 1, 1, 4)
    truth = TF.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert_as_accurate(y, truth.to(dtype), truth)


def test_past_the_caches():
    """An output of 9 MB is streamed."""
    x, weight, bias = tensors((9, 16, 64, 64, 64, 1, 1))
    y = by_tile(x, weight, bias, 1, 1, 4, activation="relu")
    torch.testing.assert_close(
        y, TF.conv2d(x, weight, bias, padding=1).relu(), rtol=1e-5, atol=1e-5
    )


def test_precision_decides():
    x, weight, _ = tensors((1, 64, 60, 60, 64, 1, 1))
    algorithms = {}
    for level in ("highest", "high", "medium"):
        nnarch.set_precision(level)
        assert nnarch.get_precision() == level
        with nnarch.trace() as record:
            F.conv2d(x, weight, padding=1)
        algorithms[level] = record.entries[0].algorithm
    assert algorithms == {
        "highest": "implicit_gemm", "high": "winograd_4x4", "medium": "winograd_6x6"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"set_precision: .*highest, high, medium.*'low'"):
        nnarch.set_precision("low")


def test_where_it_does_not_serve():
    weight = torch.randn(32, 32, 3, 3)
    assert F.conv2d_tile(weight, (1, 32, 28, 28), padding=1) == 4
    assert F.conv2d_tile(weight, (1, 32, 28, 28), stride=2) == 0
    assert F.conv2d_tile(weight, (1, 32, 28, 28), dilation=2) == 0
    assert F.conv2d_tile(weight.double(), (1, 32, 28, 28)) == 0
    assert F.conv2d_tile(torch.randn(32, 3, 3, 3), (1, 3, 28, 28)) == 0
    assert F.conv2d_tile(torch.randn(32, 32, 7, 7), (1, 32, 28, 28)) == 0
    assert F.conv2d_tile(torch.randn(512, 512, 3, 3), (1, 512, 1, 1), padding=1) == 0
    with pytest.raises(ValueError, match="conv2d_tile: weight has 32 input channels"):
        F.conv2d_tile(weight, (1, 16, 28, 28))


def test_packed_for_another_convolution():
    x, weight, _ = tensors((1, 32, 12, 12, 32, 1, 1))
    packed = F.pack_conv2d_weight(weight, tile=4)
    with pytest.raises(ValueError, match="packed does not belong"):
        F.conv2d(x, weight, stride=2, packed=packed)
    with pytest.raises(ValueError, match="packed does not belong"):
        F.conv2d(x, torch.randn(32, 32, 5, 5), packed=packed)
    with pytest.raises(ValueError, match=r"conv2d_pack: tile must be one of \(0, 2\).*got 4"):
        F.pack_conv2d_weight(torch.randn(32, 32, 5, 5), tile=4)


def test_module_packs_for_each_kind_of_input():
    conv = nn.Conv2d(32, 48, 3, padding=1).eval()
    with torch.no_grad():
        for size in (1, 28, 4):
            x = torch.randn(1, 32, size, size)
            torch.testing.assert_close(
                conv(x), TF.conv2d(x, conv.weight, conv.bias, padding=1), rtol=1e-5, atol=1e-5
            )
        assert {0, 4} <= set(conv._packed.packed)
        nnarch.set_precision("highest")
        with nnarch.trace() as record:
            conv(torch.randn(1, 32, 28, 28))
    assert record.entries[0].algorithm == "implicit_gemm"


def test_module_leaves_errors_to_the_convolution():
    conv = nn.Conv2d(32, 48, 3).eval().requires_grad_(False)
    with pytest.raises(ValueError, match="conv2d: weight has 32 input channels"):
        conv(torch.randn(1, 16, 8, 8))
    with pytest.raises(ValueError, match="conv2d: the kernel"):
        conv(torch.randn(1, 32, 2, 2))


def test_accelerated_model_follows_the_precision():
    model = torch.nn.Sequential(torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.ReLU()).eval()
    accelerated, x = nnarch.accelerate(model), torch.randn(1, 32, 28, 28)
    with torch.no_grad():
        fast = [accelerated(x) for _ in range(3)]
        nnarch.set_precision("highest")
        exact = [accelerated(x) for _ in range(3)]
    assert torch.equal(fast[0], fast[2]) and torch.equal(exact[0], exact[2])
    assert not torch.equal(fast[0], exact[0])
    torch.testing.assert_close(fast[0], exact[0], rtol=1e-5, atol=1e-5)
