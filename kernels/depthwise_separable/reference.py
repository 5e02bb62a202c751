"""The definition of the depthwise-separable convolution, in plain torch: any dtype, any device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nnarch.kernels.conv2d import reference as conv2d_reference

_ONE, _NO_PADDING = (1, 1), (0, 0, 0, 0)


def depthwise_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    depthwise_packed: Tensor | None,
    pointwise_packed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    depthwise_activation: int,
    depthwise_alpha: float,
    activation: int,
    alpha: float,
) -> Tensor:
    """A filter per channel, then a product over channels, each with its epilogue."""
    z = conv2d_reference.conv2d(
        x, depthwise_weight, None, depthwise_scale, depthwise_shift, None, None,
        stride, padding, dilation, x.shape[1], depthwise_activation, depthwise_alpha,
    )  # fmt: skip
    return _pointwise(z, pointwise_weight, scale, shift, residual, activation, alpha)


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    expand_bias: Tensor | None,
    depthwise_bias: Tensor | None,
    project_bias: Tensor | None,
    residual: Tensor | None,
    expand_packed: Tensor | None,
    depthwise_packed: Tensor | None,
    project_packed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    expand_activation: int,
    expand_alpha: float,
    depthwise_activation: int,
    depthwise_alpha: float,
    activation: int,
    alpha: float,
) -> Tensor:
    """A depthwise-separable convolution of a product over channels."""
    wide = _pointwise(x, expand_weight, None, expand_bias, None, expand_activation, expand_alpha)
    return depthwise_separable_conv2d(
        wide, depthwise_weight, project_weight, None, depthwise_bias, None, project_bias, residual,
        None, None, stride, padding, dilation, depthwise_activation, depthwise_alpha, activation,
        alpha,
    )  # fmt: skip


def _pointwise(x, weight, scale, shift, residual, activation, alpha) -> Tensor:
    return conv2d_reference.conv2d(
        x, weight, None, scale, shift, residual, None,
        _ONE, _NO_PADDING, _ONE, 1, activation, alpha,
    )  # fmt: skip
