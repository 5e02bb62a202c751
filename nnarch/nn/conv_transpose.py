"""Transposed convolution modules."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nnarch import functional as F
from nnarch.kernels.activation.kinds import Activation
from nnarch.nn.checks import check_dtype
from nnarch.nn.packing import PackedWeightMixin
from nnarch.nn.signature import signature_of
from nnarch.precision import get_precision


class ConvTranspose2d(PackedWeightMixin, torch.nn.ConvTranspose2d):
    """2-D transposed convolution with the constructor, parameters and state_dict of torch's.

    Args:
        in_channels, out_channels: channels of the input and the output.
        kernel_size: int or (height, width), in pixels.
        stride, dilation: int or (height, width).
        padding: int or (height, width): pixels taken off each side of the output.
        output_padding: int or (height, width), added at the bottom and right of the output.
        groups: divides both channel counts.
        bias: whether to add a learned bias per output channel.
        padding_mode: "zeros".
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.

    Raises:
        ValueError: an argument that torch.nn.ConvTranspose2d refuses, or a dtype without kernels.
    """

    @signature_of(torch.nn.ConvTranspose2d)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_dtype("ConvTranspose2d", self.weight.dtype)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve ``input [N, C, H, W]`` (or ``[C, H, W]``), to ``output_size`` where given."""
        return self._convolve(input, output_size=output_size)

    def _convolve(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        activation: Activation = None,
        output_size: list[int] | None = None,
    ) -> Tensor:
        extra = self.output_padding
        if output_size is not None:
            sizes: Any = (self.stride, self.padding, self.kernel_size, 2, self.dilation)
            extra = self._output_padding(x, output_size, *sizes)
        weight = self._parameters.get("weight")
        if weight is None:
            weight = self.weight
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias  # noqa: SIM401
        return F.conv_transpose2d(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            tuple(extra),
            self.groups,
            self.dilation,
            residual=residual,
            activation=activation,
            packed=self._packed_weight(weight, x),
        )

    def _layout(self, weight: Tensor, x: Tensor | None) -> int | None:
        """See nnarch.functional.conv_transpose2d_layout."""
        if x is None:
            return None
        if not isinstance(x, Tensor):
            return 0
        size = x.shape if x.dim() == 4 else (1, *x.shape)
        return transposed_layout(
            weight.shape, weight.dtype, size, self.stride, self.padding, self.output_padding,
            self.groups, self.dilation, get_precision(),
        )  # fmt: skip

    def _pack(self, weight: Tensor, layout: int) -> Tensor | None:
        return F.pack_conv_transpose2d_weight(
            weight, self.stride, self.groups, self.dilation, layout=layout
        )


@functools.lru_cache(maxsize=4096)
def transposed_layout(weight_size, dtype, input_size, *rest) -> int:
    """The layout for these sizes at this precision (the last of `rest`), asked once."""
    with _disable_current_modes():
        weight = torch.empty(1, dtype=dtype).expand(weight_size)
        try:
            return F.conv_transpose2d_layout(weight, input_size, *rest[:-1])
        except (ValueError, TypeError):
            return 0  # the operation itself will say what is wrong


class LazyConvTranspose2d(torch.nn.LazyConvTranspose2d):
    """A :class:`ConvTranspose2d` that takes ``in_channels`` from its first input."""

    cls_to_become = ConvTranspose2d
