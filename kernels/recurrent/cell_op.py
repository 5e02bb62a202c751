"""A recurrent cell: one step, with few arguments and results, which are what a small one costs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nnarch import library
from nnarch.calls import wants_gradient

from . import kinds, reference
from .checks import check_scan

_GPU = "nnarch.kernels.recurrent.gpu_kernel"
_ARGUMENTS = (
    "Tensor x, Tensor? h, Tensor? c, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
    "Tensor? bias_hh"
)


def _check(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    packed: Tensor | None,
    kind: int,
    save: bool,
) -> None:
    check_scan(
        x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, None, None, None, None, packed, kind,
        False, 0.0, save,
    )  # fmt: skip
    if x.dim() != 2:
        raise ValueError(f"{kinds.NAMES[kind]}: x must be [B, I], got {tuple(x.shape)}")


def _shapes(x: Tensor, weight_hh: Tensor, kind: int, save: bool) -> tuple[tuple[Any, ...], ...]:
    """The shapes of h, c and the reserve after the step."""
    rows, hidden = x.shape[0], weight_hh.shape[1]
    width = kinds.reserve_width(kind, False) if save else 0
    return (rows, hidden), (rows, hidden if kind == kinds.LSTM else 0), (rows, width * hidden)


def _fake(x: Tensor, h: Any, c: Any, weight_ih: Any, weight_hh: Tensor, *rest: Any) -> Any:
    *_, kind, save = rest
    return tuple(x.new_empty(shape) for shape in _shapes(x, weight_hh, kind, save))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> int:
    *tensors, _packed, ctx.kind, save = inputs
    if not save:
        raise ValueError(f"{kinds.NAMES[ctx.kind]}: save must be true where a gradient is wanted")
    ctx.save_for_backward(*tensors, output[0], output[2])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    return 2


def _backward(
    ctx: Any, grad_h: Tensor | None, grad_c: Tensor | None = None, *_: Any
) -> tuple[Tensor | None, ...]:
    wanted = 0
    for bit, needed in enumerate(ctx.needs_input_grad[:7]):
        wanted |= needed << bit
    if ctx.kind != kinds.LSTM:
        grad_c = None  # of an empty tensor
    found = cell_backward(grad_h, grad_c, *ctx.saved_tensors, ctx.kind, wanted)
    if wanted == 127:
        return *found, None, None, None
    return *(g if wanted >> bit & 1 else None for bit, g in enumerate(found)), None, None, None


cell = library.declare(
    f"recurrent_cell({_ARGUMENTS}, Tensor? packed, int kind, bool save)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.recurrent_cell,
    fake=_fake,
    check=_check,
    gpu=f"{_GPU}:recurrent_cell",
    setup_context=_setup,
    backward=_backward,
)


def _check_backward(*arguments: Any) -> None:
    grads, inputs, (after, reserve, kind, _) = arguments[:2], arguments[2:9], arguments[9:]
    _check(*inputs, None, kind, True)  # type: ignore[call-arg]
    op, x = kinds.NAMES[kind], inputs[0]
    of_h, of_c, of_reserve = _shapes(x, inputs[4], kind, True)
    given = {"grad_h": (grads[0], of_h), "grad_c": (grads[1], of_c), "after": (after, of_h),
             "reserve": (reserve, of_reserve)}  # fmt: skip
    for name, (tensor, shape) in given.items():
        if tensor is None:
            continue
        library.check_tensor(op, name, tensor)
        library.check_same(op, name, tensor, x)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")


def _fake_backward(grad_h: Any, grad_c: Any, *rest: Any) -> tuple[Tensor, ...]:
    x, wanted = rest[0], rest[-1]
    return tuple(
        x.new_empty(t.shape if t is not None and wanted >> bit & 1 else (0,))
        for bit, t in enumerate(rest[:7])
    )


# Second derivatives have no kernel: a backward through this operation raises.
cell_backward = library.declare(
    f"recurrent_cell_backward(Tensor? grad_h, Tensor? grad_c, {_ARGUMENTS}, Tensor after, "
    "Tensor reserve, int kind, int wanted) -> (" + ", ".join(["Tensor"] * 7) + ")",
    reference=reference.recurrent_cell_backward,
    fake=_fake_backward,
    check=_check_backward,
    gpu=f"{_GPU}:recurrent_cell_backward",
)


def step(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    packed: Tensor | None,
    kind: int,
) -> tuple[Tensor, Tensor]:
    """The new h and c (empty but for the LSTM), of tensors."""
    save = wants_gradient(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh)
    out = cell(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, packed, kind, save)
    return out[0], out[1]
