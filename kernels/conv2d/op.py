"""conv2d: schemas, checks, autograd, and the public function."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.kernels.activation import kinds
from nnarch.kernels.conv2d import reference
from nnarch.kernels.conv2d.geometry import check_conv, output_size, padding_of, two
from nnarch.kernels.depthwise.op import depthwise_op
from nnarch.kernels.depthwise.op import pack as pack_depthwise
from nnarch.kernels.epilogue import (
    check_epilogue,
    check_packed,
    check_tensor,
    epilogue_backward,
    must_split,
    refuse_gradient,
)
from nnarch.kernels.normalization.op import affine, channel_sum
from nnarch.nodes import Backward

_EPILOGUE = "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual"
_GEOMETRY = "int[2] stride, int[4] padding, int[2] dilation, int groups"
# Winograd's output tile: 2×2 and so on, and with stride 2 20 more.
_TILES = {(3, 3): (2, 4, 5, 6), (5, 5): (2,), (1, 3): (2, 4), (3, 1): (2, 4), (1, 1): (2,)}
_STRIDED_TILES = (22, 23, 24)
_GPU = "nnarch.kernels.conv2d.triton_kernel"
_X, _WEIGHT, _BIAS = 1, 2, 4  # what a backward is asked for

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
    groups: int,
    activation: int,
    alpha: float,
) -> None:
    size = check_conv("conv2d", x, weight, stride, padding, dilation, groups)
    check_epilogue("conv2d", x, size, size[1], residual, bias=bias, scale=scale, shift=shift)
    check_packed("conv2d", packed, x)


def _fake(x, weight, bias, scale, shift, residual, packed, stride, padding, dilation, *_):
    size = output_size(x.shape, weight.shape, stride, padding, dilation)
    return library.new_output(x, size, weight)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, scale, _, _, _, *ctx.geometry, ctx.activation, ctx.alpha = inputs
    refuse_gradient("conv2d", ctx.activation)
    ctx.save_for_backward(x, weight, scale, output if ctx.activation else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, scale, y = ctx.saved_tensors
    need_x, need_weight, need_bias, need_scale, need_shift, need_residual = ctx.needs_input_grad[:6]
    db = d_shift = d_residual = None
    if ctx.activation or scale is not None or need_scale or need_shift or need_residual:
        refuse_gradient("conv2d", scale_wanted=need_scale)
        needs = (need_bias, need_shift, need_residual)
        g = epilogue_backward(grad, y, scale, ctx.activation, ctx.alpha, needs)
        grad, db, d_shift, d_residual = g
    elif need_bias:
        db = channel_sum(grad)
    dx, dw, _ = _gradients(grad, x, weight, *ctx.geometry, _X * need_x + _WEIGHT * need_weight)
    return dx, dw, db, None, d_shift, d_residual, *[None] * 7


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, *geometry_and_wanted: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the native conv2d_backward computes, of operations that have gradients themselves."""
    *geometry, wanted = geometry_and_wanted
    dx = input_grad(grad, weight, tuple(x.shape), *geometry) if wanted & _X else None
    dw = weight_grad_of(grad, x, weight, geometry) if wanted & _WEIGHT else None
    return dx, dw, channel_sum(grad) if wanted & _BIAS else None


library.define_native(
    f"conv2d_backward(Tensor grad, Tensor x, Tensor weight, {_GEOMETRY}, int wanted) "
    "-> (Tensor, Tensor, Tensor)"
)

conv2d_op = library.declare(
    f"conv2d(Tensor x, Tensor weight, {_EPILOGUE}, Tensor? packed, {_GEOMETRY}, "
    "int activation, float alpha) -> Tensor",
    reference=reference.conv2d,
    fake=_fake,
    check=_check,
    gpu=f"{_GPU}:conv2d",
    setup_context=_setup,
    backward=_backward,
    nodes=(
        Backward(
            op="conv2d_backward",
            arguments="grad 0, x, weight, stride, padding, dilation, groups, wanted",
            gradients=(("x",), ("weight",), ("bias",)),
            formula=_gradients,
            bits={"x": _X, "weight": _WEIGHT, "bias": _BIAS},
            given=dict.fromkeys(("scale", "shift", "residual", "activation"), False),
        ),
    ),
)

# ------------------------------------------------ its gradients: bilinear maps, closed under theirs


def _check_input_grad(grad, weight, input_size, stride, padding, dilation, groups) -> None:
    x = grad.new_empty(1).expand(tuple(input_size))  # takes no memory
    _check_grad("conv2d_input_grad", grad, x, weight, stride, padding, dilation, groups)


