"""The pooling operations: schemas, autograd, and the public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nnarch import library

from . import checks, reference
from .checks import Pair

_GPU = "nnarch.kernels.pooling.triton_kernel"

IntOrPair = int | Sequence[int]

# ------------------------------------------------------------------------------------- maximum


def _with_indices(x: Tensor, size: Pair, return_indices: bool) -> tuple[Tensor, Tensor]:
    y = library.new_output(x, (*x.shape[:2], *size))
    if return_indices:
        return y, torch.empty_like(y, dtype=torch.int64)
    return y, x.new_empty(0, dtype=torch.int64)


def _fake_max(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    return_indices: bool,
) -> tuple[Tensor, Tensor]:
    size = checks.output_size("max_pool2d", x.shape, kernel, stride, padding, dilation, ceil_mode)
    return _with_indices(x, size, return_indices)


def _fake_adaptive_max(x: Tensor, output_size: Pair, return_indices: bool) -> tuple[Tensor, Tensor]:
    return _with_indices(x, output_size, return_indices)


def _setup_max(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.arguments, return_indices = inputs
    ctx.shape = x.shape
    ctx.mark_non_differentiable(output[1])
    # Without indices the backward pass takes the forward's input to find them.
    ctx.has_indices = return_indices
    ctx.save_for_backward(output[1] if return_indices else x)


def _max_backward(op: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        indices = saved if ctx.has_indices else op()(saved.detach(), *ctx.arguments, True)[1]
        dx = max_pool2d_input_grad(grad, indices, ctx.shape)
        return dx, *[None] * (len(ctx.arguments) + 1)

    return backward


def _setup_input_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, indices, _ = inputs
    ctx.save_for_backward(indices)


def _input_grad_backward(ctx: Any, gradgrad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return max_pool2d_gather(gradgrad, indices), None, None


def _setup_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, indices = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(indices)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return max_pool2d_input_grad(grad, indices, ctx.shape), None


def _fake_taps(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    size = checks.output_size(
        "max_pool2d_taps", x.shape, kernel, stride, padding, dilation, ceil_mode
    )
    y = library.new_output(x, (*x.shape[:2], *size))
    return y, torch.empty_like(y, dtype=torch.uint8)


def _setup_taps(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.arguments = inputs
    ctx.shape = x.shape
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _taps_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    (taps,) = ctx.saved_tensors
    return max_pool2d_taps_grad(grad, taps, ctx.shape, *ctx.arguments), *[None] * 5


def _setup_taps_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, taps, ctx.shape, *ctx.arguments = inputs
    ctx.save_for_backward(taps)


def _taps_grad_backward(ctx: Any, gradgrad: Tensor) -> tuple[Tensor | None, ...]:
    (taps,) = ctx.saved_tensors
    positions = reference.max_pool2d_positions(taps, ctx.shape, *ctx.arguments[:4])
    return max_pool2d_gather(gradgrad, positions), *[None] * 7


max_pool2d_op = library.declare(
    "max_pool2d(Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
    "bool ceil_mode, bool return_indices) -> (Tensor y, Tensor indices)",
    reference=reference.max_pool2d,
    fake=_fake_max,
    check=checks.max_pool2d,
    gpu=f"{_GPU}:max_pool2d",
    setup_context=_setup_max,
    backward=_max_backward(lambda: max_pool2d_op),
)

max_pool2d_taps_op = library.declare(
    "max_pool2d_taps(Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, "
    "bool ceil_mode) -> (Tensor y, Tensor taps)",
    reference=reference.max_pool2d_taps,
    fake=_fake_taps,
    check=checks.max_pool2d_taps,
    gpu=f"{_GPU}:max_pool2d_taps",
    setup_context=_setup_taps,
    backward=_taps_backward,
)

max_pool2d_taps_grad = library.declare(
    "max_pool2d_taps_grad(Tensor grad, Tensor taps, int[] input_size, int[2] kernel, "
    "int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode) -> Tensor",
    reference=reference.max_pool2d_taps_grad,
    fake=lambda grad, taps, input_size, *_: library.new_output(grad, input_size),
    check=checks.max_pool2d_taps_grad,
    gpu=f"{_GPU}:max_pool2d_taps_grad",
    setup_context=_setup_taps_grad,
    backward=_taps_grad_backward,
)

adaptive_max_pool2d_op = library.declare(
    "adaptive_max_pool2d(Tensor x, int[2] output_size, bool return_indices) "
    "-> (Tensor y, Tensor indices)",
    reference=reference.adaptive_max_pool2d,
    fake=_fake_adaptive_max,
    check=checks.adaptive_max_pool2d,
    gpu=f"{_GPU}:adaptive_max_pool2d",
    setup_context=_setup_max,
    backward=_max_backward(lambda: adaptive_max_pool2d_op),
)

max_pool2d_input_grad = library.declare(
    "max_pool2d_input_grad(Tensor grad, Tensor indices, int[] input_size) -> Tensor",
    reference=reference.max_pool2d_input_grad,
    fake=lambda grad, indices, input_size: library.new_output(grad, input_size),
    check=checks.max_pool2d_input_grad,
    gpu=f"{_GPU}:max_pool2d_input_grad",
    setup_context=_setup_input_grad,
    backward=_input_grad_backward,
)

max_pool2d_gather = library.declare(
    "max_pool2d_gather(Tensor x, Tensor indices) -> Tensor",
    reference=reference.max_pool2d_gather,
    fake=lambda x, indices: library.new_output(x, indices.shape),
    check=checks.max_pool2d_gather,
    gpu=f"{_GPU}:max_pool2d_gather",
    setup_context=_setup_gather,
    backward=_gather_backward,
)

# ------------------------------------------------------------------------------------- average


def _fake_avg(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, ceil_mode: bool, *_: Any
) -> Tensor:
    size = checks.output_size("avg_pool2d", x.shape, kernel, stride, padding, (1, 1), ceil_mode)
    return library.new_output(x, (*x.shape[:2], *size))


def _setup_avg(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.arguments = inputs
    ctx.shape = x.shape


def _avg_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return avg_pool2d_input_grad(grad, ctx.shape, *ctx.arguments), *[None] * 6


def _setup_avg_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *ctx.arguments = inputs


def _avg_grad_backward(ctx: Any, gradgrad: Tensor) -> tuple[Tensor | None, ...]:
    return avg_pool2d_op(gradgrad, *ctx.arguments), *[None] * 7


def _adaptive_avg_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if tuple(grad.shape[2:]) == (1, 1):  # every input of a global average has the same gradient
        return (grad / (ctx.shape[2] * ctx.shape[3])).expand(ctx.shape), None
    return adaptive_avg_pool2d_input_grad(grad, ctx.shape), None


def _setup_adaptive_avg_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.output_size = inputs[0].shape[2:]


def _adaptive_avg_grad_backward(ctx: Any, gradgrad: Tensor) -> tuple[Tensor | None, ...]:
    return adaptive_avg_pool2d_op(gradgrad, ctx.output_size), None


avg_pool2d_op = library.declare(
    "avg_pool2d(Tensor x, int[2] kernel, int[2] stride, int[2] padding, bool ceil_mode, "
    "bool count_include_pad, int? divisor_override) -> Tensor",
    reference=reference.avg_pool2d,
    fake=_fake_avg,
    check=checks.avg_pool2d,
    gpu=f"{_GPU}:avg_pool2d",
    setup_context=_setup_avg,
    backward=_avg_backward,
)

avg_pool2d_input_grad = library.declare(
    "avg_pool2d_input_grad(Tensor grad, int[] input_size, int[2] kernel, int[2] stride, "
    "int[2] padding, bool ceil_mode, bool count_include_pad, int? divisor_override) -> Tensor",
    reference=reference.avg_pool2d_input_grad,
    fake=lambda grad, input_size, *_: library.new_output(grad, input_size),
    check=checks.avg_pool2d_input_grad,
    gpu=f"{_GPU}:avg_pool2d_input_grad",
    setup_context=_setup_avg_grad,
    backward=_avg_grad_backward,
)

adaptive_avg_pool2d_op = library.declare(
    "adaptive_avg_pool2d(Tensor x, int[2] output_size) -> Tensor",
    reference=reference.adaptive_avg_pool2d,
    fake=lambda x, output_size: library.new_output(x, (*x.shape[:2], *output_size)),
    check=checks.adaptive_avg_pool2d,
    gpu=f"{_GPU}:adaptive_avg_pool2d",
    setup_context=_setup_avg,
    backward=_adaptive_avg_backward,
)

adaptive_avg_pool2d_input_grad = library.declare(
    "adaptive_avg_pool2d_input_grad(Tensor grad, int[] input_size) -> Tensor",
    reference=reference.adaptive_avg_pool2d_input_grad,
    fake=lambda grad, input_size: library.new_output(grad, input_size),
    check=checks.adaptive_avg_pool2d_input_grad,
    gpu=f"{_GPU}:adaptive_avg_pool2d_input_grad",
    setup_context=_setup_adaptive_avg_grad,
    backward=_adaptive_avg_grad_backward,
)

# ----------------------------------------------------------------------------- public functions


@library.public
def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The maximum over windows, as torch.nn.functional.max_pool2d.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        kernel_size: height and width of a window, in taps.
        stride: distance between windows, `kernel_size` where None.
        padding: rows and columns of -inf around the input, at most half of `kernel_size`.
        dilation: distance between the taps of a window.
        ceil_mode: whether a last window may reach past the input.
        return_indices: whether to return also where the maxima are.

    Returns:
        The maxima; with `return_indices` also their positions ``h * W + w``, int64, -1 for a
        window of padding alone. The first of equal values counts; a NaN is larger than anything.

    Raises:
        ValueError: sizes that do not fit.
        TypeError: arguments of the wrong type, `input` not floating point.
    """
    op = "max_pool2d"
    kernel = checks.pair(op, "kernel_size", kernel_size)
    steps = _stride(op, stride, kernel)
    arguments = (
        kernel,
        steps,
        checks.pair(op, "padding", padding),
        checks.pair(op, "dilation", dilation),
        ceil_mode,
    )
    if not return_indices and kernel[0] * kernel[1] <= checks.MOST_TAPS:
        x = _batched(op, input)
        if x.requires_grad and torch.is_grad_enabled():
            # A byte for every maximum where an index takes eight.
            y = max_pool2d_taps_op(x, *arguments)[0]
            return y if x is input else y.squeeze(0)
    return _maximum(op, max_pool2d_op, input, arguments, return_indices)


