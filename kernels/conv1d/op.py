"""conv1d and conv_transpose1d: a signal is an image of one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nnarch import arrays
from nnarch.kernels.activation import kinds
from nnarch.kernels.conv2d.op import conv2d
from nnarch.kernels.conv_transpose2d.op import conv_transpose2d
from nnarch.kernels.epilogue import check_tensor


@arrays.public_lower_precision
def conv1d(
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
    """1-D convolution and its epilogue: act(scale·(conv(x, weight) + bias) + shift + residual).

    The first seven arguments are those of :func:`torch.nn.functional.conv1d`.

    Args:
        x: [N, C, L] or [C, L].
        weight: [K, C / groups, S].
        bias, scale, shift: [K] or None.
        stride, dilation: one number, in samples.
        padding: one number, "valid" or "same" (stride 1 only; an odd sample goes to the end).
        groups: input and output channels are cut into this many independent parts.
        residual: of the output's shape, added before the activation; or None.
        activation: None, a name ("relu", "silu", …) or ("leaky_relu", slope).
        packed: what :func:`pack_conv2d_weight` made of `weight.unsqueeze(2)`; or None.

    Returns:
        [N, K, L'], L' = (L + 2·padding − dilation·(S − 1) − 1) // stride + 1.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    op = "conv1d"
    image, kernel = _row(op, "x", x, (2, 3)), _row(op, "weight", weight, (3,))
    pads: Any = padding if isinstance(padding, str) else _pair(op, "padding", padding, 0) * 2
    steps, gaps = _pair(op, "stride", stride, 1), _pair(op, "dilation", dilation, 1)
    try:
        y = conv2d(
            image, kernel, bias, steps, pads, gaps, groups, scale=scale, shift=shift,
            residual=_residual(op, residual), activation=activation, packed=packed,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise _renamed(error, op, "conv2d") from None
    return y.squeeze(-2)


@arrays.public_lower_precision
def conv_transpose1d(
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
    """1-D transposed convolution: act(scale·(conv_transpose(x, weight) + bias) + shift + residual).

    The first eight arguments are those of :func:`torch.nn.functional.conv_transpose1d`.

    Args:
        x: [N, C, L] or [C, L].
        weight: [C, K / groups, S].
        bias, scale, shift: [K] or None.
        stride, dilation: one number, in samples.
        padding: samples taken off each end of the output.
        output_padding: samples added at its end; fewer than stride or dilation.
        groups: input and output channels are cut into this many independent parts.
        residual: of the output's shape, added before the activation; or None.
        activation: None, a name ("relu", "silu", …) or ("leaky_relu", slope).
        packed: what :func:`pack_conv_transpose2d_weight` made of `weight.unsqueeze(2)` with
            stride and dilation (1, number); or None.

    Returns:
        [N, K, L'], L' = (L − 1)·stride − 2·padding + dilation·(S − 1) + output_padding + 1.

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    op = "conv_transpose1d"
    image, kernel = _row(op, "x", x, (2, 3)), _row(op, "weight", weight, (3,))
    steps, pads = _pair(op, "stride", stride, 1), _pair(op, "padding", padding, 0)
    extra, gaps = _pair(op, "output_padding", output_padding, 0), _pair(op, "dilation", dilation, 1)
    try:
        y = conv_transpose2d(
            image, kernel, bias, steps, pads, extra, groups, gaps, scale=scale, shift=shift,
            residual=_residual(op, residual), activation=activation, packed=packed,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise _renamed(error, op, "conv_transpose2d") from None
    return y.squeeze(-2)


def _row(op: str, name: str, tensor: Any, dims: tuple[int, ...]) -> Any:
    """A signal as an image of one row."""
    if isinstance(tensor, Tensor) and tensor.dim() in dims:
        return tensor.unsqueeze(-2)
    check_tensor(op, name, tensor)
    if tensor.dim() not in dims:
        wanted = " or ".join(f"{d}-D" for d in dims)
        raise ValueError(f"{op}: {name} must be {wanted}, got shape {tuple(tensor.shape)}")
    return tensor.unsqueeze(-2)


def _residual(op: str, residual: Tensor | None) -> Any:
    return None if residual is None else _row(op, "residual", residual, (2, 3))


def _pair(op: str, name: str, value: Any, vertical: int) -> tuple[int, Any]:
    """A number, or a sequence of one, beside what the one row has."""
    if type(value) is int:  # before the abstract class, which takes a microsecond
        return vertical, value
    if type(value) is tuple and len(value) == 1:
        return vertical, value[0]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 1:
            raise ValueError(f"{op}: {name} must be one number, got {tuple(value)}")
        value = value[0]
    return vertical, value


def _renamed(error: Exception, op: str, of: str) -> Exception:
    """An error of the operation `of` that names `op`; sizes in it are those of one row."""
    text = str(error)
    for name in (of, "depthwise_conv2d_input_grad", "depthwise_conv2d"):
        if text.startswith(f"{name}: "):
            return type(error)(f"{op}: {text.removeprefix(f'{name}: ')}")
    return error
