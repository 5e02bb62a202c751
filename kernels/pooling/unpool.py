"""Max unpooling: schema, checks, autograd, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library

from . import checks, reference
from .maximum import max_pool2d_gather

IntOrPair = int | Sequence[int]


def _check(x: Tensor, indices: Tensor, output_size: Sequence[int]) -> None:
    op = "max_unpool2d"
    checks.image(op, x)
    if not isinstance(indices, Tensor):
        raise TypeError(f"{op}: indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"{op}: indices must be torch.int64, got {indices.dtype}")
    if indices.shape != x.shape:
        raise ValueError(
            f"{op}: indices must have the shape of input, {tuple(x.shape)}, "
            f"got {tuple(indices.shape)}"
        )
    library.check_device(op, "indices", indices, x, of="input")
    if len(output_size) != 2 or min(output_size) < 1:
        raise ValueError(f"{op}: output_size must be positive, got {tuple(output_size)}")
    if indices.device.type != "cpu" or type(indices) is not Tensor or indices.numel() == 0:
        return  # looking at values would stall a GPU, and a fake tensor has none
    low, high = (int(v) for v in torch.aminmax(indices))
    if low < 0 or high >= output_size[0] * output_size[1]:
        raise ValueError(
            f"{op}: indices must lie in an output of {tuple(output_size)}, got {low} to {high}"
        )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return max_pool2d_gather(grad, indices), None, None


max_unpool2d_op = library.declare(
    "max_unpool2d(Tensor x, Tensor indices, SymInt[2] output_size) -> Tensor",
    reference=reference.max_unpool2d,
    fake=lambda x, indices, size: library.new_output(x, (*x.shape[:2], *size)),
    check=_check,
    gpu="nnarch.kernels.pooling.triton_kernel:max_unpool2d",
    setup_context=_setup,
    backward=_backward,
)


@arrays.public
def max_unpool2d(
    input: Tensor,
    indices: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    output_size: Sequence[int] | None = None,
) -> Tensor:
    """Maxima back where they were, zeros elsewhere, as torch.nn.functional.max_unpool2d.

    Args:
        input: ``[N, C, H, W]`` or ``[C, H, W]``.
        indices: positions ``h * W + w`` in the output, int64, as max_pool2d returns them. Of
            several equal ones the last counts, on a GPU too.
        kernel_size: of the pooling that is undone; with the next two it says how large the output
            is.
        stride: of it, `kernel_size` where None.
        padding: of it.
        output_size: height and width, or all sizes, of the output: less than `stride` away from
            ``(H - 1) * stride + kernel_size - 2 * padding``, which is taken where None.

    Returns:
        A tensor in the dtype and memory format of `input`. Every input's gradient is that of the
        output at its index.

    Raises:
        ValueError: sizes that do not fit, an index outside the output (on a GPU it is dropped).
        TypeError: arguments of the wrong type, `input` not floating point.
    """
    op = "max_unpool2d"
    checks.tensor(op, input)
    kernel = checks.pair(op, "kernel_size", kernel_size)
    steps = kernel if stride is None else checks.pair(op, "stride", stride)
    pads = checks.pair(op, "padding", padding)
    height, width = _output_size(op, input, kernel, steps, pads, output_size)
    if input.dim() != 3:
        return max_unpool2d_op(input, indices, (height, width))
    checks.tensor(op, indices, "indices")
    return max_unpool2d_op(input[None], indices[None], (height, width))[0]


def _output_size(
    op: str,
    input: Tensor,
    kernel: checks.Pair,
    stride: checks.Pair,
    padding: checks.Pair,
    output_size: Sequence[int] | None,
) -> tuple[int, int]:
    if input.dim() not in (3, 4):
        checks.image(op, input)
    default = [(input.shape[i - 2] - 1) * stride[i] + kernel[i] - 2 * padding[i] for i in (0, 1)]
    if output_size is None:
        return default[0], default[1]
    if not isinstance(output_size, (tuple, list)):
        raise TypeError(f"{op}: output_size must be a sequence of ints, got {output_size!r}")
    sizes = output_size[2:] if len(output_size) == 4 else output_size
    if len(sizes) != 2:
        raise ValueError(f"{op}: output_size must have 2 or 4 sizes, got {tuple(output_size)}")
    height, width = checks.pair(op, "output_size", tuple(sizes))
    for size, usual, step in zip((height, width), default, stride, strict=True):
        if not usual - step < size < usual + step:
            raise ValueError(
                f"{op}: output_size must be less than stride {stride} away from {tuple(default)}, "
                f"got {(height, width)}"
            )
    return height, width