def _check_weight_grad(grad, x, weight_size, stride, padding, dilation, groups, _=False) -> None:
    weight = grad.new_empty(1).expand(tuple(weight_size))
    _check_grad("conv2d_weight_grad", grad, x, weight, stride, padding, dilation, groups)


def _check_grad(op, grad, x, weight, stride, padding, dilation, groups) -> None:
    size = check_conv(op, x, weight, stride, padding, dilation, groups)
    if tuple(grad.shape) != size:
        raise ValueError(f"{op}: grad must have the shape {size}, got {tuple(grad.shape)}")
    if grad.dtype != x.dtype:
        raise TypeError(f"{op}: grad must be {x.dtype}, got {grad.dtype}")


def _setup_bilinear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.size, *ctx.geometry = inputs
    ctx.save_for_backward(a, b)


def _input_grad_backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    need_grad, need_weight = ctx.needs_input_grad[:2]
    d_grad = _plain(gg, weight, ctx.geometry) if need_grad else None
    d_weight = weight_grad_of(grad, gg, weight, ctx.geometry) if need_weight else None
    return d_grad, d_weight, *[None] * 5


def _setup_weight_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _setup_bilinear(ctx, inputs[:7], output)


def _weight_grad_backward(ctx: Any, gg: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    need_grad, need_x = ctx.needs_input_grad[:2]
    d_grad = _plain(x, gg, ctx.geometry) if need_grad else None
    d_x = input_grad(grad, gg, tuple(x.shape), *ctx.geometry) if need_x else None
    return d_grad, d_x, *[None] * 6


def weight_grad_of(grad: Tensor, x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Tensor:
    """The gradient of `weight` in its memory format: autograd would copy any other."""
    return weight_grad(grad, x, tuple(weight.shape), *geometry, _is_channels_last(weight))


def _is_channels_last(t: Tensor) -> bool:
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def _fake_weight_grad(grad, x, weight_size, stride, padding, dilation, groups, channels_last=False):
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return grad.new_empty(weight_size).contiguous(memory_format=memory_format)


def _plain(x: Tensor, weight: Tensor, geometry: Sequence[Any]) -> Tensor:
    return conv2d_op(x, weight, None, None, None, None, None, *geometry, 0, 0.0)


input_grad = library.declare(
    f"conv2d_input_grad(Tensor grad, Tensor weight, int[] input_size, {_GEOMETRY}) -> Tensor",
    reference=reference.conv2d_input_grad,
    fake=lambda grad, weight, input_size, *_: library.new_output(grad, input_size),
    check=_check_input_grad,
    gpu=f"{_GPU}:conv2d_input_grad",
    setup_context=_setup_bilinear,
    backward=_input_grad_backward,
)

weight_grad = library.declare(
    f"conv2d_weight_grad(Tensor grad, Tensor x, int[] weight_size, {_GEOMETRY}, "
    "bool channels_last=False) -> Tensor",
    reference=reference.conv2d_weight_grad,
    fake=_fake_weight_grad,
    check=_check_weight_grad,
    gpu=f"{_GPU}:conv2d_weight_grad",
    setup_context=_setup_weight_grad,
    backward=_weight_grad_backward,
)


def _check_pack(weight: Tensor, groups: int, tile: int) -> None:
    check_tensor("conv2d_pack", "weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"conv2d_pack: weight must be 4-D, got shape {tuple(weight.shape)}")
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(
            f"conv2d_pack: groups must divide the {weight.shape[0]} output channels, got {groups}"
        )
    if tile == 0:
        return
    tiles = (0,)
    if weight.dtype != torch.float64:
        tiles += next((t for kernel, t in _TILES.items() if weight.shape[2:] == kernel), ())
        if len(tiles) > 2 and weight.shape[1] % 16 == 0:  # three taps a side
            tiles += _STRIDED_TILES
    if tile not in tiles:
        raise ValueError(
            f"conv2d_pack: tile must be one of {tiles} for a weight of {tuple(weight.shape)}, "
            f"{weight.dtype}, got {tile}"
        )


def _fake_pack(weight: Tensor, groups: int, tile: int) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty(size)


pack = library.declare(
    "conv2d_pack(Tensor weight, int groups, int tile) -> Tensor",
    reference=reference.conv2d_pack,
    fake=_fake_pack,
    check=_check_pack,
    gpu=f"{_GPU}:conv2d_pack",
)

# ------------------------------------------------------------------------------- public functions


@arrays.public_lower_precision
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: kinds.Activation = None,
    packed: Tensor | None = None,
) -> Tensor:
    """2-D convolution and its epilogue: act(scale·(conv(x, weight) + bias) + shift + residual).

    The first seven arguments are those of :func:`torch.nn.functional.conv2d`.

    Args:
        x: [N, C, H, W] or [C, H, W].
        weight: [K, C / groups, R, S].
        bias, scale, shift: [K] or None.
        stride, dilation: one number, or (vertical, horizontal), in pixels.
        padding: one number, (vertical, horizontal), (top, left, bottom, right), "valid" or "same"
            (stride 1 only).
        groups: input and output channels are cut into this many independent parts. Where it is C,
            the depthwise kernels run.
        residual: of the output's shape, added before the activation; or None.
        activation: None, a name ("relu", "silu", …) or ("leaky_relu", slope).
        packed: what :func:`pack_conv2d_weight` made of `weight`; or None.

    Returns:
        [N, K, H', W'] in the memory format of `x`, H' = (H + top + bottom − dilation·(R − 1) − 1)
        // stride + 1.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    code, alpha = (0, 0.0) if activation is None else kinds.encode(activation, "conv2d")
    if x.dim() == 3:
        y = conv2d(
            x.unsqueeze(0), weight, bias, stride, padding, dilation, groups, scale=scale,
            shift=shift, residual=None if residual is None else residual.unsqueeze(0),
            activation=activation, packed=packed,
        )  # fmt: skip
        return y.squeeze(0)
    steps = stride if type(stride) is tuple and len(stride) == 2 else two(stride)
    gaps = dilation if type(dilation) is tuple and len(dilation) == 2 else two(dilation)
    if type(padding) is tuple and len(padding) == 4:
        pads = padding
    else:
        pads = padding_of(padding, weight, steps, gaps)
    if groups != 1 and is_depthwise(x, weight, groups):
        run, geometry = depthwise_op, (steps, pads, gaps)
    else:
        run, geometry = conv2d_op, (steps, pads, gaps, groups)
    if (code or scale is not None) and must_split(code, x, weight, bias, scale, shift, residual):
        z = run(x, weight, bias, None, None, None, packed, *geometry, 0, 0.0)
        return affine(z, scale, shift, residual, code, alpha)
    return run(x, weight, bias, scale, shift, residual, packed, *geometry, code, alpha)


def is_depthwise(x: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether every input channel is a group of its own."""
    return x.dim() == 4 and groups == x.shape[1] and weight.dim() == 4 and weight.shape[1] == 1


def conv2d_tile(
    weight: Tensor,
    input_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> int:
    """How :func:`pack_conv2d_weight` should pack `weight` for inputs of this size: its `tile`.

    Args:
        weight: [K, C / groups, R, S] on the CPU.
        input_size: [N, C, H, W] of the input.
        stride, padding, dilation, groups: as in :func:`conv2d`.

    Returns:
        0 for the direct product, or the size m of the m × m output tiles with which Winograd's
        algorithm is faster and :func:`nnarch.set_precision` allows it; with stride 2 m + 20. For
        1×1 kernels 2: Strassen's product of pairs of pixels.
    """
    steps, gaps = two(stride), two(dilation)
    pads = padding_of(padding, weight, steps, gaps)
    x = weight.new_empty(1).expand(tuple(input_size))  # takes no memory
    check_conv("conv2d_tile", x, weight, steps, pads, gaps, groups)
    if library.native is None or weight.device.type != "cpu" or weight.dtype == torch.float64:
        return 0
    if is_depthwise(x, weight, groups):
        return 0
    if weight.dtype != torch.float32 and weight.shape[2:] == (1, 1):
        return 0  # bfloat16 has products of its own, and float16 is converted block by block
    numbers = (*x.shape, *weight.shape, *steps, *pads, *gaps, groups)
    return library.native.nnarch_conv2d_tile((ctypes.c_int64 * len(numbers))(*numbers))


def pack_conv2d_weight(weight: Tensor, groups: int = 1, *, tile: int = 0) -> Tensor | None:
    """The weight in the order that the native kernels read, to pass as `packed=` again and again.

    Args:
        weight: [K, C / groups, R, S] on the CPU; its values must not change afterwards.
        groups: as in :func:`conv2d`.
        tile: what :func:`conv2d_tile` says; 0 serves every input.

    Returns:
        An opaque tensor; None where no native kernel runs (another device).
    """
    check_tensor("pack_conv2d_weight", "weight", weight)
    if not isinstance(groups, int):
        raise TypeError(f"pack_conv2d_weight: groups must be an int, got {groups!r}")
    if weight.device.type != "cpu" or library.native is None:
        return None
    if groups > 1 and weight.dim() == 4 and weight.shape[1] == 1:
        return pack_depthwise(weight.detach())
    return pack(weight.detach(), groups, tile)
