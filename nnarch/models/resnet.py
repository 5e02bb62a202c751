"""Residual networks.

Source: He, Zhang, Ren and Sun, 2015, Deep Residual Learning for Image Recognition.

Two families: for 224x224 ImageNet photographs (18 to 152 layers) and for 32x32 CIFAR images (6n+2
layers). Parameter names are torchvision's. Two things differ between the paper and the checkpoints
that people hold, and are arguments here:

- Where a bottleneck strides. Torchvision's, known as "v1.5", stride on the 3x3 convolution and
  gain half a percent; the paper's stride on the first 1x1 (``stride_on_1x1=True``).
- What a shortcut does where shapes change. Option "A" subsamples and pads channels with zeros,
  "B" projects with a 1x1 convolution, "C" projects in every block. ImageNet checkpoints have B;
  the paper's CIFAR networks have A.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import nnarch.nn
from nnarch.models.registry import register_model
from nnarch.nn.joined import activated


class ZeroPadShortcut(Module):
    """Option A: subsample by `stride`, then append `extra` channels of zeros. No parameters."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra = extra
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Bring ``x [N, C, H, W]`` to the shape of the block's output."""
        x = x[:, :, :: self.stride, :: self.stride]
        return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self.extra))

    def extra_repr(self) -> str:
        """The arguments, for repr()."""
        return f"extra={self.extra}, stride={self.stride}"


def make_shortcut(
    option: str, in_channels: int, out_channels: int, stride: int, nn: ModuleType
) -> Module | None:
    """The shortcut of one block; None stands for the identity."""
    changes = stride != 1 or in_channels != out_channels
    if option == "A":
        return ZeroPadShortcut(out_channels - in_channels, stride) if changes else None
    if option == "B" and not changes:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(Module):
    """Two 3x3 convolutions and a shortcut: the block of ResNet-18, -34 and of the CIFAR family."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        shortcut: Module | None,
        *,
        stride_on_1x1: bool,  # nothing to stride on here; both blocks take the same arguments
        nn: ModuleType,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """``relu(F(x) + shortcut(x))``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = activated(self.bn1, self.relu, self.conv1(x))
        return activated(self.bn2, self.relu, self.conv2(y), shortcut)


class Bottleneck(Module):
    """1x1 reduce, 3x3, 1x1 expand by four: the block of ResNet-50, -101 and -152."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        shortcut: Module | None,
        *,
        stride_on_1x1: bool,
        nn: ModuleType,
    ) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_on_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, second, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """``relu(F(x) + shortcut(x))``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = activated(self.bn1, self.relu, self.conv1(x))
        y = activated(self.bn2, self.relu, self.conv2(y))
        return activated(self.bn3, self.relu, self.conv3(y), shortcut)


Block = type[BasicBlock] | type[Bottleneck]


def make_stage(
    block: Block,
    in_channels: int,
    width: int,
    blocks: int,
    stride: int,
    *,
    shortcut: str,
    stride_on_1x1: bool = False,
    nn: ModuleType,
) -> Module:
    """`blocks` blocks of one width; the first of them strides."""
    out_channels = width * block.expansion
    stage = []
    for step in [stride] + [1] * (blocks - 1):
        path = make_shortcut(shortcut, in_channels, out_channels, step, nn)
        stage.append(block(in_channels, width, step, path, stride_on_1x1=stride_on_1x1, nn=nn))
        in_channels = out_channels
    return nn.Sequential(*stage)


