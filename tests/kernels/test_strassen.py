"""1×1 convolutions by Strassen's product on the CPU: accuracy, what meets what, and the choice."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    ACTIVATIONS,
    FORMATS,
    VIEWS,
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

pytestmark = [
    pytest.mark.skipif(
        library.native is None, reason="only the native kernels have Strassen's product"
    ),
    pytest.mark.usefixtures("default_precision_after"),
]

# As Winograd's 4×4 tiles.
TOLERANCE = dict(factor=3, ulps=16)
PAIRS = 2  # as conv2d_pack is told of it

# (n, c, h, w, k, stride): odd planes, rows of one pixel, several blocks of pairs and of columns.
SHAPES = [
    (1, 32, 4, 4, 64, 1),
    (2, 64, 7, 7, 128, 1),
    (3, 96, 5, 9, 192, 2),
    (1, 256, 14, 14, 512, 1),
    (2, 1024, 7, 7, 256, 1),
    (1, 2048, 5, 3, 64, 1),
    (4, 32, 1, 1, 64, 1),
    (1, 32, 31, 1, 64, 2),
    (2, 128, 30, 28, 320, 1),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensors(shape, memory_format=torch.contiguous_format):
    n, c, h, w, k, _ = shape
    return (
        torch.randn(n, c, h, w).contiguous(memory_format=memory_format),
        torch.randn(k, c, 1, 1) * (2 / c) ** 0.5,
        torch.randn(k),
    )


def by_pairs(x, weight, bias=None, stride=1, groups=1, **epilogue):
    packed = F.pack_conv2d_weight(weight, groups, tile=PAIRS)
    with torch.no_grad(), nnarch.trace() as record:
        y = F.conv2d(x, weight, bias, stride, groups=groups, packed=packed, **epilogue)
    assert record.entries[0].algorithm == "strassen"
    return y


@shapes
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_forward(shape, memory_format):
    x, weight, bias = tensors(shape, memory_format)
    y = by_pairs(x, weight, bias, shape[5])
    truth = TF.conv2d(x.double(), weight.double(), bias.double(), shape[5])
    assert_as_accurate(y, TF.conv2d(x, weight, bias, shape[5]), truth, **TOLERANCE)
    assert y.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("shape", [(2, 64, 7, 5, 128, 1), (1, 64, 40, 41, 1024, 1)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_epilogue(shape, activation):
    """The second output is written past the caches."""
    x, weight, bias = tensors(shape, torch.channels_last)
    n, _, h, w, k, _ = shape
    scale, shift, residual = torch.rand(k) + 0.5, torch.randn(k), torch.randn(n, k, h, w)
    epilogue = dict(scale=scale, shift=shift, residual=residual, activation=activation)
    nnarch.set_precision("highest")
    direct = F.conv2d(x, weight, bias, **epilogue)
    torch.testing.assert_close(by_pairs(x, weight, bias, **epilogue), direct, rtol=1e-5, atol=2e-5)


@shapes
def test_small_integers_are_exact(shape):
    """Addresses: sums of small integers have one value in whatever order."""
    n, c, h, w, k, stride = shape
    x = torch.randint(-3, 4, (n, c, h, w)).float()
    weight = torch.randint(-3, 4, (k, c, 1, 1)).float()
    assert torch.equal(by_pairs(x, weight, None, stride), TF.conv2d(x, weight, None, stride))


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    x, weight, bias = tensors((2, 64, 5, 6, 64, 1))
    x, weight = VIEWS[view](x), VIEWS[view](weight)
    dense = by_pairs(x.contiguous(), weight.contiguous(), bias)
    assert torch.equal(by_pairs(x, weight, bias), dense)


@shapes
def test_reads_no_uninitialised_memory(shape):
    needs_poison()
    x, weight, bias = tensors(shape)
    y = by_pairs(x, weight, bias, shape[5])
    assert torch.equal(on_fresh_memory(lambda: by_pairs(x, weight, bias, shape[5])), y)


def test_groups():
    x, weight, bias = tensors((2, 128, 6, 5, 256, 1))
    weight = weight[:, :64]
    truth = TF.conv2d(x.double(), weight.double(), bias.double(), groups=2)
    y = by_pairs(x, weight, bias, groups=2)
    assert_as_accurate(y, TF.conv2d(x, weight, bias, groups=2), truth, **TOLERANCE)


def test_images_do_not_meet():
    """Of a batch every image has the bits that it has alone; NaN stays in its pair of pixels."""
    x, weight, bias = tensors((3, 64, 5, 5, 64, 1), torch.channels_last)
    y = by_pairs(x, weight, bias)
    for i in range(3):
        assert torch.equal(by_pairs(x[i : i + 1], weight, bias), y[i : i + 1])
    x[1, 40, 2, 3], x[2, 0, 4, 4] = float("nan"), float("inf")
    odd = ~torch.isfinite(by_pairs(x, weight, bias)).all(dim=1)
    assert odd.flatten(1).nonzero().tolist() == [[1, 12], [1, 13], [2, 24]]


@pytest.mark.parametrize("exponents", [2, 12, 25])
def test_channels_of_all_magnitudes(exponents):
    """What undoes the scale of a channel, or makes it, costs no output channel its accuracy."""
    x, weight, _ = tensors((1, 128, 9, 9, 128, 1))
    into = 1.3 * 2.0 ** torch.randint(-exponents, exponents + 1, (128, 1, 1))
    out = 0.7 * 2.0 ** torch.randint(-exponents, exponents + 1, (128, 1, 1, 1))
    x, weight = x * into, weight / into * out
    truth = TF.conv2d(x.double(), weight.double())
    error = (by_pairs(x, weight) - truth).abs()
    assert (error.amax((0, 2, 3)) <= 5e-6 * truth.abs().amax((0, 2, 3))).all()


def test_weights_of_zero():
    """A channel without weights takes nothing of its partner's rounding, in or out."""
    x, weight, bias = tensors((1, 64, 4, 4, 64, 1))
    weight[3], weight[:, 5], bias[3] = 0, 0, 0
    y = by_pairs(x, weight, bias)
    assert y[:, 3].abs().max() < 1e-20
    truth = TF.conv2d(x.double(), weight.double(), bias.double())
    assert_as_accurate(y, TF.conv2d(x, weight, bias), truth, **TOLERANCE)
    x[:, 5] *= 1e12
    assert_as_accurate(by_pairs(x, weight, bias), TF.conv2d(x, weight, bias), truth, **TOLERANCE)


