"""Modules with an epilogue: residual add and activation run while the outputs are in registers.

`nnarch.accelerate` puts these in place of conv → BatchNorm → (add) → activation chains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch.kernels.activation.kinds import Activation, encode
from nnarch.nn.checks import check_dtype
from nnarch.nn.conv import Conv2d
from nnarch.nn.conv1d import Conv1d, ConvTranspose1d
from nnarch.nn.conv_transpose import ConvTranspose2d
from nnarch.nn.linear import Linear


class _FusedConvolution(torch.nn.Module):
    """What is common to convolutions with an epilogue; stands before their class."""

    _twin: Any  # the class of torch.nn

    def __init__(self, conv: Any, activation: str | None = None, alpha: float = 0.0) -> None:
        name, twin = type(self).__name__, self._twin
        if not isinstance(conv, twin):
            raise TypeError(f"{name}: conv must be a {twin.__name__}, got {type(conv).__name__}")
        check_dtype(name, conv.weight.dtype)
        options: dict[str, Any] = {
            "in_channels": conv.in_channels,
            "out_channels": conv.out_channels,
            "kernel_size": conv.kernel_size,
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
            "bias": conv.bias is not None,
            "padding_mode": conv.padding_mode,
            "device": "meta",  # the parameters come from conv: allocate and initialise nothing
        }
        if conv.transposed:
            options["output_padding"] = conv.output_padding
        super().__init__(**options)
        _take_over(self, conv)
        self.activation = activation
        self.alpha = alpha
        self._epilogue = _epilogue(name, activation, alpha)

    def extra_repr(self) -> str:
        """torch.nn's, with the activation."""
        return super().extra_repr() + _epilogue_repr(self.activation, self.alpha)


class FusedConv2d(_FusedConvolution, Conv2d):
    """``activation(conv(x) + residual)`` in one kernel.

    Args:
        conv: gives options and parameters. The parameters are shared, not copied. BatchNorm scale
            and shift belong folded into them.
        activation: None or a name that nnarch.functional.conv2d takes.
        alpha: slope of "leaky_relu"; other activations have no parameter.

    Raises:
        TypeError: `conv` is no Conv2d.
        ValueError: unknown activation, or a negative slope.
    """

    _twin = torch.nn.Conv2d

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve ``input [N, C, H, W]``, add `residual` of the output's shape, activate."""
        return self._convolve(input, residual, self._epilogue)


class FusedConv1d(_FusedConvolution, Conv1d):
    """``activation(conv(x) + residual)`` of signals; arguments as for :class:`FusedConv2d`."""

    _twin = torch.nn.Conv1d

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve ``input [N, C, L]``, add `residual` of the output's shape, activate."""
        return self._convolve(input, residual, self._epilogue)


class FusedConvTranspose2d(_FusedConvolution, ConvTranspose2d):
    """``activation(conv_transpose(x))`` in one kernel; arguments as for :class:`FusedConv2d`."""

    _twin = torch.nn.ConvTranspose2d

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve ``input [N, C, H, W]``, to ``output_size`` where given, and activate."""
        return self._convolve(input, None, self._epilogue, output_size)


class FusedConvTranspose1d(_FusedConvolution, ConvTranspose1d):
    """``activation(conv_transpose(x))`` of signals; arguments as for :class:`FusedConv2d`."""

    _twin = torch.nn.ConvTranspose1d

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve ``input [N, C, L]``, to ``output_size`` where given, and activate."""
        return self._convolve(input, None, self._epilogue, output_size)


class FusedLinear(Linear):
    """``activation(linear(x) + residual)`` in one kernel.

    Args:
        linear: gives options and parameters. The parameters are shared, not copied.
        activation: None or a name that nnarch.functional.linear takes.
        alpha: slope of "leaky_relu"; other activations have no parameter.

    Raises:
        TypeError: `linear` is no Linear.
        ValueError: unknown activation, or a negative slope.
    """

    def __init__(
        self, linear: torch.nn.Linear, activation: str | None = None, alpha: float = 0.0
    ) -> None:
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"FusedLinear: linear must be a Linear, got {type(linear).__name__}")
        check_dtype("FusedLinear", linear.weight.dtype)
        super().__init__(
            linear.in_features, linear.out_features, linear.bias is not None, device="meta"
        )
        _take_over(self, linear)
        self.activation = activation
        self.alpha = alpha
        self._epilogue = _epilogue("FusedLinear", activation, alpha)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map ``input [..., in_features]``, add `residual` of the output's shape, activate."""
        return self._multiply(input, residual, self._epilogue)

    def extra_repr(self) -> str:
        """torch.nn.Linear's, with the activation."""
        return super().extra_repr() + _epilogue_repr(self.activation, self.alpha)


def _take_over(module: Any, source: Any) -> None:
    module.weight = source.weight
    module.bias = source.bias
    module.training = source.training


def _epilogue(module: str, activation: str | None, alpha: float) -> Activation:
    """The checked value of `activation=` in nnarch.functional."""
    epilogue = (activation, alpha) if activation == "leaky_relu" else activation
    encode(epilogue, module)
    return epilogue


def _epilogue_repr(activation: str | None, alpha: float) -> str:
    if activation is None:
        return ""
    return f", activation={activation}" + (f", alpha={alpha}" if alpha else "")
