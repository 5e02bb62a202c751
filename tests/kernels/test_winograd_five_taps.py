"""Winograd for 5×5 kernels, 2×2 outputs a tile; blocks and products are test_winograd.py's."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FORMATS, VIEWS, compare, name_of, needs_poison, on_fresh_memory
from tolerances import assert_as_accurate
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch import library, nn

pytestmark = [
    pytest.mark.skipif(library.native is None, reason="only the native kernels have Winograd"),
    pytest.mark.usefixtures("default_precision_after"),
]

# (n, c, h, w, k, padding, groups): tails of channels, panels, tiles and blocks.
SHAPES = [
    (1, 16, 8, 8, 32, 2, 1),
    (2, 20, 9, 13, 40, 0, 1),
    (3, 33, 7, 5, 35, (0, 2), 1),
    (1, 64, 15, 30, 70, (2, 1), 1),
    (2, 48, 6, 11, 24, 4, 2),
    (1, 300, 5, 4, 17, 2, 1),  # a sum in several parts
    (5, 24, 28, 31, 16, 2, 1),  # several blocks of tiles
    (1, 17, 1, 2, 33, 2, 1),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensors(shape, memory_format=torch.contiguous_format):
    n, c, h, w, k, _, groups = shape
    return (
        torch.randn(n, c, h, w).contiguous(memory_format=memory_format),
        torch.randn(k, c // groups, 5, 5) * (2 * groups / (25 * c)) ** 0.5,
        torch.randn(k),
    )


def by_winograd(x, weight, bias, padding, groups=1, **epilogue):
    packed = F.pack_conv2d_weight(weight, groups, tile=2)
    with torch.no_grad(), nnarch.trace() as record:
        y = F.conv2d(x, weight, bias, 1, padding, 1, groups, packed=packed, **epilogue)
    assert record.entries[0].algorithm == "winograd_2x2"
    return y


@shapes
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_forward(shape, memory_format):
    x, weight, bias = tensors(shape, memory_format)
    padding, groups = shape[5:]
    y = by_winograd(x, weight, bias, padding, groups)
    theirs = TF.conv2d(x, weight, bias, 1, padding, 1, groups)
    truth = TF.conv2d(x.double(), weight.double(), bias.double(), 1, padding, 1, groups)
    assert_as_accurate(y, theirs, truth, factor=3, ulps=16)  # as for 4×4 tiles of 3×3 taps
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("channels", [16, 64, 256, 1024])
@pytest.mark.parametrize("size", [8, 27])
def test_error_bound(channels, size):
    """5e-6 of the largest output, as for 3×3."""
    x, weight, _ = tensors((1, channels, size, size, 64, 2, 1))
    y = by_winograd(x, weight, None, 2)
    truth = TF.conv2d(x.double(), weight.double(), padding=2)
    assert (y - truth).abs().max() <= 5e-6 * truth.abs().max()


@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
def test_epilogue(activation):
    x, weight, bias = tensors((2, 24, 11, 9, 41, 2, 1))
    scale, shift, residual = torch.rand(41) + 0.5, torch.randn(41), torch.randn(2, 41, 11, 9)
    epilogue = dict(scale=scale, shift=shift, residual=residual, activation=activation)
    y = by_winograd(x, weight, bias, 2, **epilogue)
    nnarch.set_precision("highest")
    direct = F.conv2d(x, weight, bias, 1, 2, **epilogue)
    torch.testing.assert_close(y, direct, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    x, weight, bias = tensors((2, 24, 9, 12, 20, 2, 1))
    x, weight = VIEWS[view](x), VIEWS[view](weight)
    dense = by_winograd(x.contiguous(), weight.contiguous(), bias, 2)
    assert torch.equal(by_winograd(x, weight, bias, 2), dense)


@shapes
def test_reads_no_uninitialised_memory(shape):
    needs_poison()
    x, weight, bias = tensors(shape)
    y = by_winograd(x, weight, bias, *shape[5:])
    assert torch.equal(on_fresh_memory(lambda: by_winograd(x, weight, bias, *shape[5:])), y)


def test_gradients():
    """They run the direct products; the forward pass does not."""
    x, weight, bias = tensors((1, 64, 15, 30, 70, 2, 1))
    with nnarch.trace() as record:
        y = F.conv2d(x, weight, bias, 1, 2)
    assert record.entries[0].algorithm == "winograd_2x2"
    compare(
        lambda x, weight, bias: F.conv2d(x, weight, bias, 1, 2),
        lambda x, weight, bias: TF.conv2d(x, weight, bias, 1, 2),
        {"x": x, "weight": weight, "bias": bias},
        torch.randn_like(y),
        factor=3,
        ulps=32,
    )


def test_when_it_is_chosen():
    weight, size = torch.randn(32, 32, 5, 5), (1, 32, 28, 28)
    assert F.conv2d_tile(weight, size, padding=2) == 2
    assert F.conv2d_tile(weight, size, stride=2) == 0
    assert F.conv2d_tile(weight, size, dilation=2) == 0
    assert F.conv2d_tile(weight.double(), size) == 0
    assert F.conv2d_tile(torch.randn(16, 6, 5, 5), (1, 6, 14, 14)) == 0
    nnarch.set_precision("medium")
    assert F.conv2d_tile(weight, size, padding=2) == 2
    nnarch.set_precision("highest")
    assert F.conv2d_tile(weight, size, padding=2) == 0


def test_module_packs_for_it():
    conv = nn.Conv2d(32, 48, 5, padding=2).eval()
    x = torch.randn(1, 32, 28, 28)
    with torch.no_grad(), nnarch.trace() as record:
        y = conv(x)
    assert record.entries[-1].algorithm == "winograd_2x2" and 2 in conv._packed.packed
    torch.testing.assert_close(
        y, TF.conv2d(x, conv.weight, conv.bias, padding=2), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(1, 64, 8, 8, 96, 2, 1), (6, 32, 28, 28, 64, 2, 1)], ids=str)
def test_one_and_two_threads(shape):
    x, weight, bias = tensors(shape)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(F.conv2d(x, weight, bias, padding=2))
    torch.set_num_threads(threads)
    assert torch.equal(*results)