@pytest.mark.parametrize("channels", [64, 256, 512, 1024])
def test_default_error_bound(channels):
    """5e-6 of the largest output, and 3 times torch's error, for positive inputs too."""
    for sign in (torch.Tensor.abs, lambda t: t):
        x, weight, _ = tensors((1, channels, 14, 14, 128, 1), torch.channels_last)
        x = sign(x)
        y, theirs = by_pairs(x, weight), TF.conv2d(x, weight)
        truth = TF.conv2d(x.double(), weight.double())
        error, largest = (y - truth).abs().max(), truth.abs().max()
        assert error <= 5e-6 * largest
        assert error <= 3 * (theirs - truth).abs().max() + 1.5e-6 * largest


def test_one_and_two_threads():
    x, weight, bias = tensors((3, 512, 13, 15, 128, 1))
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(by_pairs(x, weight, bias))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("l2_kib", [256, 2048])
def test_caches_of_other_machines(l2_kib):
    x, weight, bias = tensors((2, 256, 14, 14, 128, 1))
    truth = TF.conv2d(x.double(), weight.double(), bias.double())
    with machine_with(l2_kib):
        y = by_pairs(x, weight, bias)
    assert_as_accurate(y, TF.conv2d(x, weight, bias), truth, **TOLERANCE)


def test_precision_decides():
    weight, size = torch.empty(256, 1024, 1, 1), (8, 1024, 14, 14)
    assert F.conv2d_tile(weight, size) == PAIRS
    assert F.conv2d_tile(weight, size, stride=2) == PAIRS
    nnarch.set_precision("highest")
    assert F.conv2d_tile(weight, size) == 0


def test_where_it_does_not_serve():
    weight, size = torch.empty(256, 1024, 1, 1), (8, 1024, 14, 14)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert F.conv2d_tile(weight.to(dtype), size) == 0
    assert F.conv2d_tile(weight, (1, 1024, 1, 1)) == 0
    assert F.conv2d_tile(weight, size, padding=1) == 0  # some pixels lie in the padding
    assert F.conv2d_tile(weight[:, :1000], (8, 1000, 14, 14)) == 0
    assert F.conv2d_tile(weight[:250], size) == 0
    assert F.conv2d_tile(torch.empty(64, 64, 1, 1), (8, 64, 56, 56)) == 0  # sums cost more
    assert F.conv2d_tile(torch.empty(512, 256, 1, 1), (8, 256, 1, 400)) == 0  # a signal
    with pytest.raises(ValueError, match=r"conv2d_pack: tile .* for 1x1 2"):
        F.pack_conv2d_weight(weight[:, :1000], tile=PAIRS)
    with pytest.raises(ValueError, match="conv2d_pack: tile "):
        F.pack_conv2d_weight(weight.double(), tile=PAIRS)


def test_packed_for_another_convolution():
    x, weight, _ = tensors((1, 64, 6, 6, 64, 1))
    packed = F.pack_conv2d_weight(weight, tile=PAIRS)
    with pytest.raises(ValueError, match="packed does not belong"):
        F.conv2d(x, torch.randn(128, 64, 1, 1), packed=packed)
    with pytest.raises(ValueError, match="packed does not belong"):
        F.conv2d(x, weight, padding=1, packed=packed)


def test_module_packs_for_each_kind_of_input():
    conv = nn.Conv2d(512, 256, 1).eval()
    with torch.no_grad():
        for size in (1, 28, 4):
            x = torch.randn(1, 512, size, size)
            torch.testing.assert_close(
                conv(x), TF.conv2d(x, conv.weight, conv.bias), rtol=1e-5, atol=1e-5
            )
        assert set(conv._packed.packed) == {0, PAIRS}
    grad_of = torch.randn(1, 512, 28, 28, requires_grad=True)
    with nnarch.trace() as record:
        conv(grad_of).sum().backward()
    assert "strassen" not in {entry.algorithm for entry in record}


