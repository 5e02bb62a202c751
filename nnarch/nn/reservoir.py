"""A sparse recurrent layer with fixed random weights: the reservoir of echo-state networks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnarch import functional as F
from nnarch.kernels.reservoir.op import ACTIVATIONS
from nnarch.nn.reservoir_weights import input_weights, sparse_reservoir

Scaling = float | Sequence[float]


def in_own_precision(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let torch.autocast leave a method alone: a reservoir's state is in its own dtype, and what
    autocast has rounded comes back to that."""

    @functools.wraps(method)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return method(self, *args, **kwargs)
        buffer = next(self.buffers())

        def own(value: Any) -> Any:
            rounded = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
            return value.to(buffer.dtype) if rounded else value

        with torch.autocast(buffer.device.type, enabled=False):
            return method(self, *map(own, args), **{k: own(v) for k, v in kwargs.items()})

    return wrapper


class Reservoir(nn.Module):
    """A sparse recurrent layer with fixed random weights.

    ``s[t] = (1 - leak)·s[t-1] + leak·f(W·s[t-1] + w_in·x[t] + bias)``; everything is a buffer, and
    nothing is trained. Every neuron has the same number of incoming connections.

    Args:
        inputs: I, numbers a step; 0 is allowed where the network feeds back its output.
        units: N, neurons.
        connectivity: share of the N·N connections that exist, 0 < c <= 1.
        spectral_radius: largest absolute eigenvalue of W.
        leak: 0 < leak <= 1; 1 is a neuron without memory of its own.
        input_scaling: input weights are uniform in ±input_scaling; one number, or one an input.
        bias_scaling: biases are uniform in ±bias_scaling.
        activation: "tanh", "sigmoid", "relu" or None.
        seed: the same seed gives the same weights, on every machine.
        device, dtype: of the buffers.
    """

    values: Tensor
    columns: Tensor
    rows: Tensor
    w_in: Tensor
    bias: Tensor

    def __init__(
        self,
        inputs: int,
        units: int,
        *,
        connectivity: float = 0.01,
        spectral_radius: float = 0.9,
        leak: float = 1.0,
        input_scaling: Scaling = 1.0,
        bias_scaling: float = 0.0,
        activation: str | None = "tanh",
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 < leak <= 1:
            raise ValueError(f"Reservoir: leak must be above 0 and at most 1, got {leak}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"Reservoir: activation must be one of {list(ACTIVATIONS)}, got {activation!r}"
            )
        self.inputs, self.units = inputs, units
        self.connectivity, self.spectral_radius = connectivity, spectral_radius
        self.leak, self.activation, self.seed = float(leak), activation, seed
        generator = torch.Generator().manual_seed(seed)
        kind = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        values, columns, rows = sparse_reservoir(units, connectivity, spectral_radius, generator)
        self.register_buffer("values", values.to(**kind))
        self.register_buffer("columns", columns.to(device))
        self.register_buffer("rows", rows.to(device))
        self.register_buffer(
            "w_in", input_weights(units, inputs, input_scaling, generator).to(**kind)
        )
        self.register_buffer(
            "bias", input_weights(units, 1, bias_scaling, generator)[:, 0].to(**kind)
        )
        self._packed: tuple[Any, Any, Tensor] | None = None

    @property
    def matrix(self) -> tuple[Tensor, Tensor, Tensor]:
        """W as compressed rows: values, columns, row starts."""
        return self.values, self.columns, self.rows

    def packed(self) -> Tensor | None:
        """The matrix as the kernels read it, made once for the values that are there now."""
        if self.values.device.type not in ("cpu", "cuda") or torch.compiler.is_compiling():
            return None
        tensors = self.matrix
        state = [(t.data_ptr(), t._version) for t in tensors]
        # The tensors are kept, so that no later ones can have their addresses.
        known = self._packed
        if known is None or known[1] != state or not all(map(operator.is_, known[0], tensors)):
            self._packed = known = tensors, state, F.pack_reservoir(tensors)
        return known[2]

    @in_own_precision
    def forward(
        self, x: Tensor, state: Tensor | None = None, *, skip: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Run a sequence.

        Args:
            x: ``[T, B, I]``.
            state: ``[B, N]`` before the first step; zeros by default.
            skip: steps whose states are not kept.

        Returns:
            ``[T - skip, B, N]`` states, and ``[B, N]``, the last one.
        """
        w_in: Tensor | None = self.w_in
        bias: Tensor | None = self.bias
        if self.inputs > 32:  # a matrix product of its own pays
            x, w_in, bias = F.linear(x, self.w_in, self.bias), None, None
        return F.reservoir_scan(
            x, self.matrix, w_in, bias, state, leak=self.leak, activation=self.activation,
            skip=skip, packed=self.packed(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return (
            f"{self.inputs}, {self.units}, connectivity={self.connectivity}, "
            f"spectral_radius={self.spectral_radius}, leak={self.leak}, "
            f"activation={self.activation!r}, seed={self.seed}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_packed": None}
