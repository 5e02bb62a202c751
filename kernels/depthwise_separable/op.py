"""Depthwise-separable convolution: schemas, checks, autograd, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nnarch import arrays, library
from nnarch.calls import wants_gradient
from nnarch.kernels.activation import kinds
from nnarch.kernels.conv2d.geometry import check_conv, output_size, padding_of, two
from nnarch.kernels.conv2d.op import conv2d
from nnarch.kernels.conv2d.op import input_grad as pointwise_input_grad
from nnarch.kernels.conv2d.op import weight_grad as pointwise_weight_grad
from nnarch.kernels.depthwise.op import depthwise_op
from nnarch.kernels.depthwise.op import input_grad as depthwise_input_grad
from nnarch.kernels.depthwise.op import weight_grad as depthwise_weight_grad
from nnarch.kernels.depthwise_separable import reference
from nnarch.kernels.epilogue import (
    check_epilogue,
    check_packed,
    check_tensor,
    epilogue_backward,
    refuse_gradient,
)

_GEOMETRY = "int[2] stride, int[4] padding, int[2] dilation"
_GPU = "nnarch.kernels.depthwise_separable.triton_kernel"
_POINTWISE = ((1, 1), (0, 0, 0, 0), (1, 1), 1)

# --------------------------------------------------------------------------------- the operation


def _check(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_scale: Tensor | None,
    depthwise_shift: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    depthwise_packed: Tensor | None,
    pointwise_packed: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    depthwise_activation: int,
    depthwise_alpha: float,
    activation: int,
    alpha: float,
) -> None:
    op = "depthwise_separable_conv2d"
    size = _check_geometry(op, x, depthwise_weight, pointwise_weight, stride, padding, dilation)
    channels, out = depthwise_weight.shape[0], pointwise_weight.shape[0]
    check_epilogue(
        op, x, size, channels, None,
        depthwise_scale=depthwise_scale, depthwise_shift=depthwise_shift,
    )  # fmt: skip
    check_epilogue(op, x, size, out, residual, scale=scale, shift=shift)
    check_packed(op, depthwise_packed, x)
    check_packed(op, pointwise_packed, x)


def _check_geometry(op, x, depthwise_weight, pointwise_weight, stride, padding, dilation):
    check_tensor(op, "x", x)
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"{op}: x must be [N, C, H, W] with C > 0, got shape {tuple(x.shape)}")
    check_tensor(op, "depthwise_weight", depthwise_weight)
    if depthwise_weight.dim() != 4 or depthwise_weight.shape[1] != 1:
        raise ValueError(
            f"{op}: depthwise_weight must be [C * m, 1, R, S], "
            f"got shape {tuple(depthwise_weight.shape)}"
        )
    wide = check_conv(op, x, depthwise_weight, stride, padding, dilation, x.shape[1])
    return _check_pointwise(op, "pointwise_weight", pointwise_weight, x, wide)


def _check_pointwise(op, name, weight, x, size) -> tuple[int, int, int, int]:
    """Check a 1×1 convolution of a tensor of `size`; return the size of its output."""
    check_tensor(op, name, weight)
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (size[1], 1, 1) or weight.shape[0] < 1:
        raise ValueError(
            f"{op}: {name} must be [K, {size[1]}, 1, 1] with K > 0, got shape {tuple(weight.shape)}"
        )
    library.check_same(op, name, weight, x)
    return (size[0], weight.shape[0], size[2], size[3])


def _output_size(x, depthwise_weight, pointwise_weight, stride, padding, dilation):
    n, _, h, w = output_size(x.shape, depthwise_weight.shape, stride, padding, dilation)
    return n, pointwise_weight.shape[0], h, w


def _fake(x, depthwise_weight, pointwise_weight, *rest):
    stride, padding, dilation = rest[7:10]
    size = _output_size(x, depthwise_weight, pointwise_weight, stride, padding, dilation)
    return library.new_output(x, size)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, depthwise_weight, pointwise_weight, depthwise_scale, depthwise_shift, scale = inputs[:6]
    *ctx.geometry, ctx.depthwise_activation, ctx.depthwise_alpha, ctx.activation, ctx.alpha = (
        inputs[10:]
    )
    refuse_gradient("depthwise_separable_conv2d", ctx.activation)
    refuse_gradient("depthwise_separable_conv2d", ctx.depthwise_activation)
    ctx.save_for_backward(
        x, depthwise_weight, pointwise_weight, depthwise_scale, depthwise_shift, scale,
        output if ctx.activation else None,
    )  # fmt: skip


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, depthwise_weight, pointwise_weight, depthwise_scale, depthwise_shift, scale, y = (
        ctx.saved_tensors
    )
    need_x, need_dw, need_pw, need_ds, need_dshift, need_s, need_shift, need_residual = (
        ctx.needs_input_grad[:8]
    )
    refuse_gradient("depthwise_separable_conv2d", scale_wanted=need_ds or need_s)
    outer = epilogue_backward(
        grad, y, scale, ctx.activation, ctx.alpha, (False, need_shift, need_residual)
    )
    z = None
    if need_pw or ctx.depthwise_activation:  # computed anew: see README.md
        z = depthwise_op(
            x, depthwise_weight, None, depthwise_scale, depthwise_shift, None, None, *ctx.geometry,
            ctx.depthwise_activation, ctx.depthwise_alpha,
        )  # fmt: skip
    d_pw = None
    if need_pw:
        d_pw = pointwise_weight_grad(
            outer.accumulator, z, pointwise_weight.shape, *_POINTWISE, False
        )
    if not (need_x or need_dw or need_dshift):
        return None, None, d_pw, None, None, None, outer.shift, outer.residual, *[None] * 9
    n, _, h, w = outer.accumulator.shape
    wide = (n, depthwise_weight.shape[0], h, w)
    dz = pointwise_input_grad(outer.accumulator, pointwise_weight, wide, *_POINTWISE)
    inner = epilogue_backward(
        dz, z if ctx.depthwise_activation else None, depthwise_scale, ctx.depthwise_activation,
        ctx.depthwise_alpha, (False, need_dshift, False),
    )  # fmt: skip
    dx = d_dw = None
    if need_x:
        dx = depthwise_input_grad(inner.accumulator, depthwise_weight, x.shape, *ctx.geometry)
    if need_dw:
        d_dw = depthwise_weight_grad(inner.accumulator, x, depthwise_weight.shape, *ctx.geometry)
    return dx, d_dw, d_pw, None, inner.shift, None, outer.shift, outer.residual, *[None] * 9


separable_op = library.declare(
    "depthwise_separable_conv2d(Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, "
    "Tensor? depthwise_scale, Tensor? depthwise_shift, Tensor? scale, Tensor? shift, "
    "Tensor? residual, Tensor? depthwise_packed, Tensor? pointwise_packed, "
    f"{_GEOMETRY}, int depthwise_activation, float depthwise_alpha, "
    "int activation, float alpha) -> Tensor",
    reference=reference.depthwise_separable_conv2d,
    fake=_fake,
    check=_check,
    gpu=f"{_GPU}:depthwise_separable_conv2d",
    setup_context=_setup,
    backward=_backward,
)

# ---------------------------------------------------------------------------- inverted residuals


def _check_inverted(
    x, expand_weight, depthwise_weight, project_weight, expand_bias, depthwise_bias, project_bias,
    residual, expand_packed, depthwise_packed, project_packed, stride, padding, dilation, *_,
) -> None:  # fmt: skip
    op = "inverted_residual"
    check_tensor(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [N, C, H, W], got shape {tuple(x.shape)}")
    wide = _check_pointwise(op, "expand_weight", expand_weight, x, x.shape)
    like = x.new_empty(1).expand(wide)  # takes no memory
    size = _check_geometry(op, like, depthwise_weight, project_weight, stride, padding, dilation)
    check_epilogue(op, x, size, wide[1], None, expand_bias=expand_bias)
    check_epilogue(op, x, size, depthwise_weight.shape[0], None, depthwise_bias=depthwise_bias)
    check_epilogue(op, x, size, size[1], residual, project_bias=project_bias)
    for packed in (expand_packed, depthwise_packed, project_packed):
        check_packed(op, packed, x)


def _fake_inverted(x, expand_weight, depthwise_weight, project_weight, *rest):
    stride, padding, dilation = rest[7:10]
    return library.new_output(
        x, _output_size(x, depthwise_weight, project_weight, stride, padding, dilation)
    )


inverted_residual_op = library.declare(
    "inverted_residual(Tensor x, Tensor expand_weight, Tensor depthwise_weight, "
    "Tensor project_weight, Tensor? expand_bias, Tensor? depthwise_bias, Tensor? project_bias, "
    "Tensor? residual, Tensor? expand_packed, Tensor? depthwise_packed, Tensor? project_packed, "
    f"{_GEOMETRY}, int expand_activation, float expand_alpha, int depthwise_activation, "
    "float depthwise_alpha, int activation, float alpha) -> Tensor",
    reference=reference.inverted_residual,
    fake=_fake_inverted,
    check=_check_inverted,
    gpu=f"{_GPU}:inverted_residual",
)
"""For inference: `nnarch.accelerate` calls it where no gradient is wanted."""

# ------------------------------------------------------------------------------- public functions


@arrays.public_lower_precision
def depthwise_separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    depthwise_scale: Tensor | None = None,
    depthwise_shift: Tensor | None = None,
    depthwise_activation: kinds.Activation = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: kinds.Activation = None,
    depthwise_packed: Tensor | None = None,
    pointwise_packed: Tensor | None = None,
) -> Tensor:
    """A depthwise and a 1×1 convolution in one kernel.

    act(scale·conv(z, pointwise_weight) + shift + residual), where z = depthwise_act(
    depthwise_scale·conv(x, depthwise_weight, groups=C) + depthwise_shift).

    Args:
        x: [N, C, H, W] or [C, H, W].
        depthwise_weight: [C·m, 1, R, S]; every channel gives m.
        pointwise_weight: [K, C·m, 1, 1].
        stride, dilation: of the depthwise convolution; one number, or (vertical, horizontal).
        padding: one number, (vertical, horizontal), (top, left, bottom, right), "valid" or "same"
            (stride 1 only).
        depthwise_scale, depthwise_shift: [C·m] or None; a bias is a shift.
        depthwise_activation, activation: None, a name ("relu", "relu6", …) or
            ("leaky_relu", slope).
        scale, shift: [K] or None.
        residual: of the output's shape, added before the activation; or None.
        depthwise_packed, pointwise_packed: what :func:`pack_conv2d_weight` made of the weights
            (of the depthwise one with ``groups=C``); or None.

    Returns:
        [N, K, H', W'] in the memory format of `x`.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.

    Source: Howard et al., 2017, MobileNets.
    """
    op = "depthwise_separable_conv2d"
    depthwise_code, depthwise_alpha = kinds.encode(depthwise_activation, op)
    code, alpha = kinds.encode(activation, op)
    if isinstance(x, Tensor) and x.dim() == 3:
        return depthwise_separable_conv2d(
            x.unsqueeze(0), depthwise_weight, pointwise_weight, stride=stride, padding=padding,
            dilation=dilation, depthwise_scale=depthwise_scale, depthwise_shift=depthwise_shift,
            depthwise_activation=depthwise_activation, scale=scale, shift=shift,
            residual=None if residual is None else residual.unsqueeze(0), activation=activation,
            depthwise_packed=depthwise_packed, pointwise_packed=pointwise_packed,
        ).squeeze(0)  # fmt: skip
    steps = stride if type(stride) is tuple and len(stride) == 2 else two(stride)
    gaps = dilation if type(dilation) is tuple and len(dilation) == 2 else two(dilation)
    if type(padding) is tuple and len(padding) == 4:
        pads = padding
    else:
        pads = padding_of(padding, depthwise_weight, steps, gaps, op)
    arguments = (
        x, depthwise_weight, pointwise_weight, depthwise_scale, depthwise_shift, scale, shift,
        residual, depthwise_packed, pointwise_packed, steps, pads, gaps,
        depthwise_code, depthwise_alpha, code, alpha,
    )  # fmt: skip
    # What lies between the two is kept for the gradient: to compute it again, as the operation
    # does, costs up to 13 % of a step (README.md).
    if wants_gradient(*arguments[:8]):
        _check(*arguments)
        z = conv2d(
            x, depthwise_weight, None, steps, pads, gaps, x.shape[1], scale=depthwise_scale,
            shift=depthwise_shift, activation=depthwise_activation, packed=depthwise_packed,
        )  # fmt: skip
        return conv2d(
            z, pointwise_weight, scale=scale, shift=shift, residual=residual,
            activation=activation, packed=pointwise_packed,
        )  # fmt: skip
    return separable_op(*arguments)
