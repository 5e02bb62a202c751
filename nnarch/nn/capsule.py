"""Capsule modules: primary, fully connected and convolutional capsules, and the decoder."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from nnarch import functional as F
from nnarch.kernels.capsule_routing.windows import capsule_window
from nnarch.nn.activation import ReLU, Sigmoid
from nnarch.nn.checks import check_dtype
from nnarch.nn.conv import Conv2d
from nnarch.nn.linear import Linear
from nnarch.nn.packing import PackedWeightMixin

LAYOUTS = ("channels", "spatial")


def _positive(module: str, **sizes: Any) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise ValueError(f"{module}: {name} must be a positive int, got {size!r}")


class PrimaryCapsules(torch.nn.Module):
    """A convolution whose output is cut into capsules, and their squash.

    Args:
        in_channels, out_channels: of the convolution; out_channels is a multiple of `dim`.
        dim: values of a capsule.
        kernel_size, stride, padding: of the convolution, as torch.nn.Conv2d has them.
        layout: which values make a capsule. "channels" is the paper's: `dim` neighbouring channels
            at one position; capsules are numbered position by position. "spatial" is what
            ``view(N, -1, dim)`` of NCHW memory gives (XifengGuo's CapsNet-Pytorch and its
            checkpoints): `dim` neighbouring positions of one channel.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown layout, channels that `dim` does not divide, or an argument that
            torch.nn.Conv2d refuses.

    Source: Sabour, Frosst and Hinton, 2017, Dynamic Routing Between Capsules.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dim: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        *,
        layout: str = "channels",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _positive("PrimaryCapsules", dim=dim)
        if layout not in LAYOUTS:
            raise ValueError(f"PrimaryCapsules: layout must be one of {LAYOUTS}, got {layout!r}")
        if layout == "channels" and out_channels % dim:
            raise ValueError(
                f"PrimaryCapsules: out_channels ({out_channels}) must be a multiple of dim ({dim})"
            )
        self.dim = dim
        self.layout = layout
        self.conv2d = Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, device=device, dtype=dtype
        )

    def forward(self, input: Tensor) -> Tensor:
        """Capsules ``[N, count, dim]`` of images ``[N, C, H, W]``."""
        return F.squash(split_capsules(self.conv2d(input), self.dim, self.layout))

    def extra_repr(self) -> str:
        """Size and layout, for repr()."""
        return f"dim={self.dim}, layout={self.layout!r}"


