"""The transposed convolutions that the tests of conv_transpose2d share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import torch_epilogue
from torch import Tensor
from torch.nn import functional as TF

from nnarch import functional as F


@dataclass(frozen=True)
class Transposed:
    """Sizes of one transposed convolution; numbers as conv_transpose2d takes them."""

    n: int
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: Any = 1
    padding: Any = 0
    extra: Any = 0  # output_padding
    groups: int = 1
    dilation: Any = 1

    def __str__(self) -> str:
        r, s = self.kernel
        text = f"{self.n}x{self.c}x{self.h}x{self.w}-k{self.k}-{r}x{s}"
        for short, value, usual in (
            ("s", self.stride, 1),
            ("p", self.padding, 0),
            ("o", self.extra, 0),
            ("g", self.groups, 1),
            ("d", self.dilation, 1),
        ):
            if value != usual:
                text += f"-{short}{value}".replace(" ", "")
        return text

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.extra, self.groups, self.dilation

    def tensors(self, dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, Tensor]:
        """x, weight and bias, with outputs near 1."""
        x = torch.randn(self.n, self.c, self.h, self.w)
        weight = torch.randn(self.c, self.k // self.groups, *self.kernel)
        weight /= (self.c // self.groups * self.kernel[0] * self.kernel[1]) ** 0.5
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
        return F.conv_transpose2d(x, weight, tensors.pop("bias", None), *self.geometry, **tensors)

    def theirs(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **epilogue: Any):
        y = TF.conv_transpose2d(x, weight, bias, *self.geometry)
        names = ("scale", "shift", "residual", "activation")
        return torch_epilogue(y, *(epilogue.get(name) for name in names), dim=1)

    def layout(self, weight: Tensor) -> int:
        return F.conv_transpose2d_layout(weight, (self.n, self.c, self.h, self.w), *self.geometry)

    def packed(self, weight: Tensor, layout: int | None = None) -> Tensor | None:
        """The weight packed for this case, or with another layout."""
        layout = self.layout(weight) if layout is None else layout
        return F.pack_conv_transpose2d_weight(
            weight, self.stride, self.groups, self.dilation, layout=layout
        )


CASES = [
    # phases
    Transposed(1, 17, 4, 4, 19, (4, 4), 2, 1),
    Transposed(2, 33, 5, 7, 37, (4, 4), 2, 1),
    Transposed(2, 18, 7, 5, 20, (2, 2), 2),
    Transposed(1, 20, 9, 8, 33, (3, 3), 2, 1, 1),
    Transposed(2, 18, 6, 7, 35, (5, 5), 2, 2, 1),
    Transposed(1, 19, 5, 4, 23, (6, 6), 2, 2),
    Transposed(1, 12, 5, 6, 18, (3, 5), (2, 3), (1, 2), (1, 0), 2, (1, 2)),
    Transposed(1, 18, 5, 5, 20, (2, 2), 3),
    Transposed(1, 18, 5, 5, 20, (2, 2), 3, 0, 2),
    Transposed(2, 17, 6, 5, 18, (1, 1), 2, 0, 1),
    Transposed(2, 17, 6, 5, 18, (1, 1)),
    Transposed(1, 130, 3, 3, 70, (4, 4), 2, 1),
    Transposed(1, 600, 2, 3, 20, (4, 4), 2, 1),
    Transposed(1, 17, 13, 1, 18, (4, 4), 2, 1),
    # stride 1, and dilation
    Transposed(1, 17, 7, 6, 19, padding=1),
    Transposed(2, 17, 7, 6, 19, (2, 3)),
    Transposed(1, 17, 5, 5, 18, (3, 3), 1, 2, 1, 1, 2),
    Transposed(2, 17, 3, 4, 18, (3, 3), 2, 1, 2, 1, 3),  # more output padding than stride
    Transposed(1, 17, 4, 4, 18, (2, 2), 1, 0, 2, 1, 3),
    Transposed(1, 17, 4, 5, 18, (3, 2), 2, 0, (3, 1), 1, 4),
    Transposed(1, 17, 3, 3, 18, (3, 3), 2, 2),  # all but the middle is padding
    # groups
    Transposed(2, 18, 5, 6, 12, (4, 4), 2, 1, 0, 3),
    Transposed(1, 32, 5, 5, 34, (3, 3), 2, 1, 1, 2),
    # one output channel a group: the depthwise kernels
    Transposed(2, 11, 6, 5, 11, (3, 3), 2, 1, 1, 11),
    Transposed(2, 12, 5, 5, 6, (4, 4), 2, 1, 0, 6),
    Transposed(1, 6, 4, 4, 6, (3, 3), 2, 1, 2, 6, 3),
    # an input of one pixel
    Transposed(1, 25, 1, 1, 35, (4, 4)),
    Transposed(5, 25, 1, 1, 35, (4, 3), 2),
    Transposed(3, 12, 1, 1, 34, (3, 3), 1, 0, 0, 2),
    Transposed(17, 7, 1, 1, 300, (2, 2), 2),
    Transposed(2, 17, 1, 1, 18, (4, 4), 2, 1),  # with padding: phases
    # few output channels
    Transposed(2, 18, 9, 7, 3, (4, 4), 2, 1),
    Transposed(1, 40, 30, 33, 3, (4, 4), 2, 1),
    Transposed(2, 9, 6, 5, 2, (5, 5), 2, 2, 1),
    Transposed(3, 13, 7, 9, 1, (4, 4), 2, 1),
    Transposed(1, 9, 6, 5, 2, (3, 3), 1, 0, 0, 1, 2),
    Transposed(1, 9, 6, 5, 2, (3, 3), (2, 1), 1, (0, 2), 1, (1, 3)),
    Transposed(1, 5, 70, 60, 3, (7, 7), 2, 3, 1),
    Transposed(1, 3, 4, 5, 4, (2, 2), 2),
    Transposed(2, 4, 1, 1, 3, (4, 4)),
    Transposed(1, 1, 1, 1, 1, (1, 1)),
    Transposed(1, 1, 2, 2, 1, (3, 3), 2, 2, 1),
]
EMPTY = [
    Transposed(0, 16, 8, 8, 18, (4, 4), 2, 1),
    Transposed(0, 16, 8, 8, 3, (4, 4), 2, 1),
    Transposed(0, 16, 1, 1, 20, (4, 4)),
    Transposed(0, 8, 8, 8, 8, padding=1, groups=8),
]
# A few of each algorithm for what is the same in all shapes.
CORE = [CASES[i] for i in (1, 3, 6, 17, 21, 23, 27, 28, 31, 36)]

# 2×2 phases large enough for Winograd, edges that no tile divides.
WINOGRAD = [
    Transposed(4, 64, 8, 8, 64, (4, 4), 2, 1),
    Transposed(1, 40, 17, 14, 33, (4, 4), 2, 1),
    Transposed(2, 70, 9, 13, 48, (3, 3), 2, 1, 1),
    Transposed(2, 36, 12, 11, 40, (4, 4), 2, 1, 0, 2),
    Transposed(1, 34, 11, 10, 33, (5, 5), 2, 2, 1),
    Transposed(1, 34, 10, 13, 20, (6, 6), 2, 2),
    Transposed(2, 33, 12, 14, 35, (2, 2)),
    Transposed(1, 33, 12, 14, 35, (6, 6), 3, 2, 2),
]
