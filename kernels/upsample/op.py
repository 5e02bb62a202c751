"""Upsampling: schemas, checks, autograd, and the public functions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from nnarch import arrays, library
from nnarch.nodes import Backward

from . import reference

_GPU = "nnarch.kernels.upsample.triton_kernel"

MODES = ("nearest", "bilinear")
"""What has kernels; torch.nn.functional.interpolate knows more."""

Sizes = int | Sequence[int]
Scales = float | Sequence[float]

# --------------------------------------------------------------------------------------- checks


def _check_image(op: str, name: str, x: Tensor) -> None:
    library.check_tensor(op, name, x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(
            f"{op}: {name} must be [N, C, H, W], with no size but N being 0, "
            f"got shape {tuple(x.shape)}"
        )


def _check(
    x: Tensor,
    output_size: Sequence[int],
    bilinear: bool,
    align_corners: bool,
    scale_h: float,
    scale_w: float,
) -> None:
    op = "upsample2d"
    _check_image(op, "input", x)
    if any(type(size) is int and size >= 2**63 for size in output_size):
        raise ValueError(f"{op}: the output's sizes must be below 2**63, got {tuple(output_size)}")
    if len(output_size) != 2 or min(output_size) < 1:
        raise ValueError(
            f"{op}: the output must have at least one row and column, got {tuple(output_size)}"
        )


def _check_grad(
    grad: Tensor,
    input_size: Sequence[int],
    bilinear: bool,
    align_corners: bool,
    scale_h: float,
    scale_w: float,
) -> None:
    op = "upsample2d_input_grad"
    _check_image(op, "grad", grad)
    if len(input_size) != 4 or tuple(input_size[:2]) != tuple(grad.shape[:2]):
        raise ValueError(
            f"{op}: input_size must be (N, C, H, W) with grad's N and C, {tuple(grad.shape)}, "
            f"got {tuple(input_size)}"
        )
    if min(input_size[2:]) < 1:
        raise ValueError(f"{op}: input_size must be positive, got {tuple(input_size)}")


# ------------------------------------------------------------------------------------- autograd


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, *ctx.arguments = inputs
    ctx.shape = tuple(x.shape)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return upsample2d_input_grad(grad, ctx.shape, *ctx.arguments), *[None] * 5


def _setup_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, _, *ctx.arguments = inputs
    ctx.size = grad.shape[2:]


def _grad_backward(ctx: Any, gradgrad: Tensor) -> tuple[Tensor | None, ...]:
    return upsample2d_op(gradgrad, ctx.size, *ctx.arguments), *[None] * 5


def _fake(x: Tensor, output_size: Sequence[int], *_: Any) -> Tensor:
    return library.new_output(x, (*x.shape[:2], *output_size))


# A scale of 0 is none: the distance of sources then follows from the sizes.
upsample2d_input_grad = library.declare(
    "upsample2d_input_grad(Tensor grad, SymInt[] input_size, bool bilinear, bool align_corners, "
    "float scale_h, float scale_w) -> Tensor",
    reference=reference.upsample2d_input_grad,
    fake=lambda grad, input_size, *_: library.new_output(grad, input_size),
    check=_check_grad,
    gpu=f"{_GPU}:upsample2d_input_grad",
    setup_context=_setup_grad,
    backward=_grad_backward,
)

upsample2d_op = library.declare(
    "upsample2d(Tensor x, SymInt[2] output_size, bool bilinear, bool align_corners, "
    "float scale_h, float scale_w) -> Tensor",
    reference=reference.upsample2d,
    fake=_fake,
    check=_check,
    gpu=f"{_GPU}:upsample2d",
    setup_context=_setup,
    backward=_backward,
    nodes=(
        Backward(
            op="upsample2d_input_grad",
            arguments="grad 0, sizes x, bilinear, align_corners, scale_h, scale_w",
            gradients=(("x",),),
            formula=lambda *arguments: (upsample2d_input_grad(*arguments),),
        ),
    ),
)

# ----------------------------------------------------------------------------- public functions


@arrays.public
def interpolate(
    input: Tensor,
    size: Sizes | None = None,
    scale_factor: Scales | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Images of another size, as torch.nn.functional.interpolate, nearest and bilinear.

    Args:
        input: ``[N, C, H, W]``.
        size: height and width of the output, or one number for both.
        scale_factor: of height and width, or one number for both, instead of `size`; sizes are
            rounded down.
        mode: "nearest" or "bilinear".
        align_corners: of bilinear: whether the centres of the corner pixels stay where they are,
            rather than the corners of the image.
        recompute_scale_factor: whether positions follow from the rounded sizes rather than from
            `scale_factor`.
        antialias: only False.

    Returns:
        A tensor in the dtype and memory format of `input`.

    Raises:
        NotImplementedError: another mode, other than 4 dimensions, or antialias.
        ValueError: sizes that do not fit, not exactly one of `size` and `scale_factor`.
        TypeError: arguments of the wrong type, `input` not floating point.
    """
    return _interpolate(
        "interpolate",
        input,
        size,
        scale_factor,
        mode,
        align_corners,
        recompute_scale_factor,
        antialias,
    )


