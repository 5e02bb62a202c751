"""Planar images too large to be copied whole: convolutions take them in parts."""

from __future__ import annotations

import pytest
import torch
from alone import alone, measures_memory, peak
from tolerances import assert_as_accurate

from nnarch import functional as F

CASES = {  # N, C, H, W, K, kernel, options
    "winograd": (34, 64, 60, 56, 64, 3, {"padding": 1}),
    "rows of one image": (1, 48, 301, 299, 64, 3, {"padding": 1}),
    "pointwise": (40, 64, 56, 60, 64, 1, {}),
    "pointwise with a stride": (1, 64, 420, 400, 64, 1, {"stride": 2}),
    "steps past the kernel": (1, 48, 501, 400, 64, 2, {"stride": 3}),
    "stride": (2, 64, 281, 283, 64, 3, {"padding": 1, "stride": 2}),
    "dilation and groups": (2, 64, 180, 190, 64, 3, {"padding": 2, "dilation": 2, "groups": 2}),
    "more padding than reach": (3, 48, 150, 160, 64, 1, {"padding": 2}),
    "five taps": (3, 48, 150, 160, 48, 5, {"padding": 2}),
    "narrow groups": (8, 64, 100, 90, 64, 3, {"padding": 1, "groups": 16}),
}
VIEWS = {"dense": lambda t: t, "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]]}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_accurate_as_torch(case, view):
    n, c, h, w, k, size, options = case
    generator = torch.Generator().manual_seed(0)
    x = view(torch.randn(n, c, h, w, generator=generator))
    weight = torch.randn(k, c // options.get("groups", 1), size, size, generator=generator)
    weight *= (2 / weight[0].numel()) ** 0.5
    bias = torch.randn(k, generator=generator)
    grad = torch.randn(F.conv2d(x, weight, bias, **options).shape, generator=generator)

    def run(convolve, dtype, channels_last=False):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        image, theirs = leaves[0], grad.to(dtype)
        if channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
            theirs = theirs.contiguous(memory_format=torch.channels_last)
        y = convolve(image, *leaves[1:], **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, theirs)]

    got = run(F.conv2d, torch.float32)
    assert got[0].is_contiguous() and got[1].shape == x.shape
    torchs = run(torch.nn.functional.conv2d, torch.float32, channels_last=True)
    truth = run(torch.nn.functional.conv2d, torch.float64)
    for name, a, b, true in zip(("y", "dx", "dw", "db"), got, torchs, truth, strict=True):
        assert_as_accurate(a, b, true, factor=3, what=name)


def test_epilogue_and_double():
    x = torch.randn(1, 24, 260, 240, dtype=torch.float64)
    weight = torch.randn(64, 24, 3, 3, dtype=torch.float64) / 15
    residual = torch.randn(1, 64, 260, 240, dtype=torch.float64)
    expected = (torch.nn.functional.conv2d(x, weight, padding=1) + residual).relu()
    got = F.conv2d(x, weight, padding=1, residual=residual, activation="relu")
    torch.testing.assert_close(got, expected)


TRANSPOSED = {  # N, C, H, W, K, kernel, options
    "doubled": (2, 64, 120, 130, 32, 4, {"stride": 2, "padding": 1}),
    "images": (24, 64, 60, 60, 64, 3, {"padding": 1}),
    "output padding": (1, 32, 200, 170, 32, 3, {"stride": 2, "output_padding": 1}),
    "groups": (3, 64, 150, 150, 64, 3, {"padding": 1, "groups": 4, "dilation": 2}),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("case", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed(case, view):
    n, c, h, w, k, size, options = case
    x, bias = view(torch.randn(n, c, h, w)), torch.randn(k)
    weight = torch.randn(c, k // options.get("groups", 1), size, size) / c**0.5
    got = F.conv_transpose2d(x, weight, bias, **options)
    pixels = x.contiguous(memory_format=torch.channels_last)
    whole = F.conv_transpose2d(pixels, weight, bias, **options)
    truth = torch.nn.functional.conv_transpose2d(
        x.double(), weight.double(), bias.double(), **options
    )
    assert got.is_contiguous()
    assert_as_accurate(got, whole, truth, factor=1.5)
    residual = torch.randn(got.shape)
    added = F.conv_transpose2d(x, weight, bias, residual=residual, **options)
    torch.testing.assert_close(added, got + residual)


@pytest.mark.parametrize("n, h, stride", [(24, 64, 1), (1, 320, 1), (2, 301, 2)])
def test_separable(n, h, stride):
    x, depthwise = torch.randn(n, 48, h, h - 4), torch.randn(48, 1, 3, 3)
    pointwise = torch.randn(64, 48, 1, 1) / 7
    got = F.depthwise_separable_conv2d(x, depthwise, pointwise, stride=stride, padding=1)
    between = torch.nn.functional.conv2d(x, depthwise, None, stride, 1, groups=48)
    truth = torch.nn.functional.conv2d(
        torch.nn.functional.conv2d(x.double(), depthwise.double(), None, stride, 1, groups=48),
        pointwise.double(),
    )
    assert got.is_contiguous()
    assert_as_accurate(got, torch.nn.functional.conv2d(between, pointwise), truth, factor=3)


def _growth(op: str, gradients: bool) -> float:
    """MB by which the peak of memory grows in one call, beside its result."""
    weight = torch.randn(64, 64, 3, 3) / 24
    each, across = torch.randn(64, 1, 3, 3), torch.randn(64, 64, 1, 1)
    run = {
        "conv2d": lambda x: F.conv2d(x, weight, padding=1),
        "conv_transpose2d": lambda x: F.conv_transpose2d(x, weight, padding=1),
        "depthwise_separable_conv2d": lambda x: F.depthwise_separable_conv2d(
            x, each, across, padding=1
        ),
    }[op]
    run(torch.randn(1, 64, 64, 64))
    x = torch.randn(1, 64, 1024, 1024, requires_grad=gradients)
    weight.requires_grad_(gradients)
    before = peak()
    result = run(x)
    if gradients:
        direction = torch.randn(result.shape)
        before = peak()
        result = torch.autograd.grad(result, (x, weight), direction)[0]
    return (peak() - before - result.nbytes) / 2**20


@measures_memory
@pytest.mark.parametrize(
    "op, gradients",
    [
        ("conv2d", False),
        ("conv2d", True),
        ("conv_transpose2d", False),
        ("conv_transpose2d", True),
        ("depthwise_separable_conv2d", False),
    ],
)
def test_no_copy_of_a_large_image(op, gradients):
    """Beside its 256 MB of output, a convolution of 256 MB of planar image takes a few MB."""
    assert alone(_growth, op, gradients) < 64
