"""conv_transpose2d: schema, checks, autograd, and the public function."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.kernels.activation import kinds
from nnarch.kernels.conv2d.geometry import check_numbers, two
from nnarch.kernels.conv2d.op import conv2d_op, weight_grad_of
from nnarch.kernels.conv_transpose2d import reference
from nnarch.kernels.depthwise.op import input_grad as depthwise_input_grad
from nnarch.kernels.epilogue import (
    check_epilogue,
    check_packed,
    check_same,
    check_tensor,
    epilogue_backward,
    must_split,
    refuse_gradient,
)
from nnarch.kernels.normalization.op import affine

_EPILOGUE = "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual"
_GEOMETRY = "int[2] stride, int[2] padding, int[2] output_padding, int[2] dilation, int groups"
_LAYOUTS = range(8)  # kernels/conv_transpose2d/layout_choice.h
_GPU = "nnarch.kernels.conv_transpose2d.triton_kernel"

# --------------------------------------------------------------------------------------- geometry


def output_size(
    x_size: Sequence[int],
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """[N, K, H', W'] of a transposed convolution; sizes may be symbolic."""
    n, k = x_size[0], weight_size[1] * groups
    rows, columns = (
        (x_size[i + 2] - 1) * stride[i]
        - 2 * padding[i]
        + dilation[i] * (weight_size[i + 2] - 1)
        + output_padding[i]
        + 1
        for i in (0, 1)
    )
    return (n, k, rows, columns)


def check_geometry(
    x: Any,
    weight: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """Raise for arguments that make no transposed convolution; return the size of the output."""
    op = "conv_transpose2d"
    for name, tensor in (("x", x), ("weight", weight)):
        check_tensor(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must be 4-D, got shape {tuple(tensor.shape)}")
    check_same(op, "weight", weight, x)
    check_numbers(op, {"stride": stride, "dilation": dilation}, least=1)
    check_numbers(op, {"padding": padding, "output_padding": output_padding}, least=0)
    _check_channels(op, x, weight, groups)
    for extra, step, gap in zip(output_padding, stride, dilation, strict=True):
        if extra >= max(step, gap):
            raise ValueError(
                f"{op}: output_padding must be smaller than the stride or the dilation, got "
                f"{tuple(output_padding)} with stride {tuple(stride)}, dilation {tuple(dilation)}"
            )
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{op}: x must have pixels, got shape {tuple(x.shape)}")
    geometry = (stride, padding, output_padding, dilation)
    size = output_size(x.shape, weight.shape, *geometry, groups)
    if size[2] < 1 or size[3] < 1:
        raise ValueError(
            f"{op}: nothing is left of the output with padding {tuple(padding)}: its size would be "
            f"{size[2]}×{size[3]}"
        )
    return size


def _check_channels(op: str, x: Any, weight: Any, groups: int) -> None:
    if not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"{op}: groups must be an int, got {groups!r}")
    if groups < 1:
        raise ValueError(f"{op}: groups must be positive, got {groups}")
    channels, per_group, r, s = weight.shape
    if channels < 1 or per_group < 1:
        raise ValueError(f"{op}: weight of shape {tuple(weight.shape)} has no channels")
    if x.shape[1] != channels:
        raise ValueError(
            f"{op}: x has {x.shape[1]} channels, but weight has {channels}: expected one number"
        )
    if channels % groups:
        raise ValueError(f"{op}: groups={groups} must divide the input channels ({channels})")
    if r < 1 or s < 1:
        raise ValueError(f"{op}: the kernel size must be positive, got {(r, s)}")


# --------------------------------------------------------------------------------- the operation


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    alpha: float,
) -> None:
    size = check_geometry(x, weight, stride, padding, output_padding, dilation, groups)
    op = "conv_transpose2d"
    check_epilogue(op, x, size, size[1], residual, bias=bias, scale=scale, shift=shift)
    check_packed(op, packed, x)


def _fake(x, weight, bias, scale, shift, residual, packed, *rest):
    return library.new_output(x, output_size(x.shape, weight.shape, *rest[:5]), weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, scale, _, _, _, *ctx.geometry, ctx.activation, ctx.alpha = inputs
    refuse_gradient("conv_transpose2d", ctx.activation)
    ctx.save_for_backward(x, weight, scale, output if ctx.activation else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, y = ctx.saved_tensors
    need_x, need_weight, *needs = ctx.needs_input_grad[:6]
    need_bias, need_scale, need_shift, need_residual = needs
    refuse_gradient("conv_transpose2d", scale_wanted=need_scale)
    g = epilogue_backward(
        grad, y, scale, ctx.activation, ctx.alpha, (need_bias, need_shift, need_residual)
    )
    image, geometry = _convolution_of(g.accumulator, *ctx.geometry)
    dx = conv2d_op(image, weight, *[None] * 5, *geometry, 0, 0.0) if need_x else None
    # The weight's gradient of a convolution from `image` to `x`.
    dw = weight_grad_of(x, image, weight, geometry) if need_weight else None
    return dx, dw, g.bias, None, g.shift, g.residual, *[None] * 8


def _convolution_of(
    grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[Tensor, tuple[Any, ...]]:
    """The image and the geometry of the convolution whose transpose this is.

    Whole strides of output padding are pixels that this convolution must not step to: there is
    less padding at the end, or less of the image.
    """
    after = []
    for dim, (pad, extra, step) in enumerate(zip(padding, output_padding, stride, strict=True)):
        left = pad - extra // step * step
        if left < 0:
            grad = grad.narrow(dim + 2, 0, grad.shape[dim + 2] + left)
        after.append(max(left, 0))
    return grad, (stride, (*padding, *after), dilation, groups)


conv_transpose2d_op = library.declare(
    f"conv_transpose2d(Tensor x, Tensor weight, {_EPILOGUE}, Tensor? packed, {_GEOMETRY}, "
    "int activation, float alpha) -> Tensor",
    reference=reference.conv_transpose2d,
    fake=_fake,
    check=_check,
    gpu=f"{_GPU}:conv_transpose2d",
    setup_context=_setup,
    backward=_backward,
)


def _check_pack(
    weight: Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int, layout: int
) -> None:
    op = "conv_transpose2d_pack"
    check_tensor(op, "weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must be 4-D, got shape {tuple(weight.shape)}")
    check_numbers(op, {"stride": stride, "dilation": dilation}, least=1)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"{op}: groups must divide the {weight.shape[0]} input channels, got {groups}"
        )
    if layout not in _LAYOUTS:
        raise ValueError(f"{op}: layout must be 0 to 7, got {layout}")
    if 2 <= layout <= 6 and weight.dtype == torch.float64:
        raise ValueError(f"{op}: layout {layout} is for at most float32, got {weight.dtype}")


def _fake_pack(weight, stride, dilation, groups, layout):
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size())


pack = library.declare(
    "conv_transpose2d_pack(Tensor weight, int[2] stride, int[2] dilation, int groups, int layout) "
    "-> Tensor",
    reference=reference.conv_transpose2d_pack,
    fake=_fake_pack,
    check=_check_pack,
    gpu=f"{_GPU}:conv_transpose2d_pack",
)

# ------------------------------------------------------------------------------- public functions


@arrays.public_lower_precision
def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: kinds.Activation = None,
    packed: Tensor | None = None,
) -> Tensor:
    """2-D transposed convolution: act(scale·(conv_transpose(x, weight) + bias) + shift + residual).

    The first eight arguments are those of :func:`torch.nn.functional.conv_transpose2d`.

    Args:
        x: [N, C, H, W] or [C, H, W].
        weight: [C, K / groups, R, S].
        bias, scale, shift: [K] or None.
        stride, dilation: one number, or (vertical, horizontal), in pixels.
        padding: one number, or (vertical, horizontal): pixels taken off each side of the output.
        output_padding: the same, added at the bottom and right; smaller than stride or dilation.
        groups: input and output channels are cut into this many independent parts.
        residual: of the output's shape, added before the activation; or None.
        activation: None, a name ("relu", "silu", …) or ("leaky_relu", slope).
        packed: what :func:`pack_conv_transpose2d_weight` made of `weight`; or None.

    Returns:
        [N, K, H', W'] in the memory format of `x`, H' = (H − 1)·stride − 2·padding + dilation·(R −
        1) + output_padding + 1.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    code, alpha = kinds.encode(activation, "conv_transpose2d")
    if x.dim() == 3:
        y = conv_transpose2d(
            x.unsqueeze(0), weight, bias, stride, padding, output_padding, groups, dilation,
            scale=scale, shift=shift, activation=activation, packed=packed,
            residual=None if residual is None else residual.unsqueeze(0),
        )  # fmt: skip
        return y.squeeze(0)
    geometry = (two(stride), two(padding), two(output_padding), two(dilation))
    split = (code or scale is not None) and must_split(
        code, x, weight, bias, scale, shift, residual
    )
    if groups != 1 and _is_depthwise(weight, groups):
        epilogue = (bias, scale, shift, residual, code, alpha)
        return _depthwise(x, weight, geometry, groups, packed, epilogue)
    if split:
        z = conv_transpose2d_op(
            x, weight, bias, None, None, None, packed, *geometry, groups, 0, 0.0
        )
        return affine(z, scale, shift, residual, code, alpha)
    return conv_transpose2d_op(
        x, weight, bias, scale, shift, residual, packed, *geometry, groups, code, alpha
    )