def initialise(model: Module, zero_init_residual: bool, nn: ModuleType) -> None:
    """He initialisation; BatchNorm starts as the identity, or as zero at a branch's end."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if zero_init_residual:  # Goyal et al., 2017: each block starts as the identity
        for module in model.modules():
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)


class ResNet(Module):
    """A residual network for ImageNet-sized images: 7x7 stem, max pool, four stages.

    Args:
        block: BasicBlock or Bottleneck.
        blocks: number of blocks in each of the four stages.
        num_classes: outputs.
        stride_on_1x1: bottlenecks stride on their first convolution (the paper) instead of the
            3x3 (torchvision).
        shortcut: "A", "B" or "C".
        zero_init_residual: start the last BatchNorm of each block at zero.
        nn: the layer namespace.

    Raises:
        ValueError: `shortcut` is not one of the three.
    """

    def __init__(
        self,
        block: Block,
        blocks: Sequence[int],
        *,
        num_classes: int = 1000,
        stride_on_1x1: bool = False,
        shortcut: str = "B",
        zero_init_residual: bool = False,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        _check_shortcut("ResNet", shortcut)
        stage = partial(make_stage, block, shortcut=shortcut, stride_on_1x1=stride_on_1x1, nn=nn)
        channels = [width * block.expansion for width in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = stage(64, 64, blocks[0], stride=1)
        self.layer2 = stage(channels[0], 128, blocks[1], stride=2)
        self.layer3 = stage(channels[1], 256, blocks[2], stride=2)
        self.layer4 = stage(channels[2], 512, blocks[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels[3], num_classes)
        initialise(self, zero_init_residual, nn)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of normalised images ``x [N, 3, H, W]``."""
        x = self.maxpool(activated(self.bn1, self.relu, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class CifarResNet(Module):
    """A residual network for 32x32 images: 3x3 stem, three stages of 16, 32 and 64 channels.

    Args:
        depth: number of weighted layers on the longest path, 6n + 2.
        num_classes: outputs.
        shortcut: "A", "B" or "C".
        zero_init_residual: start the last BatchNorm of each block at zero.
        nn: the layer namespace.

    Raises:
        ValueError: `depth` is not 6n + 2 with n at least 1, or `shortcut` not one of the three.
    """

    def __init__(
        self,
        depth: int,
        *,
        num_classes: int = 10,
        shortcut: str = "A",
        zero_init_residual: bool = False,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"CifarResNet: depth must be 6n + 2 with n >= 1, got {depth}")
        _check_shortcut("CifarResNet", shortcut)
        blocks = (depth - 2) // 6
        stage = partial(make_stage, BasicBlock, blocks=blocks, shortcut=shortcut, nn=nn)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = stage(16, 16, stride=1)
        self.layer2 = stage(16, 32, stride=2)
        self.layer3 = stage(32, 64, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(64, num_classes)
        initialise(self, zero_init_residual, nn)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of normalised images ``x [N, 3, H, W]``."""
        x = activated(self.bn1, self.relu, self.conv1(x))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _check_shortcut(model: str, shortcut: str) -> None:
    if shortcut not in ("A", "B", "C"):
        raise ValueError(f"{model}: shortcut must be 'A', 'B' or 'C', got {shortcut!r}")


_PAPER = "He, Zhang, Ren and Sun, 2015, Deep Residual Learning for Image Recognition"
_IMAGENET = {"paper": _PAPER, "input_size": (3, 224, 224), "num_classes": 1000}
_IMAGENET["reference"] = "ImageNet, torchvision IMAGENET1K_V1"
_CIFAR = {"paper": _PAPER, "input_size": (3, 32, 32), "num_classes": 10}
_CIFAR["reference"] = "CIFAR-10, paper"


@register_model(**_IMAGENET, parameters=11_689_512, macs=1_814_073_344, top1=69.758)
def resnet18(*, num_classes: int = 1000, nn: ModuleType = nnarch.nn, **options: Any) -> ResNet:
    """ResNet-18; `options` are those of :class:`ResNet`."""
    return ResNet(BasicBlock, (2, 2, 2, 2), num_classes=num_classes, nn=nn, **options)


@register_model(**_IMAGENET, parameters=21_797_672, macs=3_663_761_408, top1=73.314)
def resnet34(*, num_classes: int = 1000, nn: ModuleType = nnarch.nn, **options: Any) -> ResNet:
    """ResNet-34; `options` are those of :class:`ResNet`."""
    return ResNet(BasicBlock, (3, 4, 6, 3), num_classes=num_classes, nn=nn, **options)


@register_model(**_IMAGENET, parameters=25_557_032, macs=4_089_184_256, top1=76.130)
def resnet50(*, num_classes: int = 1000, nn: ModuleType = nnarch.nn, **options: Any) -> ResNet:
    """ResNet-50; `options` are those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 6, 3), num_classes=num_classes, nn=nn, **options)


@register_model(**_IMAGENET, parameters=44_549_160, macs=7_801_405_440, top1=77.374)
def resnet101(*, num_classes: int = 1000, nn: ModuleType = nnarch.nn, **options: Any) -> ResNet:
    """ResNet-101; `options` are those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 4, 23, 3), num_classes=num_classes, nn=nn, **options)


@register_model(**_IMAGENET, parameters=60_192_808, macs=11_513_626_624, top1=78.312)
def resnet152(*, num_classes: int = 1000, nn: ModuleType = nnarch.nn, **options: Any) -> ResNet:
    """ResNet-152; `options` are those of :class:`ResNet`."""
    return ResNet(Bottleneck, (3, 8, 36, 3), num_classes=num_classes, nn=nn, **options)


@register_model(**_CIFAR, parameters=269_722, macs=40_551_040, top1=91.25)
def cifar_resnet20(
    *, num_classes: int = 10, nn: ModuleType = nnarch.nn, **options: Any
) -> CifarResNet:
    """ResNet-20 for 32x32 images; `options` are those of :class:`CifarResNet`."""
    return CifarResNet(20, num_classes=num_classes, nn=nn, **options)


@register_model(**_CIFAR, parameters=464_154, macs=68_862_592, top1=92.49)
def cifar_resnet32(
    *, num_classes: int = 10, nn: ModuleType = nnarch.nn, **options: Any
) -> CifarResNet:
    """ResNet-32 for 32x32 images; `options` are those of :class:`CifarResNet`."""
    return CifarResNet(32, num_classes=num_classes, nn=nn, **options)


@register_model(**_CIFAR, parameters=658_586, macs=97_174_144, top1=92.83)
def cifar_resnet44(
    *, num_classes: int = 10, nn: ModuleType = nnarch.nn, **options: Any
) -> CifarResNet:
    """ResNet-44 for 32x32 images; `options` are those of :class:`CifarResNet`."""
    return CifarResNet(44, num_classes=num_classes, nn=nn, **options)


@register_model(**_CIFAR, parameters=853_018, macs=125_485_696, top1=93.03)
def cifar_resnet56(
    *, num_classes: int = 10, nn: ModuleType = nnarch.nn, **options: Any
) -> CifarResNet:
    """ResNet-56 for 32x32 images; `options` are those of :class:`CifarResNet`."""
    return CifarResNet(56, num_classes=num_classes, nn=nn, **options)


@register_model(**_CIFAR, parameters=1_727_962, macs=252_887_680, top1=93.57)
def cifar_resnet110(
    *, num_classes: int = 10, nn: ModuleType = nnarch.nn, **options: Any
) -> CifarResNet:
    """ResNet-110 for 32x32 images; `options` are those of :class:`CifarResNet`."""
    return CifarResNet(110, num_classes=num_classes, nn=nn, **options)


@register_model(**_CIFAR, parameters=19_421_274, macs=2_829_238_912, top1=92.07)
def cifar_resnet1202(
    *, num_classes: int = 10, nn: ModuleType = nnarch.nn, **options: Any
) -> CifarResNet:
    """ResNet-1202 for 32x32 images; `options` are those of :class:`CifarResNet`."""
    return CifarResNet(1202, num_classes=num_classes, nn=nn, **options)
