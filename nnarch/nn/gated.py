"""Gated feed-forward modules: SwiGLU, GEGLU, ReGLU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import functional as F
from nnarch.kernels.activation.kinds import encode
from nnarch.nn.linear import Linear
from nnarch.nn.packing import PackedWeightMixin


class GatedLinear(PackedWeightMixin, torch.nn.Module):
    """``activation(gate_proj(x)) * up_proj(x)``, both projections in one kernel.

    The parameters are those of two Linear modules, under the names that Llama-type checkpoints
    have: ``gate_proj.weight``, ``up_proj.weight`` and, with a bias, theirs.

    Args:
        in_features, out_features: sizes of the last dimension of the input and the output.
        bias: whether both projections add a learned bias.
        activation: of the gate: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU), "relu" (ReGLU),
            "sigmoid" (GLU), None (bilinear).
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.

    Raises:
        ValueError: an unknown activation, or a dtype without kernels.

    Source: Shazeer, 2020, GLU Variants Improve Transformer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = "silu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        encode(activation, type(self).__name__)
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = Linear(in_features, out_features, **options)
        self.up_proj = Linear(in_features, out_features, **options)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Map the last dimension of ``input [..., in_features]``."""
        return self._gated(input)

    def _gated(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        return F.gated_linear(
            x,
            gate.weight,
            up.weight,
            gate.bias,
            up.bias,
            activation=self.activation,
            packed=self._packed_pair(x),
        )

    def _packed_pair(self, x: Tensor | None) -> Tensor | None:
        weights = (self.gate_proj.weight, self.up_proj.weight)
        cache = self._packed_weights(weights, (x,))
        return None if cache is None else cache.get(0, F.pack_gated_linear_weights, *weights)

    def _pack_now(self) -> None:
        self._packed_pair(None)

    def extra_repr(self) -> str:
        """The activation, for repr()."""
        return f"activation={self.activation}"


class GatedFeedForward(GatedLinear):
    """``down_proj(activation(gate_proj(x)) * up_proj(x))``, as in Llama and T5 1.1.

    Args:
        d_model: size of the last dimension of input and output.
        hidden_features: size between the projections.
        bias, activation, device, dtype: as for :class:`GatedLinear`.

    Raises:
        ValueError: an unknown activation, or a dtype without kernels.

    Source: Shazeer, 2020, GLU Variants Improve Transformer.
    """

    def __init__(
        self,
        d_model: int,
        hidden_features: int,
        bias: bool = False,
        activation: str | None = "silu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(d_model, hidden_features, bias, activation, device, dtype)
        options: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.down_proj = Linear(hidden_features, d_model, **options)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``input [..., d_model]``."""
        return self.down_proj(self._gated(input))
