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
from nnarch.nn.linear import Linear


class FusedConv2d(Conv2d):
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

    def __init__(
        self, conv: torch.nn.Conv2d, activation: str | None = None, alpha: float = 0.0
    ) -> None:
        if not isinstance(conv, torch.nn.Conv2d):
            raise TypeError(f"FusedConv2d: conv must be a Conv2d, got {type(conv).__name__}")
        check_dtype("FusedConv2d", conv.weight.dtype)
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",  # the parameters come from conv: allocate and initialise nothing
        )
        _take_over(self, conv)
        self.activation = activation
        self.alpha = alpha
        self._epilogue = _epilogue("FusedConv2d", activation, alpha)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve ``input [N, C, H, W]``, add `residual` of the output's shape, activate."""
        return self._convolve(input, residual, self._epilogue)

    def extra_repr(self) -> str:
        """torch.nn.Conv2d's, with the activation."""
        return super().extra_repr() + _epilogue_repr(self.activation, self.alpha)


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
