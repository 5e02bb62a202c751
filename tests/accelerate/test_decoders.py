"""Decoders: transposed convolution, upsampling and unpooling become ours, and stay one program."""

from __future__ import annotations

import pickle

import pytest
import torch
from accelerate_helpers import calls, in_float64, randomize
from torch import nn
from torch.nn import functional as F

import nnarch
from nnarch.accelerate.program import Program


def check(model, *args, rtol=1e-4, atol=1e-5):
    """Outputs as the model's, twice (by the graph, by its program); what the graph calls."""
    accelerated = nnarch.accelerate(randomize(model))
    expected = in_float64(model, *args)
    for _ in range(2):
        got = accelerated(*args)
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)
        assert got.stride() == model(*args).stride()
    return accelerated, calls(accelerated)


def has_program(accelerated) -> bool:
    return all(isinstance(p, Program) for p in accelerated._programs.values()) and bool(
        accelerated._programs
    )


def generator(width=8):
    """DCGAN's."""
    layers = []
    for i, (c, k) in enumerate(((10, 4 * width), (4 * width, 2 * width), (2 * width, width))):
        layers += [
            nn.ConvTranspose2d(c, k, 4, 2 if i else 1, 1 if i else 0, bias=False),
            nn.BatchNorm2d(k),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())


def test_generator():
    accelerated, counts = check(generator(), torch.randn(2, 10, 1, 1))
    assert counts == {"FusedConvTranspose2d": 4}
    assert has_program(accelerated)


class UNet(nn.Module):
    """One level down and up, and both ways of going up."""

    def __init__(self, up):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())
        self.up = up
        self.out = nn.Conv2d(24, 4, 3, padding=1)

    def forward(self, x):
        skip = self.down(x)
        deep = self.deep(F.max_pool2d(skip, 2))
        up = self.up(deep, skip)
        return self.out(torch.cat([skip, up], 1))


class Up(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, deep, skip):
        return self.layers(deep)


class UpFunction(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, deep, skip):
        return F.interpolate(deep, size=skip.shape[2:], **self.options)


class UpToSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.ConvTranspose2d(16, 16, 3, 2, 1)

    def forward(self, deep, skip):
        return torch.relu(self.conv(deep, output_size=skip.shape[2:]))


