"""Layer and RMS normalization modules."""

from __future__ import annotations

import torch
from torch import Tensor

from nnarch import functional as F
from nnarch.nn.checks import check_dtype


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalization, as torch.nn.LayerNorm, with a residual in the same pass.

    Args:
        normalized_shape: the last dimensions of the input, which are normalized together.
        eps: added to the (biased) variance before the square root.
        elementwise_affine: whether to learn a scale and, with `bias`, a shift.
        bias: see there.
        device, dtype: of the parameters.

    Source: Ba, Kiros and Hinton, 2016, Layer Normalization.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)  # type: ignore[arg-type]
        check_dtype("LayerNorm", dtype or torch.get_default_dtype())

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        return_sum: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalize ``s = dropout(input) + residual``; with `return_sum`, return (y, s).

        Args:
            input: ``[*, *normalized_shape]``.
            residual: of the input's shape.
            dropout_p: of the input's elements; pass 0 in evaluation.
            return_sum: whether to return s too.
        """
        parameters = self._parameters  # past nn.Module.__getattr__, as in Conv2d
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401
        return F.layer_norm(
            input,
            self.normalized_shape,
            weight,
            bias,
            self.eps,
            residual=residual,
            dropout_p=dropout_p,
            return_sum=return_sum,
        )


class RMSNorm(torch.nn.RMSNorm):
    """RMS normalization, as torch.nn.RMSNorm, with a residual in the same pass.

    Args:
        normalized_shape: the last dimensions of the input, which are normalized together.
        eps: added to the mean square before the square root; None: see functional.rms_norm.
        elementwise_affine: whether to learn a scale.
        device, dtype: of the parameter.

    Source: Zhang and Sennrich, 2019, Root Mean Square Layer Normalization.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)  # type: ignore[arg-type]
        check_dtype("RMSNorm", dtype or torch.get_default_dtype())

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        return_sum: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Normalize ``s = dropout(x) + residual``; with `return_sum`, return (y, s).

        Args:
            x: ``[*, *normalized_shape]``.
            residual, dropout_p, return_sum: see :meth:`LayerNorm.forward`.
        """
        parameters = self._parameters
        weight = parameters["weight"] if "weight" in parameters else self.weight  # noqa: SIM401
        return F.rms_norm(
            x,
            self.normalized_shape,
            weight,
            self.eps,
            residual=residual,
            dropout_p=dropout_p,
            return_sum=return_sum,
        )