@arrays.public
def upsample(
    input: Tensor,
    size: Sizes | None = None,
    scale_factor: Scales | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> Tensor:
    """Images of another size; see :func:`interpolate`, which torch prefers.

    Args:
        input: ``[N, C, H, W]``.
        size: height and width of the output, or one number for both.
        scale_factor: of height and width, or one number for both, instead of `size`.
        mode: "nearest" or "bilinear".
        align_corners: of bilinear, as :func:`interpolate`.

    Returns:
        A tensor in the dtype and memory format of `input`.

    Raises:
        NotImplementedError, ValueError, TypeError: as :func:`interpolate`.
    """
    return _interpolate("upsample", input, size, scale_factor, mode, align_corners, None, False)


def check_mode(op: str, mode: str) -> None:
    """Raise unless there are kernels for `mode`."""
    if not isinstance(mode, str):
        raise TypeError(f"{op}: mode must be a string, got {mode!r}")
    if mode not in MODES:
        raise NotImplementedError(
            f"{op}: mode must be 'nearest' or 'bilinear', got {mode!r}; "
            "torch.nn.functional.interpolate has other modes"
        )


def _interpolate(
    op: str,
    x: Tensor,
    size: Sizes | None,
    scale_factor: Scales | None,
    *options: Any,
) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: input must be a tensor, got {type(x).__name__}")
    # What the arguments mean is worked out once: it takes 3 µs.
    plan = _plan if is_compiling() else _remembered_plan
    try:
        arguments = plan(op, x.shape, size, scale_factor, *options)
    except TypeError:  # lists, and what is wrong
        arguments = _plan(op, x.shape, size, scale_factor, *options)
    return upsample2d_op(x, *arguments)


def _plan(
    op: str,
    shape: Sequence[int],
    size: Sizes | None,
    scale_factor: Scales | None,
    mode: str,
    align_corners: bool | None,
    recompute_scale_factor: bool | None,
    antialias: bool,
) -> tuple[Any, ...]:
    """The operation's arguments after its input."""
    check_mode(op, mode)
    if len(shape) != 4:
        raise NotImplementedError(
            f"{op}: input must be [N, C, H, W], got shape {tuple(shape)}; "
            "torch.nn.functional.interpolate takes 3 and 5 dimensions"
        )
    if antialias:
        raise NotImplementedError(f"{op}: antialias must be False, got {antialias!r}")
    if mode == "nearest" and align_corners is not None:
        raise ValueError(f"{op}: align_corners is for bilinear, got {align_corners!r} with nearest")
    if (size is None) == (scale_factor is None):
        raise ValueError(
            f"{op}: one of size and scale_factor is needed, got {size!r} and {scale_factor!r}"
        )
    if recompute_scale_factor and size is not None:
        raise ValueError(f"{op}: recompute_scale_factor needs scale_factor, got size {size!r}")
    scales = (0.0, 0.0)
    if scale_factor is None:
        output_size = _sizes(op, size)
    else:
        factors = _factors(op, scale_factor)
        output_size = int(shape[2] * factors[0]), int(shape[3] * factors[1])
        scales = scales if recompute_scale_factor else factors
    return output_size, mode == "bilinear", bool(align_corners), *scales


_remembered_plan = functools.lru_cache(256, typed=True)(_plan)


def _sizes(op: str, size: Any) -> tuple[Any, Any]:
    values = size if isinstance(size, (tuple, list)) else (size, size)
    if len(values) != 2:
        raise ValueError(f"{op}: size must be a number or two, got {size!r}")
    if any(isinstance(v, (bool, float, str)) or not hasattr(v, "__index__") for v in values):
        raise TypeError(f"{op}: size must be an int or two, got {size!r}")
    return values[0], values[1]


def _factors(op: str, scale_factor: Any) -> tuple[float, float]:
    values = scale_factor if isinstance(scale_factor, (tuple, list)) else (scale_factor,) * 2
    if len(values) != 2:
        raise ValueError(f"{op}: scale_factor must be a number or two, got {scale_factor!r}")
    if any(isinstance(v, (bool, str)) or not hasattr(v, "__float__") for v in values):
        raise TypeError(f"{op}: scale_factor must be a number or two, got {scale_factor!r}")
    if not all(0 < v < 2**31 for v in values):
        raise ValueError(
            f"{op}: scale_factor must be above 0 and below 2**31, got {scale_factor!r}"
        )
    return float(values[0]), float(values[1])