UPS = {
    "Upsample": (lambda: Up(nn.Upsample(scale_factor=2)), "ImageUpsample"),
    "bilinear": (
        lambda: Up(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
        "ImageUpsample",
    ),
    "UpsamplingNearest2d": (lambda: Up(nn.UpsamplingNearest2d(scale_factor=2)), "ImageUpsample"),
    "UpsamplingBilinear2d": (lambda: Up(nn.UpsamplingBilinear2d(scale_factor=2)), "ImageUpsample"),
    "transposed": (
        lambda: Up(nn.ConvTranspose2d(16, 16, 2, 2), nn.BatchNorm2d(16), nn.LeakyReLU(0.1)),
        "FusedConvTranspose2d",
    ),
    "groups": (
        lambda: Up(nn.ConvTranspose2d(16, 16, 2, 2, groups=4), nn.BatchNorm2d(16)),
        "ConvTranspose2d",
    ),
    "output_size": (UpToSize, "FusedConvTranspose2d"),
    "interpolate": (lambda: UpFunction(mode="bilinear", align_corners=False), "interpolate"),
    "nearest": (lambda: UpFunction(mode="nearest"), "interpolate"),
}


@pytest.mark.parametrize("name", UPS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_unet(name, memory_format):
    make, layer = UPS[name]
    x = torch.randn(2, 3, 12, 8).to(memory_format=memory_format)
    accelerated, counts = check(UNet(make()), x)
    assert counts[layer] == 1
    assert counts["channels_last"] == 0  # what is made on the way up stays channels_last
    assert has_program(accelerated)
    with nnarch.trace() as trace:
        y = accelerated(x)
    assert {e.backend for e in trace} == {"cpu"}
    assert torch.equal(pickle.loads(pickle.dumps(accelerated))(x), y)


class SegNet(nn.Module):
    def __init__(self, as_layer):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.unpool = nn.MaxUnpool2d(2)
        self.decoder = nn.Conv2d(8, 4, 3, padding=1)
        self.as_layer = as_layer

    def forward(self, x):
        if self.as_layer:
            x, indices = self.pool(self.encoder(x))
            return self.decoder(self.unpool(self.middle(x), indices))
        x, indices = F.max_pool2d(self.encoder(x), 2, return_indices=True)
        return self.decoder(F.max_unpool2d(self.middle(x), indices, [2, 2]))


@pytest.mark.parametrize("as_layer", [True, False], ids=["layers", "functions"])
def test_segnet(as_layer):
    accelerated, counts = check(SegNet(as_layer), torch.randn(2, 3, 8, 12))
    assert counts["MaxUnpool2d" if as_layer else "max_unpool2d"] == 1
    assert counts["channels_last"] == 0
    assert has_program(accelerated)
    with nnarch.trace() as trace:
        accelerated(torch.randn(2, 3, 8, 12))
    assert {"max_pool2d", "max_unpool2d"} <= {e.op for e in trace}


def test_a_program_checks_indices():
    """It calls the kernel without the operation's own checks."""

    class Unpool(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.conv(x)
            return F.max_unpool2d(y, (x[:, :1] * torch.ones(4, 1, 1)).long(), 2)

    accelerated = nnarch.accelerate(Unpool().eval())
    x = torch.arange(8.0).reshape(1, 1, 2, 4).expand(1, 3, 2, 4).contiguous()
    accelerated(x)
    with pytest.raises(ValueError, match="max_unpool2d: indices"):
        accelerated(x * 1000)


def test_local_response_norm():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.LocalResponseNorm(5), nn.Conv2d(8, 4, 1)
    )
    accelerated, counts = check(model, torch.randn(2, 3, 9, 9))
    assert counts == {"FusedConv2d": 1, "LocalResponseNorm": 1, "Conv2d": 1}
    assert has_program(accelerated)

    class Function(nn.Module):
        def forward(self, x):
            return F.local_response_norm(x, size=3, beta=0.5)

    with nnarch.trace() as trace:
        check(nn.Sequential(Function()), torch.randn(2, 6, 5, 5))
    assert "local_response_norm" in {e.op for e in trace}


def test_residual_behind_a_transposed_convolution():
    class Link(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Conv2d(4, 8, 3, 2, 1)
            self.up = nn.ConvTranspose2d(8, 4, 4, 2, 1)

        def forward(self, x):
            return torch.relu(x + self.up(self.down(x)))

    _, counts = check(Link(), torch.randn(2, 4, 8, 8))
    assert counts == {"Conv2d": 1, "ResidualConvTranspose2d": 1}

    class ToSize(Link):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(8, 4, 3, 2, 1)

        def forward(self, x):
            return x + self.up(self.down(x), x.shape[2:])

    _, counts = check(ToSize(), torch.randn(2, 4, 7, 7))
    assert counts["ConvTranspose2d"] == 1 and counts["add"] == 1


class Audio(nn.Module):
    """Signals: the first layers of wav2vec2, a residual, and a way back up."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(1, 16, 10, 5, bias=False), nn.BatchNorm1d(16), nn.GELU()
        )
        self.block = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.ReLU())
        self.same = nn.Conv1d(16, 16, 3, padding=1)
        self.up = nn.Sequential(nn.ConvTranspose1d(16, 4, 4, 2, 1), nn.BatchNorm1d(4), nn.Tanh())

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.same(self.block(x)) + x)
        return self.up(F.interpolate(x, scale_factor=2.0))


def test_signals():
    accelerated, counts = check(Audio(), torch.randn(2, 1, 100))
    assert counts == {
        "FusedConv1d": 2,
        "ResidualConv1d": 1,
        "interpolate": 1,
        "FusedConvTranspose1d": 1,
    }
    assert has_program(accelerated)


@pytest.mark.parametrize("size", [(2, 4, 9), (2, 4, 3, 4, 5)], ids=["signal", "volume"])
def test_upsampling_of_other_ranks(size):
    check(nn.Sequential(nn.Upsample(scale_factor=2)), torch.randn(size))


def test_upsampling_of_other_modes():
    _, counts = check(
        nn.Sequential(nn.Upsample(scale_factor=2, mode="bicubic")), torch.randn(1, 2, 5, 5)
    )
    assert counts == {"ImageUpsample": 1}


FUNCTIONS = {
    "conv1d": lambda x, w: F.conv1d(x[:, :, 0], w[:, :, 0], padding=1),
    "conv_transpose1d": lambda x, w: F.conv_transpose1d(x[:, :, 0], w[:, :, 0], stride=2),
    "conv_transpose2d": lambda x, w: F.conv_transpose2d(x, w, None, 2, 1),
    "keyword": lambda x, w: F.conv_transpose2d(x, weight=w, stride=2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))

        def forward(self, x):
            return FUNCTIONS[name](x, self.weight)

    with nnarch.trace() as trace:
        check(Call(), torch.randn(2, 4, 6, 6))
    assert trace


def test_folded_transposed_convolutions_with_groups():
    for rank, norm in (("1d", nn.BatchNorm1d), ("2d", nn.BatchNorm2d), ("3d", nn.BatchNorm3d)):
        conv = getattr(nn, f"ConvTranspose{rank}")(6, 9, 3, groups=3)
        _, counts = check(nn.Sequential(conv, norm(9)), torch.randn(2, 6, *[4] * int(rank[0])))
        assert counts == {f"ConvTranspose{rank}": 1}