@library.public
def adaptive_max_pool2d(
    input: Tensor,
    output_size: int | Sequence[int | None] | None,
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The maximum over windows that divide the input evenly.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        output_size: height and width of the output; None keeps that of the input.
        return_indices: whether to return also where the maxima are.

    Returns:
        As :func:`max_pool2d`.

    Raises:
        ValueError: sizes that do not fit.
        TypeError: arguments of the wrong type, `input` not floating point.
    """
    op = "adaptive_max_pool2d"
    checks.tensor(op, input)
    size = _adaptive_size(op, output_size, input)
    return _maximum(op, adaptive_max_pool2d_op, input, (size,), return_indices)


@library.public
def avg_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """The average over windows, as torch.nn.functional.avg_pool2d.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        kernel_size: height and width of a window.
        stride: distance between windows, `kernel_size` where None.
        padding: rows and columns of zeros around the input, at most half of `kernel_size`.
        ceil_mode: whether a last window may reach past the input.
        count_include_pad: whether the divisor counts padding.
        divisor_override: the divisor itself, instead of the window's size.

    Returns:
        The averages, in the dtype and memory format of `input`.

    Raises:
        ValueError: sizes that do not fit, or a divisor of 0.
        TypeError: arguments of the wrong type, `input` not floating point.
    """
    op = "avg_pool2d"
    kernel = checks.pair(op, "kernel_size", kernel_size)
    steps = _stride(op, stride, kernel)
    pads = checks.pair(op, "padding", padding)
    x = _batched(op, input)
    y = avg_pool2d_op(x, kernel, steps, pads, ceil_mode, count_include_pad, divisor_override)
    return y if x is input else y.squeeze(0)


@library.public
def adaptive_avg_pool2d(input: Tensor, output_size: int | Sequence[int | None] | None) -> Tensor:
    """The average over windows that divide the input evenly; output size 1 is global pooling.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        output_size: height and width of the output; None keeps that of the input.

    Returns:
        The averages, in the dtype and memory format of `input`.

    Raises:
        ValueError: sizes that do not fit.
        TypeError: arguments of the wrong type, `input` not floating point.
    """
    op = "adaptive_avg_pool2d"
    x = _batched(op, input)
    size = _adaptive_size(op, output_size, input)
    y = adaptive_avg_pool2d_op(x, size)
    return y if x is input else y.squeeze(0)


def _maximum(
    op: str,
    run: Callable[..., tuple[Tensor, Tensor]],
    input: Tensor,
    arguments: tuple[Any, ...],
    return_indices: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    x = _batched(op, input)
    # A gradient goes where the maxima were.
    wanted = return_indices or (x.requires_grad and torch.is_grad_enabled())
    y, indices = run(x, *arguments, wanted)
    if x is not input:
        y, indices = y.squeeze(0), indices.squeeze(0) if wanted else indices
    return (y, indices) if return_indices else y


def _batched(op: str, input: Tensor) -> Tensor:
    """`input` with a batch dimension: [C, H, W] becomes [1, C, H, W]."""
    checks.tensor(op, input)
    return input.unsqueeze(0) if input.dim() == 3 else input


def _stride(op: str, stride: IntOrPair | None, kernel: Pair) -> Pair:
    if stride is None or (not isinstance(stride, int) and len(stride) == 0):
        return kernel
    return checks.pair(op, "stride", stride)


def _adaptive_size(op: str, output_size: int | Sequence[int | None] | None, input: Tensor) -> Pair:
    if type(output_size) is int:
        return output_size, output_size
    sizes = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
    if len(sizes) == 2 and None in sizes:
        sizes = tuple(i if o is None else o for i, o in zip(input.shape[-2:], sizes, strict=False))
    return checks.pair(op, "output_size", sizes)
