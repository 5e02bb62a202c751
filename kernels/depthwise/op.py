"""Depthwise convolution: schemas, checks, autograd.

The public function is :func:`nnarch.functional.conv2d`: it comes here where every input channel is
a group of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnarch import library
from nnarch.kernels.conv2d.geometry import check_conv, output_size
from nnarch.kernels.depthwise import reference
from nnarch.kernels.epilogue import (
    check_epilogue,
    check_packed,
    check_same,
    check_tensor,
    epilogue_backward,
    refuse_gradient,
)
from nnarch.nodes import Backward

_EPILOGUE = "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual"
_GEOMETRY = "int[2] stride, int[4] padding, int[2] dilation"
_GPU = "nnarch.kernels.depthwise.triton_kernel"
_BITS = _X, _WEIGHT, _BIAS = 1, 2, 4  # what a backward is asked for

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
    dilation: Sequence[int],
    activation: int,
    alpha: float,
) -> None:
    size = _check_geometry("depthwise_conv2d", x, weight, stride, padding, dilation)
    check_epilogue(
        "depthwise_conv2d", x, size, size[1], residual, bias=bias, scale=scale, shift=shift
    )
    check_packed("depthwise_conv2d", packed, x)
    if packed is not None:
        _check_packed(packed, weight)


def _check_geometry(op, x, weight, stride, padding, dilation) -> tuple[int, int, int, int]:
    check_tensor(op, "x", x)
    if x.dim() != 4 or x.shape[1] < 1:
        raise ValueError(f"{op}: x must be [N, C, H, W] with C > 0, got shape {tuple(x.shape)}")
    return check_conv(op, x, weight, stride, padding, dilation, x.shape[1])


def _check_packed(packed: Tensor, weight: Tensor) -> None:
    blocks = -(-weight.shape[0] // reference.BLOCK)
    expected = blocks * reference.BLOCK * weight.shape[2] * weight.shape[3]
    if packed.numel() != expected:
        raise ValueError(
            f"depthwise_conv2d: packed must be what depthwise_conv2d_pack made of this weight "
            f"({expected} elements), got {packed.numel()}"
        )


def _fake(x, weight, bias, scale, shift, residual, packed, stride, padding, dilation, *_):
    return library.new_output(x, output_size(x.shape, weight.shape, stride, padding, dilation))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, scale, _, _, _, *ctx.geometry, ctx.activation, ctx.alpha = inputs
    refuse_gradient("depthwise_conv2d", ctx.activation)
    ctx.save_for_backward(x, weight, scale, output if ctx.activation else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, y = ctx.saved_tensors
    need_x, need_weight, need_bias, need_scale, need_shift, need_residual = ctx.needs_input_grad[:6]
    refuse_gradient("depthwise_conv2d", scale_wanted=need_scale)
    d_shift = d_residual = None
    if ctx.activation or scale is not None or need_shift or need_residual:
        needs = (False, need_shift, need_residual)
        g = epilogue_backward(grad, y, scale, ctx.activation, ctx.alpha, needs)
        grad, _, d_shift, d_residual = g
    wanted = _X * need_x + _WEIGHT * need_weight + _BIAS * need_bias
    dx, dw, db = _gradients(grad, x, weight, *ctx.geometry, wanted)
    return dx, dw, db, None, d_shift, d_residual, *[None] * 6


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, *geometry_and_wanted: Any
) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted, else None."""
    wanted = geometry_and_wanted[-1]
    if not wanted:
        return None, None, None
    results = backward_op(grad, x, weight, *geometry_and_wanted)
    return tuple(g if wanted & bit else None for g, bit in zip(results, _BITS, strict=True))


# ------------------------------------------------ its gradients: bilinear maps, closed under theirs


def _check_input_grad(grad, weight, input_size, stride, padding, dilation) -> None:
    op = "depthwise_conv2d_input_grad"
    check_tensor(op, "grad", grad)
    x = grad.new_empty(input_size, device="meta")
    _check_grad(op, grad, x, weight.to("meta"), stride, padding, dilation)
    check_same(op, "weight", weight, grad)


def _check_weight_grad(grad, x, weight_size, stride, padding, dilation) -> None:
    op = "depthwise_conv2d_weight_grad"
    check_tensor(op, "grad", grad)
    check_tensor(op, "x", x)
    weight = x.new_empty(weight_size, device="meta")
    _check_grad(op, grad, x.to("meta"), weight, stride, padding, dilation)
    check_same(op, "grad", grad, x)


def _check_grad(op, grad, x, weight, stride, padding, dilation) -> None:
    size = _check_geometry(op, x, weight, stride, padding, dilation)
    if tuple(grad.shape) != size:
        raise ValueError(f"{op}: grad must have the shape {size}, got {tuple(grad.shape)}")


def _setup_bilinear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, _, *ctx.geometry = inputs
    ctx.save_for_backward(a, b)


def _input_grad_backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    need_grad, need_weight = ctx.needs_input_grad[:2]
    d_grad = _plain(gg, weight, ctx.geometry) if need_grad else None
    d_weight = weight_grad(grad, gg, tuple(weight.shape), *ctx.geometry) if need_weight else None
    return d_grad, d_weight, *[None] * 4