def split_capsules(images: Tensor, dim: int, layout: str) -> Tensor:
    """Capsules ``[N, count, dim]`` of ``[N, C, H, W]``: see :class:`PrimaryCapsules`."""
    if images.dim() != 4:
        raise ValueError(
            f"PrimaryCapsules: input must be [N, C, H, W], got {images.dim()} dimensions"
        )
    if layout == "channels":
        images = images.permute(0, 2, 3, 1)
    values = math.prod(images.shape[1:])
    if values % dim:
        raise ValueError(
            f"PrimaryCapsules: {values} values of an image are no multiple of dim ({dim})"
        )
    return images.reshape(images.shape[0], values // dim, dim)


class DenseCapsules(PackedWeightMixin, torch.nn.Module):
    """Capsules that all capsules before them vote for, with dynamic routing.

    Args:
        in_capsules, in_dim: how many capsules come in, and the values of each.
        out_capsules, out_dim: the same of the output.
        iterations: of the routing; the paper has 3.
        bias: whether a learned bias is added to the sums before each squash.
        detach_routing: whether the backward takes the routing's weights as constants.
        window: further sizes of the weight: :class:`ConvCapsules2d` has a kernel's there.
        device, dtype: of the parameters.

    Shapes: ``weight [out_capsules, in_capsules, out_dim, in_dim]``, ``bias [out_capsules,
    out_dim]``.

    Raises:
        ValueError: a size or a number of iterations below 1, or a dtype without kernels.

    Source: Sabour, Frosst and Hinton, 2017, Dynamic Routing Between Capsules.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        iterations: int = 3,
        bias: bool = False,
        *,
        detach_routing: bool = False,
        window: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_capsules": in_capsules, "in_dim": in_dim}
        sizes |= {"out_capsules": out_capsules, "out_dim": out_dim, "iterations": iterations}
        _positive(type(self).__name__, **sizes)
        self.in_capsules, self.in_dim = in_capsules, in_dim
        self.out_capsules, self.out_dim = out_capsules, out_dim
        self.iterations = iterations
        self.detach_routing = detach_routing
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        shape = (out_capsules, in_capsules, *window, out_dim, in_dim)
        self.weight = Parameter(torch.empty(shape, **kind))
        self.bias = Parameter(torch.empty(out_capsules, out_dim, **kind)) if bias else None
        check_dtype(type(self).__name__, self.weight.dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small normal weights, as in XifengGuo's CapsNet-Pytorch; no bias."""
        torch.nn.init.normal_(self.weight, std=0.01)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Capsules ``[N, out_capsules, out_dim]`` of ``input [N, in_capsules, in_dim]``."""
        # Past nn.Module.__getattr__, as in Conv2d.
        parameters = self._parameters
        weight = parameters.get("weight")
        if weight is None:
            weight = self.weight
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (lazy)
        return F.capsule_routing(
            input,
            weight,
            self.iterations,
            bias=bias,
            detach_routing=self.detach_routing,
            packed=self._packed_weight(weight, input),
        )

    def _pack(self, weight: Tensor, layout: int) -> Tensor | None:
        return F.pack_capsule_weight(weight)

    def extra_repr(self) -> str:
        """Sizes and options, for repr()."""
        return (
            f"{self.in_capsules}×{self.in_dim} → {self.out_capsules}×{self.out_dim}, "
            f"iterations={self.iterations}, bias={self.bias is not None}, "
            f"detach_routing={self.detach_routing}"
        )


class ConvCapsules2d(DenseCapsules):
    """Capsules that the capsules of a window vote for; all positions share the weight.

    Args:
        in_capsules, in_dim: capsules at a position, and the values of each.
        out_capsules, out_dim: the same of the output.
        kernel_size, stride, padding: of the window, in positions; int or (height, width). Padded
            capsules are zero: they vote for nothing.
        iterations, bias, detach_routing, device, dtype: as :class:`DenseCapsules` has them.

    Shapes: ``weight [out_capsules, in_capsules, height, width, out_dim, in_dim]``.

    Raises:
        ValueError: as :class:`DenseCapsules`, or a window that is none.

    Source: the windows are those of Hinton, Sabour and Frosst, 2018, Matrix Capsules with EM
    Routing; the routing is the dynamic one.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        iterations: int = 3,
        bias: bool = False,
        **options: Any,
    ) -> None:
        window = capsule_window(kernel_size, stride, padding)
        super().__init__(
            in_capsules,
            in_dim,
            out_capsules,
            out_dim,
            iterations,
            bias,
            window=window[0],
            **options,
        )
        self.kernel_size, self.stride, self.padding = window

    def forward(self, input: Tensor) -> Tensor:
        """``[N, out_capsules, out_dim, H', W']`` of ``input [N, in_capsules, in_dim, H, W]``."""
        return F.conv_capsule_routing2d(
            input,
            self.weight,
            self.stride,
            self.padding,
            self.iterations,
            bias=self.bias,
            detach_routing=self.detach_routing,
            packed=self._packed_weight(self.weight, input),
        )

    def reset_parameters(self) -> None:
        """Normal weights with which outputs start about as long as inputs: in a deep network the
        small ones of :class:`DenseCapsules` would leave nothing to route. No bias."""
        spread_capsules_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def _pack(self, weight: Tensor, layout: int) -> Tensor | None:
        return F.pack_capsule_weight(weight.flatten(1, 3))

    def extra_repr(self) -> str:
        """Sizes and options, for repr()."""
        window = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return f"{super().extra_repr()}, {window}"


