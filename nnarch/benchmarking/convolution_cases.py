"""The convolutions that are measured, of every kind; a part of :mod:`nnarch.benchmarking.cases`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from nnarch.benchmarking.case import Case, Target

BATCHES = (1, 8)


def conv(
    group: str,
    channels: int,
    filters: int,
    kernel: int,
    size: int,
    batch: int,
    *,
    stride: int = 1,
    groups: int = 1,
    **options: Any,
) -> Case:
    """A convolution of `channels` x `size` x `size` with bias, padded to keep the size."""
    depthwise = groups == channels > 1
    grouped = groups > 1 and not depthwise
    step = f"s{stride}" if stride > 1 else ""
    window = f"{kernel}×{kernel} {step}".strip()
    backward = options.get("backward", False)
    widths = f"{channels}" if depthwise and channels == filters else f"{channels}→{filters}"
    kind = "dw" if depthwise else "conv"
    return Case(
        name=f"{kind}{kernel}x{kernel}{step}_{channels}_{filters}"
        + f"_g{groups}" * grouped
        + f"_h{size}_n{batch}"
        + "_fb" * backward,
        group=group,
        layer=lambda nn: nn.Conv2d(
            channels, filters, kernel, stride=stride, padding=kernel // 2, groups=groups
        ),
        shape=(batch, channels, size, size),
        label="dw " * depthwise
        + f"{window} {widths}"
        + f" g{groups}" * grouped
        + f" @{size} N{batch}"
        + " fwd+bwd" * backward,
        **options,
    )


# (channels, filters, size): ResNet-50's bottlenecks, then MobileNet's pointwise layers.
_POINTWISE = (
    (64, 64, 56), (64, 256, 56), (256, 64, 56), (1024, 256, 14), (512, 2048, 7),
    (32, 64, 112), (64, 128, 56), (128, 256, 28), (256, 512, 14), (512, 1024, 7), (1024, 1024, 7),
)  # fmt: skip


def convolutions() -> Iterable[Case]:
    """Forward convolutions of ResNet, MobileNet, GoogLeNet and AlexNet."""
    small = Target(1.7, 2.6)  # 512 channels at 7x7: the weights outgrow the caches
    for n in BATCHES:
        for c, k, size in _POINTWISE:
            yield conv("conv1x1", c, k, 1, size, n, quick=(c, k, n) == (256, 64, 8))
        yield conv("conv1x1", 256, 512, 1, 56, n, stride=2)
        for c, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
            goal = small if c == 512 else None
            yield conv("conv3x3", c, c, 3, size, n, target=goal, quick=(c, n) == (64, 8))
        for c, k, size in ((64, 128, 56), (128, 128, 56), (256, 256, 28)):
            short = (c, n) == (64, 8)
            yield conv("conv3x3 stride 2", c, k, 3, size, n, stride=2, quick=short)
        yield conv("stem", 3, 64, 7, 224, n, stride=2, quick=n == 8)
        yield conv("stem", 3, 32, 3, 224, n, stride=2)
        for c, size in ((128, 56), (256, 28), (512, 14), (1024, 7)):  # ResNeXt
            yield conv("conv grouped", c, c, 3, size, n, groups=32)
        yield conv("conv grouped", 96, 256, 5, 27, n, groups=2)  # AlexNet
        yield conv("conv large kernel", 64, 192, 5, 27, n)
        yield conv("conv large kernel", 32, 96, 5, 28, n)
        yield conv("conv large kernel", 3, 64, 11, 224, n, stride=4)


def transposed(
    channels: int,
    filters: int,
    kernel: int,
    size: int,
    batch: int,
    *,
    stride: int = 2,
    padding: int = 1,
    extra: int = 0,
    **options: Any,
) -> Case:
    """A transposed convolution of `channels` x `size` x `size` with bias."""
    step = f"s{stride}" if stride > 1 else ""
    backward = options.get("backward", False)
    return Case(
        name=f"convt{kernel}x{kernel}{step}_{channels}_{filters}_h{size}_n{batch}"
        + "_fb" * backward,
        group="transposed conv" + " fwd+bwd" * backward,
        layer=lambda nn: nn.ConvTranspose2d(channels, filters, kernel, stride, padding, extra),
        shape=(batch, channels, size, size),
        label=f"transposed {kernel}×{kernel} {step} {channels}→{filters} @{size} N{batch}"
        + " fwd+bwd" * backward,
        **options,
    )


# (channels, filters, size): DCGAN's generator behind its first layer, and wider images.
_GENERATOR = ((512, 256, 4), (256, 128, 8), (128, 64, 16), (64, 3, 32))
_WIDER = ((512, 256, 16), (256, 128, 16), (128, 64, 32))


def transposed_convolutions() -> Iterable[Case]:
    """DCGAN's generator at batches that it samples and trains with, U-Net, decoders."""
    product = Target(1.1, 1.3)  # 2×2 stride 2: one tap an output, a matrix product like 1×1
    for n in (*BATCHES, 64):
        yield transposed(100, 512, 4, 1, n, stride=1, padding=0)
        for c, k, size in _GENERATOR:
            yield transposed(c, k, 4, size, n, quick=(c, n) == (256, 8))
    for n in BATCHES:
        for c, k, size in _WIDER:
            yield transposed(c, k, 4, size, n)
        yield transposed(128, 64, 2, 28, n, padding=0, target=product)
        yield transposed(64, 32, 3, 56, n, extra=1)


