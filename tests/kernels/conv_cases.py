"""The convolutions that the tests of conv2d share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import torch_epilogue
from torch import Tensor
from torch.nn import functional as TF

from nnarch import functional as F


@dataclass(frozen=True)
class Conv:
    """Sizes of one convolution; `padding` as conv2d takes it."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    def __str__(self) -> str:
        r, s = self.kernel
        text = f"{self.n}x{self.c}x{self.h}x{self.w}-k{self.k}-{r}x{s}"
        for short, value, usual in (
            ("s", self.stride, 1),
            ("p", self.padding, 0),
            ("d", self.dilation, 1),
            ("g", self.groups, 1),
        ):
            if value != usual:
                text += f"-{short}{value}".replace(" ", "")
        return text

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups

    def tensors(self, dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, Tensor]:
        """x, weight and bias, with outputs near 1."""
        x = torch.randn(self.n, self.c, self.h, self.w)
        weight = torch.randn(self.k, self.c // self.groups, *self.kernel)
        weight /= weight[0].numel() ** 0.5
        tensors = {"x": x.contiguous(memory_format=memory_format), "weight": weight}
        return {name: t.to(dtype) for name, t in tensors.items()} | {
            "bias": torch.randn(self.k).to(dtype)
        }

    @property
    def depth(self) -> int:
        """Products in an output's sum, or in an input gradient's, whichever has more."""
        return max(self.c, self.k) // self.groups * self.kernel[0] * self.kernel[1]

    def ours(self, **tensors: Any) -> Tensor:
        x, weight = tensors.pop("x"), tensors.pop("weight")
        return F.conv2d(x, weight, tensors.pop("bias", None), *self.geometry, **tensors)

    def theirs(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **epilogue: Any):
        padding = self.padding
        if isinstance(padding, tuple) and len(padding) == 4:
            top, left, bottom, right = padding
            x, padding = TF.pad(x, (left, right, top, bottom)), 0
        y = TF.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)
        names = ("scale", "shift", "residual", "activation")
        return torch_epilogue(y, *(epilogue.get(name) for name in names), dim=1)