def _weight_grad_backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    need_grad, need_x = ctx.needs_input_grad[:2]
    d_grad = _plain(x, gg, ctx.geometry) if need_grad else None
    d_x = input_grad(grad, gg, tuple(x.shape), *ctx.geometry) if need_x else None
    return d_grad, d_x, *[None] * 4


def _plain(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Tensor:
    return depthwise_op(x, weight, None, None, None, None, None, *geometry, 0, 0.0)


input_grad = library.declare(
    f"depthwise_conv2d_input_grad(Tensor grad, Tensor weight, int[] input_size, {_GEOMETRY}) "
    "-> Tensor",
    reference=reference.depthwise_conv2d_input_grad,
    fake=lambda grad, weight, input_size, *_: library.new_output(grad, input_size),
    check=_check_input_grad,
    gpu=f"{_GPU}:depthwise_conv2d_input_grad",
    setup_context=_setup_bilinear,
    backward=_input_grad_backward,
)

weight_grad = library.declare(
    f"depthwise_conv2d_weight_grad(Tensor grad, Tensor x, int[] weight_size, {_GEOMETRY}) "
    "-> Tensor",
    reference=reference.depthwise_conv2d_weight_grad,
    fake=lambda grad, x, weight_size, *_: grad.new_empty(weight_size),
    check=_check_weight_grad,
    gpu=f"{_GPU}:depthwise_conv2d_weight_grad",
    setup_context=_setup_bilinear,
    backward=_weight_grad_backward,
)


def _check_backward(grad, x, weight, stride, padding, dilation, wanted) -> None:
    op = "depthwise_conv2d_backward"
    check_tensor(op, "grad", grad)
    check_tensor(op, "x", x)
    _check_grad(op, grad, x, weight, stride, padding, dilation)
    check_same(op, "grad", grad, x)


def _fake_backward(grad, x, weight, stride, padding, dilation, wanted):
    empty = (0,)
    dx = library.new_output(grad, x.shape) if wanted & _X else grad.new_empty(empty)
    dw = grad.new_empty(weight.shape if wanted & _WEIGHT else empty)
    return dx, dw, grad.new_empty(weight.shape[0] if wanted & _BIAS else empty)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, x, weight, *ctx.geometry, ctx.wanted = inputs
    ctx.save_for_backward(grad, x, weight)


def _backward_backward(ctx: Any, ggx: Tensor, ggw: Tensor, ggb: Tensor) -> tuple[Any, ...]:
    grad, x, weight = ctx.saved_tensors
    geometry, of_x, of_weight = ctx.geometry, ctx.wanted & _X, ctx.wanted & _WEIGHT
    need_grad, need_x, need_weight = ctx.needs_input_grad[:3]
    d_grad = d_x = d_weight = None
    if need_grad:
        terms = [_plain(ggx, weight, geometry)] if of_x else []
        terms += [_plain(x, ggw, geometry)] if of_weight else []
        terms += [ggb.view(1, -1, 1, 1).expand(grad.shape)] if ctx.wanted & _BIAS else []
        d_grad = functools.reduce(torch.add, terms)
    if need_x and of_weight:
        d_x = input_grad(grad, ggw, tuple(x.shape), *geometry)
    if need_weight and of_x:
        d_weight = weight_grad(grad, ggx, tuple(weight.shape), *geometry)
    return d_grad, d_x, d_weight, *[None] * 4


backward_op = library.declare(
    f"depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, {_GEOMETRY}, int wanted) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.depthwise_conv2d_backward,
    fake=_fake_backward,
    check=_check_backward,
    gpu=f"{_GPU}:depthwise_conv2d_backward",
    setup_context=_setup_backward,
    backward=_backward_backward,
)


# The operation itself: its node calls the operation above.
depthwise_op = library.declare(
    f"depthwise_conv2d(Tensor x, Tensor weight, {_EPILOGUE}, Tensor? packed, {_GEOMETRY}, "
    "int activation, float alpha) -> Tensor",
    reference=reference.depthwise_conv2d,
    fake=_fake,
    check=_check,
    gpu=f"{_GPU}:depthwise_conv2d",
    setup_context=_setup,
    backward=_backward,
    nodes=(
        Backward(
            op="depthwise_conv2d_backward",
            arguments="grad 0, x, weight, stride, padding, dilation, wanted",
            gradients=(("x",), ("weight",), ("bias",)),
            formula=_gradients,
            bits={"x": _X, "weight": _WEIGHT, "bias": _BIAS},
            given=dict.fromkeys(("scale", "shift", "residual", "activation"), False),
        ),
    ),
)


def _check_pack(weight: Tensor) -> None:
    check_tensor("depthwise_conv2d_pack", "weight", weight)
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(
            "depthwise_conv2d_pack: weight must be [C * m, 1, R, S], "
            f"got shape {tuple(weight.shape)}"
        )


def _fake_pack(weight: Tensor) -> Tensor:
    k, _, r, s = weight.shape
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    block = reference.BLOCK
    return weight.new_empty((k + block - 1) // block * block * r * s, dtype=dtype)


pack = library.declare(
    "depthwise_conv2d_pack(Tensor weight) -> Tensor",
    reference=reference.depthwise_conv2d_pack,
    fake=_fake_pack,
    check=_check_pack,
    gpu=f"{_GPU}:depthwise_conv2d_pack",
)
