"""Local response normalization: schemas, checks, autograd, and the public function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnarch import arrays, library
from nnarch.nodes import Backward

from . import reference

_GPU = "nnarch.kernels.local_response_norm.triton_kernel"

# --------------------------------------------------------------------------------------- checks


def _check_input(op: str, x: Tensor, size: int) -> None:
    library.check_tensor(op, "input", x)
    if x.dim() < 3:
        raise ValueError(f"{op}: input must have at least 3 dimensions, got {tuple(x.shape)}")
    if not 1 <= size < 2**63:
        raise ValueError(f"{op}: size must be at least 1 and below 2**63, got {size}")


def _check(x: Tensor, size: int, scale: float, beta: float, k: float, relu: bool) -> None:
    _check_input("local_response_norm", x, size)


def _check_grad(
    grad: Tensor, x: Tensor, size: int, scale: float, beta: float, k: float, relu: bool
) -> None:
    op = "local_response_norm_grad"
    _check_input(op, x, size)
    library.check_tensor(op, "grad", grad)
    if grad.shape != x.shape:
        raise ValueError(
            f"{op}: grad must have the shape of input, {tuple(x.shape)}, got {tuple(grad.shape)}"
        )
    library.check_same(op, "grad", grad, x, of="input")


# ------------------------------------------------------------------------------------- autograd


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.arguments = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x,) = ctx.saved_tensors
    return local_response_norm_grad(grad, x, *ctx.arguments), *[None] * 5


# Second derivatives have no kernel: a backward through this operation raises.
local_response_norm_grad = library.declare(
    "local_response_norm_grad(Tensor grad, Tensor x, int size, float scale, float beta, float k, "
    "bool relu) -> Tensor",
    reference=reference.local_response_norm_grad,
    fake=lambda grad, x, *_: library.new_output(x, x.shape),
    check=_check_grad,
    gpu=f"{_GPU}:local_response_norm_grad",
)

local_response_norm_op = library.declare(
    "local_response_norm(Tensor x, int size, float scale, float beta, float k, bool relu)"
    " -> Tensor",
    reference=reference.local_response_norm,
    fake=lambda x, *_: library.new_output(x, x.shape),
    check=_check,
    gpu=f"{_GPU}:local_response_norm",
    setup_context=_setup,
    backward=_backward,
    nodes=(
        Backward(
            op="local_response_norm_grad",
            arguments="grad 0, x, size, scale, beta, k, relu",
            gradients=(("x",),),
            formula=lambda *arguments: (local_response_norm_grad(*arguments),),
        ),
    ),
)


# ------------------------------------------------------------------------------ public function


@arrays.public
def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    alpha_convention: str = "torch",
    input_activation: str | None = None,
) -> Tensor:
    """Every channel over a power of the energy of the channels around it.

    ``y[c] = x[c] / (k + a · Σ x[j]²) ** beta``, summed over ``size`` channels j around c.
    Krizhevsky and others, 2012, ImageNet Classification with Deep Convolutional Neural Networks.

    Args:
        input: ``[N, C, *]`` with at least one further dimension; for ``[N, C, H, W]`` both memory
            formats run as they lie.
        size: channels in a window, ``size // 2`` of them before c.
        alpha: weight of the energy.
        beta: the power; 0.75 and 0.5 are fastest.
        k: added to the energy.
        alpha_convention: "torch" (and Caffe) takes ``a = alpha / size``, so that alpha weighs the
            mean of the squares; "paper" takes ``a = alpha``, which weighs their sum.
        input_activation: "relu" normalizes ``relu(input)`` in the same pass; None the input itself.

    Returns:
        A tensor of the shape, dtype and memory format of `input`. Its gradient has no gradient of
        its own.

    Raises:
        ValueError: fewer than 3 dimensions, a size below 1, an unknown convention or activation.
        TypeError: arguments of the wrong type, `input` not floating point.
    """
    op = "local_response_norm"
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a tensor, got {type(input).__name__}")
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{op}: size must be an int, got {size!r}")
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if alpha_convention not in ("torch", "paper"):
        raise ValueError(
            f"{op}: alpha_convention must be 'torch' or 'paper', got {alpha_convention!r}"
        )
    if input_activation not in (None, "relu"):
        raise ValueError(f"{op}: input_activation must be 'relu' or None, got {input_activation!r}")
    scale = alpha / size if alpha_convention == "torch" and size > 0 else alpha
    return local_response_norm_op(
        input, size, float(scale), float(beta), float(k), input_activation == "relu"
    )
