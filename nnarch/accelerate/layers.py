"""Layers that only a rewritten graph calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nnarch import functional as F
from nnarch.accelerate.fold import scale_and_shift
from nnarch.kernels.activation import kinds
from nnarch.kernels.normalization.op import affine
from nnarch.kernels.upsample.op import MODES
from nnarch.nn import FusedConv1d, FusedConv2d, FusedConvTranspose2d, FusedLinear, Upsample


class _ResidualConvolution(nn.Module):
    """``activation(conv(x) + residual)`` with the meaning of torch's add for every residual.

    The kernel takes a residual of the output's shape and dtype. Whether an addend is one is not in
    the graph; where it broadcasts, or promotes the dtype, the add runs by itself.

    Attributes:
        adds_in_place: whether the add was ``y += residual``, which does neither.
    """

    _convolve: Any
    _epilogue: Any
    adds_in_place = False

    def forward(self, input: Tensor, residual: Any = None) -> Tensor:
        """Convolve `input`, add `residual`, activate."""
        try:
            return self._convolve(input, residual, self._epilogue)
        except Exception:
            y = self._convolve(input)
            if _is_like(residual, y):
                raise
            return _activate(_add(y, residual, self.adds_in_place), self._epilogue)


class ResidualConv2d(_ResidualConvolution, FusedConv2d):
    """A convolution of images that takes over the add behind it."""


class ResidualConv1d(_ResidualConvolution, FusedConv1d):
    """A convolution of signals that takes over the add behind it."""


class ResidualConvTranspose2d(_ResidualConvolution, FusedConvTranspose2d):  # type: ignore[reportIncompatibleMethodOverride]
    """A transposed convolution, of the size that follows from its input, and an add."""


class ResidualLinear(FusedLinear):
    """``activation(linear(x) + residual)`` with the meaning of torch's add for every residual."""

    adds_in_place = False

    def forward(self, input: Tensor, residual: Any = None) -> Tensor:
        """Map ``input [..., in_features]``, add `residual`, activate."""
        try:
            return self._multiply(input, residual, self._epilogue)
        except Exception:
            y = self._multiply(input)
            if _is_like(residual, y):
                raise
            return _activate(_add(y, residual, self.adds_in_place), self._epilogue)


class ImageUpsample(Upsample):
    """nnarch.nn.Upsample for images, torch.nn.Upsample for what has no kernel."""

    def forward(self, input: Tensor) -> Tensor:
        """Resize `input`."""
        return interpolate(
            input,
            self.size,
            self.scale_factor,
            self.mode,
            self.align_corners,
            self.recompute_scale_factor,
        )


def interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """torch.nn.functional.interpolate; images, nearest and bilinear, by our kernel.

    Whether an input is an image is not in the graph: signals and volumes have other kernels.
    """
    ours = mode in MODES and not antialias and input.dim() == 4 and input.is_floating_point()
    resize: Any = F.interpolate if ours else nn.functional.interpolate
    return resize(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)


def max_pool2d_with_indices(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """torch.nn.functional.max_pool2d_with_indices, whatever its last argument says."""
    return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, True)


class FusedBatchNorm2d(nn.Module):
    """``activation(norm(x))`` in one pass over ``[N, C, H, W]``.

    Args:
        norm: BatchNorm2d with running statistics, which become one scale and one shift per channel.
        activation: a name that nnarch.functional.activation takes.
        alpha: slope of "leaky_relu"; other activations have no parameter.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d, activation: str, alpha: float = 0.0) -> None:
        super().__init__()
        for name, values in zip(("scale", "shift"), scale_and_shift(norm), strict=True):
            self.register_buffer(name, values.to(norm.running_var.dtype))  # type: ignore[union-attr]
        self.activation = activation
        pair = (activation, alpha) if activation == "leaky_relu" else activation
        self._code, self._alpha = kinds.encode(pair)

    def forward(self, input: Tensor) -> Tensor:
        """Scale, shift and activate."""
        return affine(input, self.scale, self.shift, None, self._code, self._alpha)

    def extra_repr(self) -> str:
        """The arguments, for repr()."""
        return f"{self.scale.numel()}, activation={self.activation}"


def _is_like(residual: Any, y: Tensor) -> bool:
    return isinstance(residual, Tensor) and residual.shape == y.shape and residual.dtype == y.dtype


def _add(y: Tensor, residual: Any, in_place: bool) -> Tensor:
    """Their sum; in place, it has the shape and the dtype of `y`."""
    return y.add_(residual) if in_place else y + residual


def _activate(y: Tensor, epilogue: str | tuple[str, float] | None) -> Tensor:
    if epilogue is None:
        return y
    kind, alpha = (epilogue, None) if isinstance(epilogue, str) else epilogue
    return F.activation(y, kind, alpha=alpha)
