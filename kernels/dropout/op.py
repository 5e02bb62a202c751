"""The dropout operation: schema, checks, autograd, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.nodes import Backward

from . import reference
from .seed import check_dropout, draw_seed


def _check(x: Tensor, seed: Tensor, p: float) -> None:
    library.check_tensor("dropout", "x", x)
    check_dropout("dropout", seed, p, x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return dropout_op(grad, seed, ctx.p), None, None


# Linear in x: its gradient is itself, with the mask made again from the seed.
dropout_op = library.declare(
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    reference=reference.dropout,
    fake=lambda x, seed, p: library.new_output(x, x.shape),
    check=_check,
    gpu="nnarch.kernels.dropout.triton_kernel:dropout",
    setup_context=_setup,
    backward=_backward,
    nodes=(
        Backward(
            op="dropout",
            arguments="grad 0, seed, p",
            gradients=(("x",),),
            formula=lambda *arguments: (dropout_op(*arguments),),
        ),
    ),
)


@arrays.public
def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Zero each element with probability p and multiply the others by 1/(1 - p).

    The signature of :func:`torch.nn.functional.dropout`. No mask is kept: whether an element is
    dropped follows from its place and a seed, which comes from torch's generator, so that
    ``torch.manual_seed`` decides it; the backward makes the mask again. Any number of threads and
    every backend drop the same elements.

    Args:
        input: any shape, floating point.
        p: probability of an element to be zeroed, 0 to 1.
        training: whether to drop anything; else `input` is returned.
        inplace: whether to overwrite `input`.

    Returns:
        A tensor of the shape, dtype and memory format of `input`.

    Raises:
        ValueError: p outside [0, 1].
        TypeError: `input` is not floating point.

    Source: Srivastava et al., 2014, Dropout.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p must be between 0 and 1, got {p!r}")
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"dropout: input must be a tensor, got {type(input).__name__}")
    if not training or p == 0:
        return input
    y = dropout_op(input, draw_seed(input), float(p))
    return input.copy_(y) if inplace else y