# Tiles: 6 or 14 rows, 8 to 32 columns, blocks of 48 to 96 positions and of 256 columns, weight
# gradients in 256 positions, 192 output channels and 1024 columns, sums cut at a depth of 512 to
# 2048.
CASES = [
    # 1x1 as a matrix product
    Conv(1, 1, 1, 1, 1, (1, 1)),
    Conv(2, 16, 7, 7, 32, (1, 1)),
    Conv(1, 13, 5, 3, 17, (1, 1)),
    Conv(3, 31, 9, 11, 61, (1, 1)),
    Conv(1, 64, 14, 14, 300, (1, 1)),
    Conv(1, 1030, 3, 3, 9, (1, 1)),
    Conv(1, 2100, 2, 3, 33, (1, 1)),
    Conv(2, 24, 9, 8, 40, (1, 1), stride=2),
    Conv(2, 24, 9, 8, 40, (1, 1), padding=1),
    Conv(2, 12, 6, 6, 20, (1, 1), groups=4),
    # implicit GEMM
    Conv(1, 9, 4, 4, 1),
    Conv(2, 16, 8, 8, 16, padding=1),
    Conv(1, 17, 13, 11, 19, padding=1),
    Conv(2, 23, 10, 9, 29, stride=2, padding=1),
    Conv(1, 10, 12, 14, 13, stride=3, padding=2),
    Conv(1, 11, 14, 9, 12, stride=(3, 2), padding=(0, 2)),
    Conv(1, 12, 11, 11, 14, padding=2, dilation=2),
    Conv(1, 9, 15, 13, 10, stride=2, padding=3, dilation=(2, 3)),
    Conv(1, 130, 5, 5, 70, padding=1),
    Conv(1, 600, 4, 4, 20, padding=1),
    Conv(1, 9, 5, 5, 210, padding=1),
    Conv(1, 130, 40, 38, 200, stride=2, padding=1),
    Conv(1, 10, 30, 31, 12, padding=1),
    Conv(2, 18, 7, 7, 12, padding=1, groups=3),
    Conv(1, 32, 9, 9, 64, stride=2, padding=1, groups=2),
    Conv(1, 12, 8, 9, 16, padding="same"),
    Conv(1, 12, 8, 9, 16, (4, 2), padding="same", dilation=(1, 2)),
    Conv(1, 12, 8, 9, 16, padding="valid"),
    Conv(1, 11, 6, 8, 15, padding=(0, 1, 2, 3)),
    Conv(1, 11, 6, 8, 15, stride=2, padding=(3, 0, 1, 2)),
    Conv(1, 10, 3, 3, 8, padding=5),
    Conv(1, 9, 12, 12, 8, (2, 2), stride=2),
    Conv(1, 9, 12, 12, 8, (2, 2), stride=3),
    Conv(1, 10, 9, 9, 7, (1, 5), padding=(0, 2)),
    Conv(1, 10, 9, 9, 7, (5, 1), padding=(2, 0)),
    Conv(1, 9, 13, 13, 8, (7, 7), padding=3),
    Conv(1, 9, 16, 17, 8, (11, 9), stride=2, padding=5),
    Conv(1, 9, 3, 40, 8, (3, 3), padding=1),
    Conv(5, 9, 1, 1, 8, (3, 3), padding=1),
    # few input channels
    Conv(1, 3, 20, 22, 16, padding=1),
    Conv(2, 3, 33, 31, 17, (7, 7), stride=2, padding=3),
    Conv(1, 3, 35, 39, 24, (11, 11), stride=4, padding=2),
    Conv(1, 1, 28, 28, 6, (5, 5), padding=2),
    Conv(2, 1, 9, 9, 20, (2, 4)),
    Conv(1, 8, 10, 10, 9, padding=1),
    Conv(3, 4, 6, 7, 10, stride=2, padding=(1, 0, 0, 1)),
    Conv(1, 3, 16, 16, 12, (4, 4), stride=4),
    Conv(1, 3, 12, 12, 12, (2, 2), stride=4),
    Conv(1, 3, 12, 12, 12, padding=2, dilation=2),
    Conv(1, 3, 12, 12, 12, padding=2, dilation=(2, 1)),
    Conv(1, 2, 3, 3, 5, padding=4),
    Conv(1, 3, 60, 130, 8, padding=1),
    # narrow groups: several share a vector of 4, 8 or 16 channels
    Conv(2, 32, 9, 10, 32, padding=1, groups=8),
    Conv(1, 24, 7, 7, 24, padding=1, groups=6),
    Conv(2, 16, 15, 14, 16, stride=2, padding=1, groups=2),
    Conv(1, 32, 13, 28, 32, padding=1, groups=2),
    Conv(1, 12, 6, 5, 24, padding=(2, 0, 1, 3), groups=6),
    Conv(1, 20, 11, 12, 20, padding=2, dilation=2, groups=10),
    Conv(1, 16, 11, 9, 16, stride=(1, 2), padding=1, dilation=(2, 1), groups=4),
    Conv(1, 16, 12, 12, 16, stride=3, padding=2, dilation=2, groups=4),
    Conv(2, 16, 9, 8, 16, (5, 5), padding=2, groups=4),
    Conv(1, 16, 9, 8, 16, (5, 5), stride=2, padding=2, groups=4),
    Conv(1, 8, 12, 9, 8, (7, 4), padding=3, groups=2),
    Conv(2, 64, 5, 6, 64, (1, 1), groups=8),
    Conv(2, 8, 9, 9, 8, (1, 1), stride=2, groups=2),
    Conv(1, 40, 1, 1, 40, padding=1, groups=5),
    Conv(1, 8, 3, 3, 8, padding=5, groups=4),
    Conv(3, 8, 40, 3, 8, padding=1, groups=4),
    # depthwise, by way of conv2d
    Conv(2, 19, 9, 10, 19, padding=1, groups=19),
    Conv(1, 8, 12, 11, 16, (5, 5), stride=2, padding=2, groups=8),
]
EMPTY = [
    Conv(0, 16, 8, 8, 12, padding=1),
    Conv(0, 3, 8, 8, 12, padding=1),
    Conv(0, 16, 8, 8, 12, (1, 1)),
    Conv(0, 8, 8, 8, 8, padding=1, groups=8),
]
# A few of each algorithm for what is the same in all shapes.
CORE = [CASES[i] for i in (2, 5, 12, 15, 19, 22, 28, 39, 44, 51, 53)]
