"""Convolutional capsules: the capsules of every window, routed with one weight.

A window's capsules are gathered into the rows of the dense routing. That copies every input capsule
once for each window that holds it, which is little next to its votes: one value of a capsule
against O · D_out of votes, which never leave the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nnarch import arrays, library

from . import reference
from .op import capsule_routing

_Pair = tuple[int, int]
_GEOMETRY = "int[2] kernel_size, int[2] stride, int[2] padding"
_GPU = "nnarch.kernels.capsule_routing.triton_kernel"

# --------------------------------------------------------------------------------- the operation


def _positions(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> _Pair:
    """H' and W' for windows over `size` (height, width)."""
    height, width = (
        (size[i] + 2 * padding[i] - kernel[i]) // stride[i] + 1 for i in (0, 1)
    )  # fmt: skip
    return height, width


def _rows(
    size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, int, int]:
    """The shape of the windows of [N, H, W, C, D_in]."""
    height, width = _positions(size[1:3], kernel, stride, padding)
    return size[0] * height * width, size[3] * kernel[0] * kernel[1], size[4]


def _check_windows(op: str, size: Sequence[int], kernel: Any, stride: Any, padding: Any) -> None:
    if len(size) != 5:
        raise ValueError(f"{op}: x must be [N, H, W, C, D_in], got {tuple(size)}")
    kernel, stride, padding = capsule_window(*map(tuple, (kernel, stride, padding)), op=op)
    for i in (0, 1):
        if size[1 + i] + 2 * padding[i] < kernel[i]:
            raise ValueError(
                f"{op}: the window {kernel} is larger than the padded image of {tuple(size[1:3])}"
            )


def _check_x(x: Tensor, kernel_size: Any, stride: Any, padding: Any) -> None:
    library.check_tensor("capsule_windows", "x", x)
    _check_windows("capsule_windows", x.shape, kernel_size, stride, padding)


def _check_grad(grad: Tensor, input_size: Any, kernel_size: Any, stride: Any, padding: Any) -> None:
    op = "capsule_windows_grad"
    library.check_tensor(op, "grad", grad)
    _check_windows(op, input_size, kernel_size, stride, padding)
    wanted = _rows(input_size, kernel_size, stride, padding)
    if tuple(grad.shape) != wanted:
        raise ValueError(f"{op}: grad must have the shape {wanted}, got {tuple(grad.shape)}")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.geometry = inputs
    ctx.size = tuple(x.shape)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return windows_grad(grad, ctx.size, *ctx.geometry), None, None, None


def _setup_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *ctx.geometry = inputs


def _backward_grad(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return windows_op(grad, *ctx.geometry), None, None, None, None


windows_op = library.declare(
    f"capsule_windows(Tensor x, {_GEOMETRY}) -> Tensor",
    reference=reference.capsule_windows,
    fake=lambda x, *geometry: x.new_empty(_rows(x.shape, *geometry)),
    check=_check_x,
    gpu=f"{_GPU}:capsule_windows",
    setup_context=_setup,
    backward=_backward,
)

windows_grad = library.declare(
    f"capsule_windows_grad(Tensor grad, int[] input_size, {_GEOMETRY}) -> Tensor",
    reference=reference.capsule_windows_grad,
    fake=lambda grad, input_size, *_: grad.new_empty(input_size),
    check=_check_grad,
    gpu=f"{_GPU}:capsule_windows_grad",
    setup_context=_setup_grad,
    backward=_backward_grad,
)

# ------------------------------------------------------------------------------ public functions


@arrays.public_lower_precision
def conv_capsule_routing2d(
    x: Tensor,
    weight: Tensor,
    stride: int | _Pair = 1,
    padding: int | _Pair = 0,
    iterations: int = 3,
    *,
    bias: Tensor | None = None,
    detach_routing: bool = False,
    packed: Tensor | None = None,
) -> Tensor:
    """Dynamic routing among the capsules of every window, with a weight that all positions share.

    Args:
        x: ``[N, C, D_in, H, W]``: C capsules of D_in values at every position.
        weight: ``[O, C, KH, KW, D_out, D_in]``.
        stride, padding: of the window; int or (height, width). Padded capsules are zero.
        iterations, bias, detach_routing: as :func:`capsule_routing` has them.
        packed: what :func:`pack_capsule_weight` made of ``weight.flatten(1, 3)``; or None.

    Returns:
        ``[N, O, D_out, H', W']``, a view of memory that is ordered N, H', W', O, D_out.

    Raises:
        ValueError: shapes that do not fit together, a window larger than the image.
        TypeError: dtypes that differ or are not floating point, arguments of the wrong type.
    """
    op = "conv_capsule_routing2d"
    library.check_tensor(op, "x", x)
    library.check_tensor(op, "weight", weight)
    if x.dim() != 5 or weight.dim() != 6:
        raise ValueError(
            f"{op}: x must be [N, C, D_in, H, W] and weight [O, C, KH, KW, D_out, D_in], got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.shape[1:3] != (weight.shape[1], weight.shape[5]):
        raise ValueError(
            f"{op}: x has {x.shape[1]} capsules of {x.shape[2]} values at a position, but weight "
            f"is for {weight.shape[1]} of {weight.shape[5]}"
        )
    kernel, stride, padding = capsule_window(tuple(weight.shape[2:4]), stride, padding)
    n, _, _, height, width = x.shape
    if height + 2 * padding[0] < kernel[0] or width + 2 * padding[1] < kernel[1]:
        raise ValueError(
            f"{op}: the window of {kernel[0]}×{kernel[1]} is larger than the padded image, "
            f"{height + 2 * padding[0]}×{width + 2 * padding[1]}"
        )
    # Capsules side by side: the copy then moves D_in values at a time.
    rows = windows_op(x.permute(0, 3, 4, 1, 2), kernel, stride, padding)
    v = capsule_routing(
        rows, weight.flatten(1, 3), iterations, bias=bias, detach_routing=detach_routing,
        packed=packed,
    )  # fmt: skip
    images = v.unflatten(0, (n, *_positions(x.shape[3:], kernel, stride, padding)))
    return images.permute(0, 3, 4, 1, 2)


def capsule_window(
    kernel_size: Any, stride: Any, padding: Any, op: str = "conv_capsule_routing2d"
) -> tuple[_Pair, _Pair, _Pair]:
    """Kernel, stride and padding as pairs (height, width).

    Raises:
        TypeError, ValueError: one that is no window.
    """
    pairs = []
    for name, value, least in (
        ("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0)
    ):  # fmt: skip
        pair = (value, value) if isinstance(value, int) else value
        if (
            not isinstance(pair, (tuple, list))
            or len(pair) != 2
            or not all(isinstance(v, int) and not isinstance(v, bool) for v in pair)
        ):
            raise TypeError(f"{op}: {name} must be an int or (height, width), got {value!r}")
        if min(pair) < least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {value!r}")
        pairs.append((pair[0], pair[1]))
    return pairs[0], pairs[1], pairs[2]
