"""The depthwise-separable convolution as one module."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nnarch import functional as F
from nnarch.kernels.activation.kinds import Activation, encode
from nnarch.nn.conv import Conv2d, tile_after


def _parameters(convolution: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias; what is parametrized is no entry of _parameters."""
    parameters = convolution._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return convolution.weight, convolution.bias


class DepthwiseSeparableConv2d(torch.nn.Module):
    """A depthwise convolution and the 1×1 convolution after it, in one kernel.

    It has no twin in torch.nn: its two parts are :class:`Conv2d` modules, so its state_dict
    (``depthwise.weight``, ``depthwise.bias``, ``pointwise.weight``, ``pointwise.bias``) is that of
    such a pair, and it computes ``pointwise(depthwise(x))``, each with its activation.

    Args:
        in_channels, out_channels: channels of the input and the output.
        kernel_size: of the depthwise convolution; int or (height, width), in pixels.
        stride, dilation: of the depthwise convolution; int or (height, width).
        padding: of the depthwise convolution; int, (height, width), "same" or "valid".
        depth_multiplier: channels that the depthwise convolution makes of one.
        bias: whether each of the two adds a learned bias per channel.
        depthwise_activation, activation: after the depthwise and after the 1×1 convolution; None,
            a name that nnarch.functional.conv2d takes, or ("leaky_relu", slope).
        device, dtype: of the parameters.

    Raises:
        ValueError: an argument that torch.nn.Conv2d refuses, an unknown activation, or a dtype
            without kernels.

    Source: Howard et al., 2017, MobileNets; Chollet, 2017, Xception.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        depth_multiplier: int = 1,
        bias: bool = True,
        *,
        depthwise_activation: Activation = None,
        activation: Activation = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(depth_multiplier, int) or depth_multiplier < 1:
            raise ValueError(
                "DepthwiseSeparableConv2d: depth_multiplier must be a positive int, got "
                f"{depth_multiplier!r}"
            )
        for kind in (depthwise_activation, activation):
            encode(kind, "DepthwiseSeparableConv2d")
        wide = in_channels * depth_multiplier
        self.depthwise = Conv2d(
            in_channels, wide, kernel_size, stride, padding, dilation, in_channels, bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.pointwise = Conv2d(wide, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.depthwise_activation = depthwise_activation
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve ``input [N, C, H, W]`` (or ``[C, H, W]``), add `residual` of the output's shape
        before the activation."""
        # Past nn.Module.__getattr__, as in Conv2d.
        modules = self._modules
        depthwise: Any = modules["depthwise"]
        pointwise: Any = modules["pointwise"]
        depthwise_weight, depthwise_bias = _parameters(depthwise)
        pointwise_weight, pointwise_bias = _parameters(pointwise)
        padding = depthwise.padding
        return F.depthwise_separable_conv2d(
            input,
            depthwise_weight,
            pointwise_weight,
            stride=depthwise.stride,
            padding=padding + padding if isinstance(padding, tuple) else padding,
            dilation=depthwise.dilation,
            depthwise_shift=depthwise_bias,
            depthwise_activation=self.depthwise_activation,
            shift=pointwise_bias,
            residual=residual,
            activation=self.activation,
            depthwise_packed=depthwise._packed_weight(depthwise_weight, input),
            pointwise_packed=pointwise._packed_weight(
                pointwise_weight, input, functools.partial(tile_after, depthwise)
            ),
        )

    def extra_repr(self) -> str:
        """The activations, for repr()."""
        kinds = {
            "depthwise_activation": self.depthwise_activation,
            "activation": self.activation,
        }
        return ", ".join(f"{name}={kind}" for name, kind in kinds.items() if kind is not None)