@pytest.mark.parametrize("shape", [(2, 512, 14, 14), (8, 512, 7, 7), (1, 512, 14, 14)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("with_residual", [False, True])
def test_separable(shape, stride, with_residual):
    """Fused by rows, fused by images, and stage by stage."""
    layer = nn.DepthwiseSeparableConv2d(
        512, 512, 3, stride, 1, depthwise_activation="relu", activation="relu6"
    ).eval()
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    size = TF.conv2d(x[:, :1], torch.ones(1, 1, 3, 3), None, stride, 1).shape
    residual = torch.randn(size[0], 512, *size[2:]) if with_residual else None

    def plainly(x, layer, residual):
        y = TF.conv2d(x, layer.depthwise.weight, layer.depthwise.bias, stride, 1, groups=512)
        y = TF.conv2d(y.relu(), layer.pointwise.weight, layer.pointwise.bias)
        return (y if residual is None else y + residual).clamp(0, 6)

    with torch.no_grad():
        y, theirs = layer(x, residual), plainly(x, layer, residual)
        tiles = set(layer.pointwise._packed.packed)
        layer.double()
        truth = plainly(x.double(), layer, None if residual is None else residual.double())
    assert_as_accurate(y, theirs, truth, **TOLERANCE)
    assert tiles == {F.conv2d_tile(layer.pointwise.weight.float(), (size[0], 512, *size[2:]))}


def test_separable_images_do_not_meet():
    layer = nn.DepthwiseSeparableConv2d(512, 512, 3, 1, 1).eval()
    with torch.no_grad():
        x = torch.randn(8, 512, 7, 7).contiguous(memory_format=torch.channels_last)
        x[3, 0, 6, 6] = float("nan")
        y = layer(x)
    odd = ~torch.isfinite(y).flatten(1).all(dim=1)
    assert odd.tolist() == [i == 3 for i in range(8)]


def test_accelerated_inverted_residual():
    """The projection alone; and the precision is followed."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(160, 960, 1), torch.nn.ReLU6(),
        torch.nn.Conv2d(960, 960, 3, padding=1, groups=960), torch.nn.ReLU6(),
        torch.nn.Conv2d(960, 320, 1),
    ).eval()  # fmt: skip
    accelerated, x = nnarch.accelerate(model), torch.randn(8, 160, 14, 14)
    with torch.no_grad():
        truth, theirs = model.double()(x.double()), model.float()(x)
        fast = [accelerated(x) for _ in range(3)]
        nnarch.set_precision("highest")
        exact = accelerated(x)
    assert torch.equal(fast[0], fast[2]) and not torch.equal(fast[0], exact)
    assert_as_accurate(fast[0], theirs, truth, **TOLERANCE)
    assert_as_accurate(exact, theirs, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_separable_under_autocast(dtype):
    """The packed weight stays float32, or the kernel would not know its form."""
    layer = nn.DepthwiseSeparableConv2d(512, 512, 3, 1, 1).eval()
    x = torch.randn(8, 512, 14, 14).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = layer(x)
        with torch.autocast("cpu", dtype):
            y = layer(x)
    assert PAIRS in layer.pointwise._packed.packed and y.dtype == dtype
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_separable_refuses_what_it_cannot_read():
    x, depthwise = torch.randn(1, 64, 6, 6), torch.randn(64, 1, 3, 3)
    pointwise = torch.randn(64, 64, 1, 1)
    packed = F.pack_conv2d_weight(pointwise, tile=PAIRS)
    with pytest.raises((RuntimeError, ValueError), match="packed does not belong"):
        torch.ops.nnarch.inverted_residual(
            x, pointwise, depthwise, pointwise, None, None, None, None, packed, None, None,
            [1, 1], [1, 1, 1, 1], [1, 1], 0, 0.0, 0, 0.0, 0, 0.0,
        )  # fmt: skip
    y = F.depthwise_separable_conv2d(x, depthwise, pointwise, padding=1, pointwise_packed=packed)
    halves = F.depthwise_separable_conv2d(
        x, depthwise, pointwise, padding=1, pointwise_packed=packed.bfloat16()
    )  # packed anew
    torch.testing.assert_close(y, halves, rtol=1e-4, atol=1e-3)


def test_separable_smaller_than_its_kernel():
    layer = nn.DepthwiseSeparableConv2d(32, 32, 3).eval()
    with torch.no_grad(), pytest.raises(ValueError, match="larger than the padded input"):
        layer(torch.randn(1, 32, 1, 1))


def test_no_channels():
    with pytest.raises(ValueError, match="conv2d_pack: tile"):
        F.pack_conv2d_weight(torch.empty(64, 0, 1, 1), tile=PAIRS)


def test_weights_of_a_gigabyte_stay_direct():
    assert F.conv2d_tile(torch.empty(1).expand(8192, 8192, 1, 1), (8, 8192, 14, 14)) == 0
