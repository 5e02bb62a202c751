"""Pooling modules: the constructors of torch.nn, our kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnarch import functional as F


class MaxPool2d(torch.nn.MaxPool2d):
    """Maximum over windows of ``[N, C, H, W]``, overlapping ones too; see torch.nn.MaxPool2d."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Pool `input`; with ``return_indices`` also the flat positions of the maxima, int64."""
        return F.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
            self.return_indices,
        )


class AvgPool2d(torch.nn.AvgPool2d):
    """Average over windows of ``[N, C, H, W]``; see torch.nn.AvgPool2d."""

    def forward(self, input: Tensor) -> Tensor:
        """Pool `input`."""
        return F.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(torch.nn.AdaptiveAvgPool2d):
    """Average down to a given ``(height, width)``; see torch.nn.AdaptiveAvgPool2d."""

    def forward(self, input: Tensor) -> Tensor:
        """Pool `input` to ``output_size``; 1 is global pooling, None keeps the input's size."""
        return F.adaptive_avg_pool2d(input, self.output_size)


class AdaptiveMaxPool2d(torch.nn.AdaptiveMaxPool2d):
    """Maximum down to a given ``(height, width)``; see torch.nn.AdaptiveMaxPool2d."""

    def forward(self, input: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Pool `input` to ``output_size``; 1 is global pooling, None keeps the input's size."""
        return F.adaptive_max_pool2d(input, self.output_size, self.return_indices)


class MaxUnpool2d(torch.nn.MaxUnpool2d):
    """Maxima back where MaxPool2d found them, zeros elsewhere; see torch.nn.MaxUnpool2d."""

    def forward(
        self, input: Tensor, indices: Tensor, output_size: Sequence[int] | None = None
    ) -> Tensor:
        """Undo a pooling that returned `indices`."""
        return F.max_unpool2d(
            input, indices, self.kernel_size, self.stride, self.padding, output_size
        )
