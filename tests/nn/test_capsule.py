"""Capsule modules, their objective, and the convolutional routing against plain torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tolerances import assert_as_accurate
from torch import Tensor

import nnarch
from nnarch import functional as F
from nnarch import nn
from nnarch.models.capsnet import plain_routing, plain_squash
from nnarch.nn.capsule import mask_capsules
from nnarch.objectives import CapsuleLoss, margin_loss, reconstruction_loss


def _plain_conv(x: Tensor, layer: nn.ConvCapsules2d) -> Tensor:
    """Windows one by one, each routed in plain torch."""
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding
    x = torch.nn.functional.pad(x, (pw, pw, ph, ph))
    weight = layer.weight.to(x.dtype).flatten(1, 3)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    rows = []
    for i in range(0, x.shape[3] - kh + 1, sh):
        row = []
        for j in range(0, x.shape[4] - kw + 1, sw):
            window = x[:, :, :, i : i + kh, j : j + kw].permute(0, 1, 3, 4, 2).flatten(1, 3)
            row.append(plain_routing(window, weight, bias, layer.iterations, layer.detach_routing))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "detach"),
    [(3, 1, 0, False), (3, 2, 1, True), ((2, 3), (2, 1), (0, 2), False), (1, 1, 0, True)],
)
def test_convolutional_capsules(kernel, stride, padding, detach, dtype):
    layer = nn.ConvCapsules2d(
        3, 4, 5, 6, kernel, stride, padding, bias=True, detach_routing=detach, dtype=dtype
    )
    with torch.no_grad():
        layer.weight.normal_(std=0.5)
        layer.bias.normal_(std=0.3)
    x = torch.randn(2, 3, 4, 6, 7, dtype=dtype)
    leaves = [x.requires_grad_(), layer.weight, layer.bias]
    y = layer(x)
    truth = _plain_conv(x.double(), layer)
    plain = _plain_conv(x, layer)
    grad = torch.randn_like(y)
    for what, *three in zip(
        ("output", "x", "weight", "bias"),
        *([v.detach(), *torch.autograd.grad(v, leaves, grad.to(v.dtype))] for v in (y, plain)),
        [truth.detach(), *(g.double() for g in torch.autograd.grad(truth, leaves, grad.double()))],
        strict=True,
    ):
        # Through float32 parameters the truth's gradients arrive in float32.
        assert_as_accurate(*three, what=what, ulps=64)


def test_convolutional_capsules_know_the_order_of_windows():
    """A weight that looks at one place of the window alone moves the image."""
    layer = nn.ConvCapsules2d(2, 3, 2, 3, (2, 3), iterations=1)
    with torch.no_grad():
        layer.weight.zero_()
        for c in range(2):
            layer.weight[c, c, 1, 2] = torch.eye(3) * 2  # O = 2 halves it again
    x = torch.randn(1, 2, 3, 4, 5)
    torch.testing.assert_close(layer(x), F.squash(x[..., 1:, 2:], 2))


def test_dense_capsules_against_plain_torch():
    layer = nn.DenseCapsules(20, 6, 5, 7, iterations=2, bias=True)
    x = torch.randn(3, 20, 6)
    with torch.no_grad():
        layer.weight.normal_()
        expected = plain_routing(x, layer.weight, layer.bias, 2, False)
        torch.testing.assert_close(layer(x), expected)
        with nnarch.use_backend("reference"):
            torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("layer", [nn.DenseCapsules(20, 6, 5, 7), nn.ConvCapsules2d(3, 4, 5, 6, 3)])
def test_packed_weights_and_copies(layer):
    layer = copy.deepcopy(layer).eval()
    x = torch.randn(2, 20, 6) if layer.weight.dim() == 4 else torch.randn(2, 3, 4, 5, 5)
    with torch.no_grad():
        y = layer(x)
        assert layer._packed is not None
        assert torch.equal(layer(x), y)
        layer.weight.mul_(3)
        changed = layer(x)
        assert not torch.equal(changed, y)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert other._packed is None
            assert torch.equal(other(x), changed)
        assert torch.equal(layer.train()(x), changed)
    assert layer._packed is None
    assert set(layer.state_dict()) == {"weight"}


def test_primary_capsules_and_their_layouts():
    for layout in ("channels", "spatial"):
        layer = nn.PrimaryCapsules(3, 16, 8, 3, 2, layout=layout)
        x = torch.randn(2, 3, 9, 9)
        images = torch.nn.functional.conv2d(x, layer.conv2d.weight, layer.conv2d.bias, 2)
        if layout == "spatial":
            expected = plain_squash(images.contiguous().view(2, -1, 8))
        else:
            expected = torch.stack(
                [plain_squash(images[:, c : c + 8, i, j])
                 for i in range(4) for j in range(4) for c in (0, 8)], 1
            )  # fmt: skip
        y = layer(x)
        assert y.shape == (2, 32, 8)
        torch.testing.assert_close(y, expected)
        assert repr(layer).startswith("PrimaryCapsules(")
        channels_last = x.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(channels_last), expected)


def test_decoder_masks():
    decoder = nn.CapsuleDecoder(4, 3, (1, 5, 6), (7, 8))
    capsules = torch.randn(2, 4, 3)
    capsules[0, 2] *= 10
    capsules[1, 3] *= 10
    torch.testing.assert_close(decoder(capsules), decoder(capsules, torch.tensor([2, 3])))
    masked = mask_capsules(capsules, torch.tensor([1, 0]))
    assert torch.equal(masked[0, 1], capsules[0, 1])
    assert float(masked.count_nonzero()) == 6
    images = decoder(capsules, torch.tensor([1, 0]))
    assert images.shape == (2, 1, 5, 6)
    assert bool(((images > 0) & (images < 1)).all())
    names = [f"{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")]
    assert list(decoder.state_dict()) == names


def test_margin_loss():
    lengths = torch.tensor([[0.95, 0.05, 0.3], [0.2, 0.4, 0.1]])
    target = torch.tensor([0, 1])
    rows = torch.tensor([0.5 * 0.04, 0.25 + 0.5 * 0.01])
    torch.testing.assert_close(margin_loss(lengths, target, reduction="none"), rows)
    torch.testing.assert_close(margin_loss(lengths, target), rows.mean())
    one_hot = torch.nn.functional.one_hot(target, 3)
    torch.testing.assert_close(margin_loss(lengths, one_hot, reduction="sum"), rows.sum())
    both = torch.tensor([[1, 0, 1], [0, 0, 0]])
    expected = torch.tensor([0.36, 0.5 * 0.01 + 0.5 * 0.09])
    torch.testing.assert_close(margin_loss(lengths, both, reduction="none"), expected)


def test_reconstruction_and_their_sum():
    a, b = torch.rand(3, 1, 4, 5), torch.rand(3, 1, 4, 5)
    expected = 0.0005 * ((a - b) ** 2).sum() / 3
    torch.testing.assert_close(reconstruction_loss(a, b), expected)
    lengths, target = torch.rand(3, 10), torch.tensor([1, 2, 3])
    torch.testing.assert_close(
        CapsuleLoss()(lengths, target, a, b), margin_loss(lengths, target) + expected
    )


X5, W6 = torch.randn(2, 3, 4, 6, 7), torch.randn(5, 3, 3, 3, 6, 4)
BAD = [
    (lambda: nn.DenseCapsules(0, 8, 10, 16), "in_capsules must be a positive int, got 0"),
    (lambda: nn.DenseCapsules(4, 8, 10, 16, 0), "iterations must be a positive int, got 0"),
    (lambda: nn.PrimaryCapsules(3, 12, 8, 3), r"out_channels \(12\) must be a multiple of dim"),
    (lambda: nn.PrimaryCapsules(3, 16, 8, 3, layout="nchw"), "layout must be one of.*'nchw'"),
    (lambda: nn.ConvCapsules2d(3, 4, 5, 6, 0), "kernel_size must be at least 1, got 0"),
    (lambda: nn.PrimaryCapsules(3, 5, 8, 3, layout="spatial")(torch.randn(1, 3, 5, 5)),
     r"45 values of an image are no multiple of dim \(8\)"),
    (lambda: nn.PrimaryCapsules(3, 16, 8, 3, layout="spatial")(torch.randn(3, 9, 9)),
     r"input must be \[N, C, H, W\], got 3 dimensions"),
    (lambda: nn.CapsuleDecoder(4, 3, (1, 0, 5)), "height must be a positive int, got 0"),
    (lambda: nn.CapsuleDecoder(4, 3, (1, 5, 5))(torch.randn(2, 3, 4)), r"must be \[N, 4, 3\]"),
    (lambda: mask_capsules(torch.randn(3, 4, 3), torch.tensor([2])), r"target must be \[3\]"),
    (lambda: F.conv_capsule_routing2d(X5[0], W6), r"x must be \[N, C, D_in, H, W\]"),
    (lambda: F.conv_capsule_routing2d(X5, W6[..., :3]), "3 capsules of 4 values.*3 of 3"),
    (lambda: F.conv_capsule_routing2d(X5[..., :2], W6), "window of 3×3 is larger.*6×2"),
    (lambda: F.conv_capsule_routing2d(X5, W6, padding=-1), "padding must be at least 0, got -1"),
    (lambda: margin_loss(torch.rand(3), torch.tensor([1])), r"lengths must be \[N, classes\]"),
    (lambda: margin_loss(torch.rand(3, 2), torch.rand(2)), r"target must be \[N\] or"),
    (lambda: margin_loss(torch.rand(1, 2), torch.tensor([1]), reduction="x"), "reduction.*'x'"),
    (lambda: reconstruction_loss(torch.rand(3), torch.rand(2)), "must have the shape of images"),
    (lambda: reconstruction_loss(torch.rand(3), torch.rand(3)), r"images must be \[N, ...\]"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_classes_are_whole_numbers():
    for call in (
        lambda t: margin_loss(torch.rand(3, 4), t),
        lambda t: mask_capsules(torch.rand(3, 4, 2), t),
    ):
        with pytest.raises(TypeError, match=r"must be int64, got torch\.int32"):
            call(torch.tensor([0, 1, 2], dtype=torch.int32))


def test_the_reconstruction_of_large_images_in_half_types():
    a, b = torch.ones(2, 160_000), torch.zeros(2, 160_000)
    for dtype in (torch.float16, torch.bfloat16):
        loss = reconstruction_loss(a.to(dtype), b.to(dtype))
        assert loss.dtype == dtype and float(loss) == 80


def test_a_window_that_is_none():
    for stride in (1.5, (1, 2, 3), "same"):
        with pytest.raises(TypeError, match=r"stride must be an int or \(height, width\)"):
            F.conv_capsule_routing2d(X5, W6, stride)