def spread_capsules_(weight: Tensor) -> Tensor:
    """Fill ``weight [O, …, D_out, D_in]`` so that, with uniform routing and inputs of length 0.5,
    sums have length 1."""
    outputs, dim = weight.shape[0], weight.shape[-2]
    inputs = weight[0].numel() // (dim * weight.shape[-1])
    return torch.nn.init.normal_(weight, std=2 * outputs / math.sqrt(inputs * dim))


class CapsuleDecoder(torch.nn.Sequential):
    """Images from the capsules of one class: two hidden layers and a sigmoid.

    Its state_dict is that of the Sequential in XifengGuo's CapsNet-Pytorch (``0.weight``,
    ``2.weight``, ``4.weight``, with biases).

    Args:
        capsules, dim: the capsules that come in.
        image_size: (channels, height, width) of the images.
        hidden: features of the two hidden layers; the paper has 512 and 1024.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        capsules: int,
        dim: int,
        image_size: tuple[int, int, int],
        hidden: tuple[int, int] = (512, 1024),
        **options: Any,
    ) -> None:
        channels, height, width = image_size
        first, second = hidden
        _positive(
            "CapsuleDecoder", capsules=capsules, dim=dim, channels=channels, height=height,
            width=width, first_hidden=first, second_hidden=second,
        )  # fmt: skip
        super().__init__(
            Linear(capsules * dim, first, **options),
            ReLU(),
            Linear(first, second, **options),
            ReLU(),
            Linear(second, math.prod(image_size), **options),
            Sigmoid(),
        )
        self.capsules, self.dim = capsules, dim
        self.image_size = tuple(image_size)

    def forward(self, input: Tensor, target: Tensor | None = None) -> Tensor:
        """Images ``[N, C, H, W]`` of ``input [N, capsules, dim]``.

        Args:
            input: the capsules.
            target: ``[N]``, int64: the class whose capsule is kept. The longest one where it is
                None.

        Raises:
            ValueError, TypeError: capsules or classes that are none of this decoder's.
        """
        if input.dim() != 3 or input.shape[1:] != (self.capsules, self.dim):
            raise ValueError(
                f"CapsuleDecoder: input must be [N, {self.capsules}, {self.dim}], got "
                f"{tuple(input.shape)}"
            )
        images = super().forward(mask_capsules(input, target).flatten(1))
        return images.unflatten(1, self.image_size)


def check_classes(op: str, target: Tensor, samples: int) -> None:
    """Raise unless `target` is one class a sample, ``[N]`` of int64."""
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be int64, got {getattr(target, 'dtype', type(target))}")
    if tuple(target.shape) != (samples,):
        raise ValueError(f"{op}: target must be [{samples}], got {tuple(target.shape)}")


def mask_capsules(capsules: Tensor, target: Tensor | None = None) -> Tensor:
    """``capsules [N, O, D]`` with all but one of each sample set to zero.

    Args:
        capsules: as a layer gives them.
        target: ``[N]``, int64, the capsule that stays; the longest where it is None.

    Raises:
        ValueError, TypeError: a target of another shape or dtype.
    """
    if target is None:
        target = capsules.detach().square().sum(-1).argmax(1)
    check_classes("mask_capsules", target, capsules.shape[0])
    kept = torch.nn.functional.one_hot(target, capsules.shape[1]).to(capsules.dtype)
    return capsules * kept.unsqueeze(-1)


class CapsuleLengths(torch.nn.Module):
    """The lengths of capsules: how certain each is that what it stands for is there."""

    def forward(self, input: Tensor) -> Tensor:
        """``[N, O]`` of ``input [N, O, D]``."""
        return torch.linalg.vector_norm(input, dim=-1)
