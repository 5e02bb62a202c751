"""Convolution modules."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nnarch import functional as F
from nnarch.kernels.activation.kinds import Activation
from nnarch.kernels.conv2d.geometry import output_size, padding_of
from nnarch.nn.checks import check_dtype
from nnarch.nn.packing import PackedWeightMixin
from nnarch.nn.signature import signature_of
from nnarch.precision import get_precision

# Of kernels (vertical, horizontal): see nnarch.functional.conv2d_tile.
_TILE_STRIDES = {
    (1, 1): ((1, 1), (2, 2)),
    (3, 3): ((1, 1), (2, 2)),
    (5, 5): ((1, 1),),
    (1, 3): ((1, 1), (1, 2)),
    (3, 1): ((1, 1), (2, 1)),
}


class Conv2d(PackedWeightMixin, torch.nn.Conv2d):
    """2-D convolution with the constructor, parameters and state_dict of torch.nn.Conv2d.

    Args:
        in_channels, out_channels: channels of the input and the output.
        kernel_size: int or (height, width), in pixels.
        stride, dilation: int or (height, width).
        padding: int, (height, width), "same" or "valid".
        groups: divides both channel counts; ``groups == in_channels`` is a depthwise convolution.
        bias: whether to add a learned bias per output channel.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.

    Raises:
        ValueError: an argument that torch.nn.Conv2d refuses, or a dtype without kernels.
    """

    @signature_of(torch.nn.Conv2d)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_dtype("Conv2d", self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input [N, C, H, W]`` (or ``[C, H, W]``)."""
        return self._convolve(input)

    def _convolve(
        self, x: Tensor, residual: Tensor | None = None, activation: Activation = None
    ) -> Tensor:
        # Past nn.Module.__getattr__, which costs more than the rest of this function. What is
        # parametrized is no entry of _parameters.
        parameters, padding = self._parameters, self.padding
        weight = parameters.get("weight")
        if weight is None:
            weight = self.weight
        if isinstance(padding, tuple):
            padding += padding  # (vertical, horizontal) at the top and left, bottom and right
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (lazy)
        if self.padding_mode != "zeros":
            pads = self._reversed_padding_repeated_twice
            x = torch.nn.functional.pad(x, pads, mode=self.padding_mode)
            padding = 0
        return F.conv2d(
            x,
            weight,
            bias,
            self.stride,
            padding,
            self.dilation,
            self.groups,
            residual=residual,
            activation=activation,
            packed=self._packed_weight(weight, x),
        )

    def _layout(self, weight: Tensor, x: Tensor | None) -> int | None:
        """The tile, or 0: see nnarch.functional.conv2d_tile."""
        if not may_transform(self.kernel_size, self.stride, weight):
            return 0
        if x is None:
            return None
        if not isinstance(x, Tensor):
            return 0
        size = x.shape if x.dim() == 4 else (1, *x.shape)
        padding = self.padding if self.padding_mode == "zeros" else 0
        geometry = self.stride, padding, self.dilation, self.groups
        return chosen_tile(weight.shape, weight.dtype, size, geometry, get_precision())

    def _pack(self, weight: Tensor, layout: int) -> Tensor | None:
        return F.pack_conv2d_weight(weight, self.groups, tile=layout)


def may_transform(kernel_size, stride, weight: Tensor) -> bool:
    """Whether Winograd's or Strassen's algorithm may serve the convolution, for some input."""
    strides = _TILE_STRIDES.get(kernel_size)
    if strides is None or stride not in strides:
        return False
    return _halves(weight) if kernel_size == (1, 1) else weight.shape[1] > 1


def _halves(weight: Tensor) -> bool:
    """Whether a 1×1 weight has the channels that Strassen's product needs at least."""
    return weight.shape[0] % 32 == weight.shape[1] % 32 == 0


@functools.lru_cache(maxsize=4096)
def chosen_tile(weight_size, dtype, input_size, geometry, precision) -> int:
    """The tile for these sizes at this precision, asked once."""
    with _disable_current_modes():  # who records operations should not see this one
        weight = torch.empty(1, dtype=dtype).expand(weight_size)
        try:
            return F.conv2d_tile(weight, input_size, *geometry)
        except (ValueError, TypeError):
            return 0  # the convolution itself will say what is wrong


def tile_after(depthwise: torch.nn.Conv2d, weight: Tensor, x: Any) -> int:
    """The tile for a 1×1 convolution with `weight` of what `depthwise` makes of `x`."""
    if not (_halves(weight) and isinstance(x, Tensor) and x.dim() == 4):
        return 0
    geometry = depthwise.stride, depthwise.padding, depthwise.dilation
    size = depthwise.out_channels, 1, *depthwise.kernel_size
    return _tile_after(weight.shape, weight.dtype, x.shape, size, geometry, get_precision())


@functools.lru_cache(maxsize=4096)
def _tile_after(weight_size, dtype, input_size, depthwise_size, geometry, precision) -> int:
    with _disable_current_modes():
        try:
            stride, padding, dilation = geometry
            depthwise = torch.empty(1).expand(depthwise_size)
            pads = padding_of(padding, depthwise, stride, dilation)
            size = output_size(input_size, depthwise_size, stride, pads, dilation)
        except (ValueError, TypeError):
            return 0  # the operation will say what is wrong, here and below
    if min(size) < 0:
        return 0
    return chosen_tile(weight_size, dtype, size, (1, 0, 1, 1), precision)


class LazyConv2d(torch.nn.LazyConv2d):
    """A :class:`Conv2d` that takes ``in_channels`` from its first input."""

    cls_to_become = Conv2d