def _is_depthwise(weight: Any, groups: Any) -> bool:
    """Whether every output channel is a group of its own."""
    return isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[1] == 1


def _depthwise(
    x: Tensor,
    weight: Tensor,
    geometry: tuple[Any, Any, Any, Any],
    groups: int,
    packed: Tensor | None,
    epilogue: tuple[Any, Any, Any, Any, int, float],
) -> Tensor:
    """By the depthwise kernels: the gradient of their input is this operation."""
    bias, scale, shift, residual, code, alpha = epilogue
    _check(x, weight, bias, scale, shift, residual, packed, *geometry, groups, code, alpha)
    stride, padding, output_padding, dilation = geometry
    if any(extra >= step for extra, step in zip(output_padding, stride, strict=True)):
        # A convolution from an output of this size would make more than x.
        z = conv_transpose2d_op(x, weight, *[None] * 5, *geometry, groups, 0, 0.0)
    else:
        size = output_size(x.shape, weight.shape, *geometry, groups)
        z = depthwise_input_grad(x, weight, size, stride, (*padding, *padding), dilation)
    if not code and all(t is None for t in (bias, scale, shift, residual)):
        return z
    if bias is not None and scale is None:
        bias, shift = None, bias if shift is None else bias + shift
    elif bias is not None:
        z = affine(z, None, bias, None, 0, 0.0)
    return affine(z, scale, shift, residual, code, alpha)