# (channels, filters, taps, stride, length): wav2vec2's first layers, others of speech and audio.
_SIGNALS = (
    (64, 64, 3, 1, 1000),
    (128, 128, 3, 1, 1000),
    (512, 512, 3, 1, 200),
    (512, 512, 3, 2, 800),
    (1, 64, 10, 5, 16000),
    (1, 512, 10, 5, 16000),
    (1, 258, 256, 64, 576),
)


def signals() -> Iterable[Case]:
    """Convolutions along one dimension: speech and audio layers, a spectrogram as convolution."""
    for c, k, taps, stride, length in _SIGNALS:
        for n in BATCHES:
            yield Case(
                f"conv1d{taps}_{c}_{k}_s{stride}_l{length}_n{n}",
                "conv1d",
                lambda nn, c=c, k=k, taps=taps, stride=stride: nn.Conv1d(
                    c, k, taps, stride, 0 if stride > 1 else taps // 2
                ),
                (n, c, length),
                label=f"conv1d {taps} s{stride} {c}→{k} L{length} N{n}",
            )


def depthwise(
    channels: int, size: int, batch: int, *, kernel: int = 3, multiplier: int = 1, **options: Any
) -> Case:
    """A depthwise convolution, each channel giving `multiplier` outputs."""
    group = options.pop("group", "depthwise")
    filters = channels * multiplier
    return conv(group, channels, filters, kernel, size, batch, groups=channels, **options)


def depthwise_convolutions() -> Iterable[Case]:
    """Depthwise layers of MobileNet (3x3), EfficientNet (5x5) and ConvNeXt (7x7)."""
    for n in BATCHES:
        yield depthwise(32, 112, n)
        yield depthwise(64, 112, n, stride=2)
        for c, size in ((128, 56), (256, 28), (512, 14), (1024, 7)):
            yield depthwise(c, size, n, quick=(c, n) == (128, 8))
        yield depthwise(120, 28, n, kernel=5)
        yield depthwise(96, 56, n, kernel=7)
        yield depthwise(64, 56, n, multiplier=2)


def separable(
    channels: int, filters: int, size: int, batch: int, *, stride: int = 1, **options: Any
) -> Case:
    """A block of MobileNet: depthwise 3×3 and 1×1, each with bias (a folded BatchNorm) and ReLU."""
    backward = options.get("backward", False)
    step = f"s{stride}" if stride > 1 else ""

    def layer(nn: Any) -> Any:
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels), nn.ReLU(),
            nn.Conv2d(channels, filters, 1), nn.ReLU(),
        )  # fmt: skip

    def ours(module: nn.Module) -> nn.Module:
        from nnarch.nn import DepthwiseSeparableConv2d

        fused = DepthwiseSeparableConv2d(
            channels, filters, 3, stride, 1, depthwise_activation="relu", activation="relu"
        )
        names = {"depthwise": "0", "pointwise": "2"}
        state = module.state_dict()
        fused.load_state_dict(
            {n: state[f"{names[part]}.{kind}"]
             for n in fused.state_dict() for part, kind in [n.split(".")]}
        )  # fmt: skip
        return fused.train(module.training)

    return Case(
        f"separable{step}_{channels}_{filters}_h{size}_n{batch}" + "_fb" * backward,
        "separable fwd+bwd" if backward else "separable",
        layer,
        (batch, channels, size, size),
        label=f"separable {step} {channels}→{filters} @{size} N{batch}".replace("  ", " ")
        + " fwd+bwd" * backward,
        ours=ours,
        **options,
    )


def separable_convolutions() -> Iterable[Case]:
    """MobileNet's blocks."""
    for n in BATCHES:
        yield separable(32, 64, 112, n)
        yield separable(64, 128, 112, n, stride=2)
        for c, size in ((128, 56), (256, 28), (512, 14), (1024, 7)):
            yield separable(c, c, size, n, quick=(c, n) == (256, 8))


def training_convolutions() -> Iterable[Case]:
    """Convolutions forward and backward, with the gradients of input, weight and bias."""
    for n in BATCHES:
        for c, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
            yield conv("conv3x3 fwd+bwd", c, c, 3, size, n, backward=True, quick=(c, n) == (64, 8))
        for c, k, size in ((256, 64, 56), (1024, 256, 14)):
            yield conv("conv1x1 fwd+bwd", c, k, 1, size, n, backward=True)
        for c, size in ((128, 56), (512, 14)):
            yield depthwise(c, size, n, group="depthwise fwd+bwd", backward=True)
            yield separable(c, c, size, n, backward=True)
    for n in (8, 64):
        for c, k, size in _GENERATOR:
            yield transposed(c, k, 4, size, n, backward=True)
