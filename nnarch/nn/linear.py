"""Fully connected modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import functional as F
from nnarch import library
from nnarch.kernels.activation.kinds import Activation
from nnarch.nn.checks import check_dtype
from nnarch.nn.packing import PackedWeightMixin
from nnarch.nn.signature import signature_of

_ROUNDED = (torch.float32, torch.bfloat16, torch.float16)  # by layout of a packed float32 weight


class Linear(PackedWeightMixin, torch.nn.Linear):
    """Affine map ``x W^T + b`` with the constructor and state_dict of torch.nn.Linear.

    Args:
        in_features, out_features: sizes of the last dimension of the input and the output.
        bias: whether to add a learned bias.
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.

    Raises:
        ValueError: a dtype without kernels.
    """

    @signature_of(torch.nn.Linear)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_dtype("Linear", self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Map the last dimension of ``input [..., in_features]``."""
        return self._multiply(input)

    def _multiply(
        self, x: Tensor, residual: Tensor | None = None, activation: Activation = None
    ) -> Tensor:
        # Past nn.Module.__getattr__, as in Conv2d.
        parameters = self._parameters
        weight = parameters.get("weight")
        if weight is None:
            weight = self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (lazy)
        return F.linear(
            x,
            weight,
            bias,
            residual=residual,
            activation=activation,
            packed=self._packed_weight(weight, x),
        )

    def _layout(self, weight: Tensor, x: Tensor | None) -> int:
        # Under autocast the weight is rounded, and packed for the kernels of what it then is.
        rounded = library.autocast_dtype(weight)
        return _ROUNDED.index(rounded) if rounded and weight.dtype == torch.float32 else 0

    def _pack(self, weight: Tensor, layout: int) -> Tensor | None:
        return F.pack_linear_weight(weight.to(_ROUNDED[layout]) if layout else weight)


class LazyLinear(torch.nn.LazyLinear):
    """A :class:`Linear` that takes ``in_features`` from its first input."""

    cls_to_become = Linear