def conv_transpose2d_layout(
    weight: Tensor,
    input_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> int:
    """How to pack `weight` for inputs of this size: pack_conv_transpose2d_weight's `layout`.

    Args:
        weight: [C, K / groups, R, S] on the CPU.
        input_size: [N, C, H, W] of the input.
        stride, padding, output_padding, groups, dilation: as in :func:`conv_transpose2d`.

    Returns:
        A number that stands for an algorithm; which ones depends on
        :func:`nnarch.set_precision`, too.
    """
    geometry = (two(stride), two(padding), two(output_padding), two(dilation))
    x = weight.new_empty(1).expand(tuple(input_size))  # takes no memory
    check_geometry(x, weight, *geometry, groups)
    if library.native is None or weight.device.type != "cpu":
        return 0
    numbers = [int(weight.dtype == torch.float64), *x.shape, *weight.shape]
    numbers += [number for pair in geometry for number in pair]
    return library.native.nnarch_conv_transpose2d_layout((ctypes.c_int64 * 18)(*numbers, groups))


def pack_conv_transpose2d_weight(
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    layout: int = 0,
) -> Tensor | None:
    """The weight in the order that the native kernels read, to pass as `packed=` again and again.

    Args:
        weight: [C, K / groups, R, S] on the CPU; its values must not change afterwards.
        stride, groups, dilation: as in :func:`conv_transpose2d`.
        layout: what :func:`conv_transpose2d_layout` says; 0 serves every input.

    Returns:
        An opaque tensor; None where no native kernel takes one (another device, one output channel
        a group).
    """
    check_tensor("pack_conv_transpose2d_weight", "weight", weight)
    if not isinstance(groups, int):
        raise TypeError(f"pack_conv_transpose2d_weight: groups must be an int, got {groups!r}")
    if weight.device.type != "cpu" or library.native is None:
        return None
    if groups > 1 and _is_depthwise(weight, groups):
        return None
    return pack(weight.detach(), two(stride), two(dilation), groups, layout)
