"""Upsampling modules: the constructors of torch.nn, our kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import functional as F
from nnarch.kernels.upsample.op import check_mode


class Upsample(torch.nn.Upsample):
    """``[N, C, H, W]`` of another size, nearest or bilinear; see torch.nn.Upsample.

    Raises:
        NotImplementedError: another mode.
    """

    def __init__(
        self,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
    ) -> None:
        check_mode("Upsample", mode)
        super().__init__(size, scale_factor, mode, align_corners, recompute_scale_factor)

    def forward(self, input: Tensor) -> Tensor:
        """Resize `input`."""
        return F.interpolate(
            input,
            self.size,
            self.scale_factor,
            self.mode,
            self.align_corners,
            self.recompute_scale_factor,
        )


class UpsamplingNearest2d(torch.nn.UpsamplingNearest2d):
    """``[N, C, H, W]`` of another size, every pixel a copy; see torch.nn.UpsamplingNearest2d."""

    def forward(self, input: Tensor) -> Tensor:
        """Resize `input`."""
        return F.interpolate(input, self.size, self.scale_factor, "nearest")


class UpsamplingBilinear2d(torch.nn.UpsamplingBilinear2d):
    """``[N, C, H, W]`` of another size with corners aligned; see torch.nn.UpsamplingBilinear2d."""

    def forward(self, input: Tensor) -> Tensor:
        """Resize `input`."""
        return F.interpolate(input, self.size, self.scale_factor, "bilinear", True)
