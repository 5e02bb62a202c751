"""Convolution modules along one dimension: a signal is an image of one row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import functional as F
from nnarch.kernels.activation.kinds import Activation
from nnarch.nn.checks import check_dtype
from nnarch.nn.conv import chosen_tile, may_transform
from nnarch.nn.conv_transpose import transposed_layout
from nnarch.nn.packing import PackedWeightMixin
from nnarch.nn.signature import signature_of
from nnarch.precision import get_precision


class Conv1d(PackedWeightMixin, torch.nn.Conv1d):
    """1-D convolution with the constructor, parameters and state_dict of torch.nn.Conv1d.

    Args:
        in_channels, out_channels: channels of the input and the output.
        kernel_size, stride, dilation: int, in samples.
        padding: int, "same" or "valid".
        groups: divides both channel counts; ``groups == in_channels`` is a depthwise convolution.
        bias: whether to add a learned bias per output channel.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.

    Raises:
        ValueError: an argument that torch.nn.Conv1d refuses, or a dtype without kernels.
    """

    @signature_of(torch.nn.Conv1d)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_dtype("Conv1d", self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input [N, C, L]`` (or ``[C, L]``)."""
        return self._convolve(input)

    def _convolve(
        self, x: Tensor, residual: Tensor | None = None, activation: Activation = None
    ) -> Tensor:
        # Past nn.Module.__getattr__, as in Conv2d.
        parameters, padding = self._parameters, self.padding
        weight = parameters.get("weight")
        if weight is None:
            weight = self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (lazy)
        if self.padding_mode != "zeros":
            pads = self._reversed_padding_repeated_twice
            x = torch.nn.functional.pad(x, pads, mode=self.padding_mode)
            padding = 0
        return F.conv1d(
            x,
            weight,
            bias,
            self.stride,
            padding,  # type: ignore[arg-type]
            self.dilation,
            self.groups,
            residual=residual,
            activation=activation,
            packed=self._packed_weight(weight, x),
        )

    def _layout(self, weight: Tensor, x: Tensor | None) -> int | None:
        """Winograd's tile, or 0, as in Conv2d."""
        if not may_transform((1, *self.kernel_size), (1, *self.stride), weight):
            return 0
        if x is None:
            return None
        if not isinstance(x, Tensor) or x.dim() not in (2, 3):
            return 0  # the convolution itself will say what is wrong
        n, c, length = x.shape if x.dim() == 3 else (1, *x.shape)
        padding: Any = 0
        if self.padding_mode == "zeros":
            padding = self.padding if isinstance(self.padding, str) else (0, *self.padding)
        geometry = (1, *self.stride), padding, (1, *self.dilation), self.groups
        size, kernel = (n, c, 1, length), (*weight.shape[:2], 1, weight.shape[2])
        return chosen_tile(kernel, weight.dtype, size, geometry, get_precision())

    def _pack(self, weight: Tensor, layout: int) -> Tensor | None:
        return F.pack_conv2d_weight(weight.unsqueeze(2), self.groups, tile=layout)


class ConvTranspose1d(PackedWeightMixin, torch.nn.ConvTranspose1d):
    """1-D transposed convolution with the constructor, parameters and state_dict of torch's.

    Args:
        in_channels, out_channels: channels of the input and the output.
        kernel_size, stride, dilation: int, in samples.
        padding: samples taken off each end of the output.
        output_padding: samples added at its end.
        groups: divides both channel counts.
        bias: whether to add a learned bias per output channel.
        padding_mode: "zeros".
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.

    Raises:
        ValueError: an argument that torch.nn.ConvTranspose1d refuses, or a dtype without kernels.
    """

    @signature_of(torch.nn.ConvTranspose1d)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_dtype("ConvTranspose1d", self.weight.dtype)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve ``input [N, C, L]`` (or ``[C, L]``), to ``output_size`` where given."""
        return self._convolve(input, output_size=output_size)

    def _convolve(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        activation: Activation = None,
        output_size: list[int] | None = None,
    ) -> Tensor:
        extra: Any = self.output_padding
        if output_size is not None:
            extra = self._output_padding(
                x,
                output_size,
                self.stride,  # type: ignore[arg-type]
                self.padding,  # type: ignore[arg-type]
                self.kernel_size,  # type: ignore[arg-type]
                1,
                self.dilation,  # type: ignore[arg-type]
            )
        return F.conv_transpose1d(
            x,
            self.weight,
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]
            extra,
            self.groups,
            self.dilation,
            residual=residual,
            activation=activation,
            packed=self._packed_weight(self.weight, x),
        )

    def _layout(self, weight: Tensor, x: Tensor | None) -> int | None:
        """See nnarch.functional.conv_transpose2d_layout."""
        if x is None:
            return None
        if not isinstance(x, Tensor) or x.dim() not in (2, 3) or weight.dim() != 3:
            return 0
        n, c, length = x.shape if x.dim() == 3 else (1, *x.shape)
        c_in, k, taps = weight.shape
        padding: Any = self.padding
        return transposed_layout(
            (c_in, k, 1, taps), weight.dtype, (n, c, 1, length), (1, *self.stride), (0, *padding),
            (0, *self.output_padding), self.groups, (1, *self.dilation), get_precision(),
        )  # fmt: skip

    def _pack(self, weight: Tensor, layout: int) -> Tensor | None:
        return F.pack_conv_transpose2d_weight(
            weight.unsqueeze(2), (1, *self.stride), self.groups, (1, *self.dilation), layout=layout
        )


class LazyConv1d(torch.nn.LazyConv1d):
    """A :class:`Conv1d` that takes ``in_channels`` from its first input."""

    cls_to_become = Conv1d


class LazyConvTranspose1d(torch.nn.LazyConvTranspose1d):
    """A :class:`ConvTranspose1d` that takes ``in_channels`` from its first input."""

    cls_to_become = ConvTranspose1d
