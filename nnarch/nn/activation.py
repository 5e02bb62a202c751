"""Activations: torch.nn's on our elementwise kernel, and the classic ones torch.nn lacks.

PReLU, Softmax and everything else come from torch.nn as they are (see `nnarch.nn`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from nnarch import functional as F


class Sigmoid(torch.nn.Sigmoid):
    """Logistic function ``1 / (1 + exp(-x))``."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply elementwise."""
        return F.activation(input, "sigmoid")


class Tanh(torch.nn.Tanh):
    """Hyperbolic tangent."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply elementwise."""
        return F.activation(input, "tanh")


class GELU(torch.nn.GELU):
    """``x Φ(x)``, exact through erf or, with ``approximate="tanh"``, by the tanh formula.

    Raises:
        ValueError: `approximate` is neither "none" nor "tanh".

    Source: Hendrycks and Gimpel, 2016, Gaussian Error Linear Units.
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__(approximate)
        if approximate not in ("none", "tanh"):
            raise ValueError(f"GELU: approximate must be 'none' or 'tanh', got {approximate!r}")

    def forward(self, input: Tensor) -> Tensor:
        """Apply elementwise."""
        return F.activation(input, "gelu_tanh" if self.approximate == "tanh" else "gelu")


# With inplace=True the twins below overwrite their input, which our kernel never does: torch.nn's
# own forward then serves.


class ReLU(torch.nn.ReLU):
    """``max(x, 0)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply elementwise."""
        return super().forward(input) if self.inplace else F.activation(input, "relu")


class ReLU6(torch.nn.ReLU6):
    """``min(max(x, 0), 6)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply elementwise."""
        return super().forward(input) if self.inplace else F.activation(input, "relu6")


class LeakyReLU(torch.nn.LeakyReLU):
    """``x`` where positive, ``negative_slope * x`` elsewhere."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply elementwise."""
        if self.inplace:
            return super().forward(input)
        return F.activation(input, "leaky_relu", alpha=self.negative_slope)


class Hardswish(torch.nn.Hardswish):
    """``x * min(max(x + 3, 0), 6) / 6``.

    Source: Howard et al., 2019, Searching for MobileNetV3.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Apply elementwise."""
        return super().forward(input) if self.inplace else F.activation(input, "hardswish")


class Hardsigmoid(torch.nn.Hardsigmoid):
    """``min(max(x + 3, 0), 6) / 6``."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply elementwise."""
        return super().forward(input) if self.inplace else F.activation(input, "hardsigmoid")


class SiLU(torch.nn.SiLU):
    """``x * sigmoid(x)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply elementwise."""
        return super().forward(input) if self.inplace else F.activation(input, "silu")


class Step(Module):
    """Threshold unit: 1 where ``x > 0``, `value_at_zero` where ``x == 0``, 0 elsewhere.

    Its derivative is 0 wherever it exists, so no gradient flows: the perceptron learns by its own
    rule.

    Args:
        value_at_zero: output where ``x == 0``.

    Source: Rosenblatt, 1958, The Perceptron.
    """

    def __init__(self, value_at_zero: float = 0.0) -> None:
        super().__init__()
        self.value_at_zero = value_at_zero

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return torch.heaviside(x.detach(), x.new_tensor(self.value_at_zero))

    def extra_repr(self) -> str:
        """The arguments, for repr()."""
        return f"value_at_zero={self.value_at_zero}"


class LeCunTanh(Module):
    """Scaled hyperbolic tangent ``1.7159 tanh(2x/3)``, close to 1 at 1 and to -1 at -1.

    Source: LeCun, Bottou, Orr and Müller, 1998, Efficient BackProp.
    """

    amplitude = 1.7159
    slope = 2.0 / 3.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply elementwise."""
        return self.amplitude * F.activation(self.slope * x, "tanh")


class Maxout(Module):
    """Maximum over each group of `pieces` consecutive features.

    It maps ``[N, k * pieces, ...]`` to ``[N, k, ...]``. Behind a Linear or Conv2d with
    ``k * pieces`` outputs this is a maxout layer of k units.

    Args:
        pieces: linear pieces of each unit, at least 1.
        dim: the feature dimension.

    Raises:
        ValueError: `pieces` below 1, or (in forward) features that `pieces` does not divide.

    Source: Goodfellow et al., 2013, Maxout Networks.
    """

    def __init__(self, pieces: int = 2, dim: int = 1) -> None:
        super().__init__()
        if pieces < 1:
            raise ValueError(f"Maxout: pieces must be at least 1, got {pieces}")
        self.pieces = pieces
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Reduce the feature dimension of `x`."""
        features = x.shape[self.dim]
        if features % self.pieces:
            raise ValueError(
                f"Maxout: dimension {self.dim} of x must be a multiple of pieces={self.pieces}, "
                f"got {features}"
            )
        dim = self.dim % x.dim()
        return x.unflatten(dim, (features // self.pieces, self.pieces)).amax(dim + 1)

    def extra_repr(self) -> str:
        """The arguments, for repr()."""
        return f"pieces={self.pieces}, dim={self.dim}"
