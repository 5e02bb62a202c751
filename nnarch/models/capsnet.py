"""Capsule networks for small images.

Source: Sabour, Frosst and Hinton, 2017, Dynamic Routing Between Capsules.

Parameter names are those of XifengGuo's CapsNet-Pytorch (``conv1``, ``primarycaps.conv2d``,
``digitcaps.weight``, ``decoder.N``), and the defaults are what its checkpoints were trained with:
capsules cut from NCHW memory as it lies (``capsule_layout="spatial"``), and a gradient that takes
the routing as constant (``detach_routing=True``). The paper has "channels" and False.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import nnarch.nn
from nnarch.models.registry import register_model
from nnarch.nn.capsule import split_capsules, spread_capsules_


class PlainRouting:
    """What layer namespaces without capsules of their own get: the same modules in plain torch.

    Votes by one einsum, then a loop of softmax, weighted sum, squash and agreement, as most
    implementations have it.
    """

    class PrimaryCapsules(nnarch.nn.PrimaryCapsules):
        """Primary capsules with torch's convolution."""

        def forward(self, input: Tensor) -> Tensor:
            """Capsules ``[N, count, dim]`` of images ``[N, C, H, W]``."""
            conv = self.conv2d
            images = torch.nn.functional.conv2d(
                input, conv.weight, conv.bias, conv.stride, conv.padding
            )
            return plain_squash(split_capsules(images, self.dim, self.layout))

    class DenseCapsules(nnarch.nn.DenseCapsules):
        """Fully connected capsules."""

        def forward(self, input: Tensor) -> Tensor:
            """Capsules ``[N, O, D_out]`` of ``input [N, I, D_in]``."""
            return plain_routing(
                input, self.weight, self.bias, self.iterations, self.detach_routing
            )

    class ConvCapsules2d(nnarch.nn.ConvCapsules2d):
        """Convolutional capsules: every window by itself."""

        def forward(self, input: Tensor) -> Tensor:
            """Capsules ``[N, C_out, D_out, H', W']`` of ``input [N, C, D_in, H, W]``."""
            (kh, kw), (sh, sw), (ph, pw) = self.kernel_size, self.stride, self.padding
            padded = torch.nn.functional.pad(input, (pw, pw, ph, ph))
            windows = padded.unfold(3, kh, sh).unfold(4, kw, sw).permute(0, 3, 4, 1, 5, 6, 2)
            v = plain_routing(
                windows.flatten(3, 5).flatten(0, 2), self.weight.flatten(1, 3), self.bias,
                self.iterations, self.detach_routing,
            )  # fmt: skip
            return v.unflatten(0, windows.shape[:3]).permute(0, 3, 4, 1, 2)

    class CapsuleDecoder(nnarch.nn.CapsuleDecoder):
        """The decoder on torch's layers."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            for index in (0, 2, 4):
                ours: Any = self[index]
                self[index] = torch.nn.Linear(ours.in_features, ours.out_features)
            self[1], self[3], self[5] = torch.nn.ReLU(), torch.nn.ReLU(), torch.nn.Sigmoid()

    CapsuleLengths = nnarch.nn.CapsuleLengths


def plain_squash(s: Tensor, dim: int = -1) -> Tensor:
    """The squash in plain torch."""
    energy = (s * s).sum(dim, keepdim=True)
    return s * (energy.sqrt() / (1 + energy))


def plain_routing(
    x: Tensor, weight: Tensor, bias: Tensor | None, iterations: int, detach_routing: bool
) -> Tensor:
    """Dynamic routing in plain torch."""
    votes = torch.einsum("oidk,bik->boid", weight, x)
    constant = votes.detach() if detach_routing else votes
    logits = torch.zeros_like(votes[..., 0])
    for n in range(iterations):
        last = n == iterations - 1
        c = logits.softmax(1).unsqueeze(-1)
        s = (c * (votes if last else constant)).sum(2)
        v = plain_squash(s if bias is None else s + bias)
        if last:
            return v
        agreement = (constant * v.unsqueeze(2)).sum(-1)
        logits = logits + (agreement.detach() if detach_routing else agreement)
    raise ValueError(f"plain_routing: iterations must be at least 1, got {iterations}")


def capsule_layers(nn: ModuleType) -> Any:
    """Where the capsule layers for a layer namespace are."""
    return nn if hasattr(nn, "DenseCapsules") else PlainRouting


class CapsNet(Module):
    """CapsNet: a convolution, primary capsules, one capsule for each class, and a decoder.

    Args:
        num_classes: capsules of the last layer.
        image_size: (channels, height, width).
        width: factor on the convolutions' channels.
        iterations: of the routing.
        capsule_layout: "spatial" (XifengGuo's checkpoints) or "channels" (the paper): see
            nnarch.nn.PrimaryCapsules.
        detach_routing: whether the gradient takes the routing as constant.
        nn: the layer namespace; ``torch.nn`` gives the same network in plain torch.

    Raises:
        ValueError: images smaller than the two 9×9 windows, or a width of less than one capsule.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: tuple[int, int, int] = (1, 28, 28),
        width: float = 1.0,
        iterations: int = 3,
        capsule_layout: str = "spatial",
        detach_routing: bool = True,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        channels = round(256 * width / 8) * 8
        sizes = [(size - 8 - 9) // 2 + 1 for size in image_size[1:]]
        if channels < 8 or min(sizes) < 1:
            raise ValueError(
                f"CapsNet: expected a width of at least 1/32 and images of at least 17×17, got "
                f"{width} and {image_size}"
            )
        caps = capsule_layers(nn)
        self.conv1 = nn.Conv2d(image_size[0], channels, 9)
        self.relu = nn.ReLU()
        self.primarycaps = caps.PrimaryCapsules(channels, channels, 8, 9, 2, layout=capsule_layout)
        self.digitcaps = caps.DenseCapsules(
            channels * sizes[0] * sizes[1] // 8, 8, num_classes, 16, iterations,
            detach_routing=detach_routing,
        )  # fmt: skip
        self.decoder = caps.CapsuleDecoder(num_classes, 16, image_size)
        self.lengths = caps.CapsuleLengths()

    def capsules(self, x: Tensor) -> Tensor:
        """The class capsules ``[N, num_classes, 16]`` of images ``x [N, C, H, W]``."""
        return self.digitcaps(self.primarycaps(self.relu(self.conv1(x))))

    def reconstruct(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Lengths ``[N, num_classes]``, and images rebuilt from the capsule of `target` (or the
        longest)."""
        capsules = self.capsules(x)
        return self.lengths(capsules), self.decoder(capsules, target)

    def forward(self, x: Tensor) -> Tensor:
        """Lengths of the class capsules ``[N, num_classes]`` of images ``x [N, C, H, W]``."""
        return self.lengths(self.capsules(x))


class ConvCapsNet(Module):
    """A deeper capsule network: two layers of convolutional capsules before the class capsules.

    Args:
        num_classes: capsules of the last layer.
        image_size: (channels, height, width).
        types: capsules at a position of the primary and of the two convolutional layers.
        dims: values of those capsules.
        iterations: of every routing.
        detach_routing: whether the gradient takes the routing as constant.

    Source: the windows of Hinton, Sabour and Frosst, 2018, Matrix Capsules with EM Routing, with
    the dynamic routing of the paper above.
    """

    def __init__(
        self,
        *,
        num_classes: int = 10,
        image_size: tuple[int, int, int] = (1, 28, 28),
        types: tuple[int, int, int] = (8, 8, 16),
        dims: tuple[int, int, int] = (8, 8, 8),
        iterations: int = 3,
        detach_routing: bool = False,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        caps = capsule_layers(nn)
        options = {"iterations": iterations, "detach_routing": detach_routing}
        self.conv1 = nn.Conv2d(image_size[0], 64, 5, stride=2, padding=2)
        self.relu = nn.ReLU()
        self.primarycaps = nn.Conv2d(64, types[0] * dims[0], 1)
        self.convcaps1 = caps.ConvCapsules2d(types[0], dims[0], types[1], dims[1], 3, 2, **options)
        self.convcaps2 = caps.ConvCapsules2d(types[1], dims[1], types[2], dims[2], 3, 1, **options)
        size = [((n + 1) // 2 - 3) // 2 + 1 - 2 for n in image_size[1:]]
        if min(size) < 1:
            raise ValueError(f"ConvCapsNet: images of at least 13×13, got {image_size}")
        self.digitcaps = caps.DenseCapsules(
            types[2] * size[0] * size[1], dims[2], num_classes, 16, **options
        )
        # Short capsules vanish, squash after squash: every layer starts with lengths about a half.
        nn.init.kaiming_normal_(self.conv1.weight, nonlinearity="relu")
        spread_capsules_(self.digitcaps.weight)
        self.decoder = caps.CapsuleDecoder(num_classes, 16, image_size)
        self.lengths = caps.CapsuleLengths()
        self.first = (types[0], dims[0])
        self.squash: Any = plain_squash if caps is PlainRouting else nnarch.functional.squash

    def capsules(self, x: Tensor) -> Tensor:
        """The class capsules ``[N, num_classes, 16]`` of images ``x [N, C, H, W]``."""
        features = self.primarycaps(self.relu(self.conv1(x)))
        x = self.squash(features.unflatten(1, self.first), 2)
        x = self.convcaps2(self.convcaps1(x))
        return self.digitcaps(x.permute(0, 3, 4, 1, 2).flatten(1, 3))

    def reconstruct(self, x: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As :meth:`CapsNet.reconstruct`."""
        capsules = self.capsules(x)
        return self.lengths(capsules), self.decoder(capsules, target)

    def forward(self, x: Tensor) -> Tensor:
        """Lengths of the class capsules ``[N, num_classes]`` of images ``x [N, C, H, W]``."""
        return self.lengths(self.capsules(x))


_FACTS = {
    "paper": "Sabour, Frosst and Hinton, 2017, Dynamic Routing Between Capsules",
    "input_size": (1, 28, 28),
    "num_classes": 10,
}


@register_model(
    **_FACTS, parameters=8_215_568, macs=201_793_536, top1=99.75, reference="MNIST, paper"
)
def capsnet(*, num_classes: int = 10, nn: ModuleType = nnarch.nn, **options: Any) -> CapsNet:
    """CapsNet as in the paper; `options` are those of :class:`CapsNet`."""
    return CapsNet(num_classes=num_classes, nn=nn, **options)


@register_model(**_FACTS, parameters=2_117_072, macs=14_616_576)
def capsnet_x0_25(*, num_classes: int = 10, nn: ModuleType = nnarch.nn, **options: Any) -> CapsNet:
    """CapsNet with a quarter of the channels; `options` are those of :class:`CapsNet`."""
    return CapsNet(num_classes=num_classes, width=0.25, nn=nn, **options)


@register_model(**_FACTS, parameters=1_855_440, macs=5_722_368)
def conv_capsnet(
    *, num_classes: int = 10, nn: ModuleType = nnarch.nn, **options: Any
) -> ConvCapsNet:
    """A deeper network of convolutional capsules; `options` are those of :class:`ConvCapsNet`."""
    return ConvCapsNet(num_classes=num_classes, nn=nn, **options)
