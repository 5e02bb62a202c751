"""MobileNetV2.

Source: Sandler, Howard, Zhu, Zhmoginov and Chen, 2018, MobileNetV2: Inverted Residuals and Linear
Bottlenecks.

Parameter names are torchvision's. `width_mult` scales every layer's channels (rounded to multiples
of eight) but the last one's, which below 1 stays at 1280.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import nnarch.nn
from nnarch.models.registry import register_model

# One row per stage, the paper's table 2: expansion t, output channels c, blocks n, first stride s.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def make_divisible(channels: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `channels`, but not below 90 % of it."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


def conv_bn_relu6(
    in_channels: int, out_channels: int, kernel_size: int, nn: ModuleType, **options: Any
) -> Module:
    """Convolution that keeps the size at stride 1, BatchNorm, ReLU6."""
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=False,
            **options,
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU6(inplace=True),
    )


class InvertedResidual(Module):
    """1x1 expansion, 3x3 depthwise, 1x1 projection without activation; adds its input where it can.

    Args:
        in_channels, out_channels: of the block.
        stride: 1 or 2, on the depthwise convolution.
        expansion: hidden channels per input channel; 1 leaves the expansion out.
        nn: the layer namespace.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, expansion: int, nn: ModuleType
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers = [] if expansion == 1 else [conv_bn_relu6(in_channels, hidden, 1, nn)]
        layers += [
            conv_bn_relu6(hidden, hidden, 3, nn, stride=stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        ]
        self.conv = nn.Sequential(*layers)
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x [N, C, H, W]``."""
        return x + self.conv(x) if self.adds_input else self.conv(x)


class MobileNetV2(Module):
    """MobileNetV2 for ImageNet-sized images.

    Args:
        num_classes: outputs.
        width_mult: factor on the channels; the paper has 0.35 to 1.4.
        round_nearest: channels become multiples of this.
        dropout: probability in front of the classifier.
        nn: the layer namespace.

    Raises:
        ValueError: `width_mult` is not positive.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        round_nearest: int = 8,
        dropout: float = 0.2,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        if width_mult <= 0:
            raise ValueError(f"MobileNetV2: width_mult must be positive, got {width_mult}")
        channels = make_divisible(32 * width_mult, round_nearest)
        last_channels = make_divisible(1280 * max(1.0, width_mult), round_nearest)
        features = [conv_bn_relu6(3, channels, 3, nn, stride=2)]
        for expansion, width, blocks, stride in STAGES:
            out_channels = make_divisible(width * width_mult, round_nearest)
            for step in [stride] + [1] * (blocks - 1):
                features.append(InvertedResidual(channels, out_channels, step, expansion, nn))
                channels = out_channels
        features.append(conv_bn_relu6(channels, last_channels, 1, nn))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(last_channels, num_classes))
        self._initialise(nn)

    def _initialise(self, nn: ModuleType) -> None:
        """He initialisation by fan-out; the classifier starts near zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of normalised images ``x [N, 3, H, W]``."""
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


_FACTS = {
    "paper": "Sandler et al., 2018, MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    "input_size": (3, 224, 224),
    "num_classes": 1000,
}
_TF_SLIM = {**_FACTS, "reference": "ImageNet, TensorFlow-Slim checkpoint"}


@register_model(
    **_FACTS,
    parameters=3_504_872,
    macs=300_774_272,
    top1=71.878,
    reference="ImageNet, torchvision IMAGENET1K_V1",
)
def mobilenet_v2(
    *, num_classes: int = 1000, nn: ModuleType = nnarch.nn, **options: Any
) -> MobileNetV2:
    """MobileNetV2 of width 1; `options` are those of :class:`MobileNetV2`."""
    return MobileNetV2(num_classes=num_classes, nn=nn, **options)


@register_model(**_FACTS, parameters=1_519_112, macs=37_201_312)
def mobilenet_v2_x0_25(
    *, num_classes: int = 1000, nn: ModuleType = nnarch.nn, **options: Any
) -> MobileNetV2:
    """MobileNetV2 of width 0.25; `options` are those of :class:`MobileNetV2`."""
    return MobileNetV2(num_classes=num_classes, width_mult=0.25, nn=nn, **options)


@register_model(**_TF_SLIM, parameters=1_968_680, macs=97_131_840, top1=65.4)
def mobilenet_v2_x0_5(
    *, num_classes: int = 1000, nn: ModuleType = nnarch.nn, **options: Any
) -> MobileNetV2:
    """MobileNetV2 of width 0.5; `options` are those of :class:`MobileNetV2`."""
    return MobileNetV2(num_classes=num_classes, width_mult=0.5, nn=nn, **options)


@register_model(**_TF_SLIM, parameters=2_636_424, macs=209_069_792, top1=69.8)
def mobilenet_v2_x0_75(
    *, num_classes: int = 1000, nn: ModuleType = nnarch.nn, **options: Any
) -> MobileNetV2:
    """MobileNetV2 of width 0.75; `options` are those of :class:`MobileNetV2`."""
    return MobileNetV2(num_classes=num_classes, width_mult=0.75, nn=nn, **options)


@register_model(**_TF_SLIM, parameters=6_108_776, macs=582_195_824, top1=75.0)
def mobilenet_v2_x1_4(
    *, num_classes: int = 1000, nn: ModuleType = nnarch.nn, **options: Any
) -> MobileNetV2:
    """MobileNetV2 of width 1.4; `options` are those of :class:`MobileNetV2`."""
    return MobileNetV2(num_classes=num_classes, width_mult=1.4, nn=nn, **options)
