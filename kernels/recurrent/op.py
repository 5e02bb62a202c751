"""Recurrent layers: schemas, shapes, autograd, and the public functions."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.calls import wants_gradient

from . import autocast, kinds, reference
from .checks import check_scan, without_values

_GPU = "nnarch.kernels.recurrent.gpu_kernel"
_ARGUMENTS = (
    "Tensor x, Tensor? h0, Tensor? c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, "
    "Tensor? bias_hh, Tensor? weight_hr, Tensor? peephole, Tensor? norm, Tensor? batch_sizes"
)

# ------------------------------------------------------------------------------------- forward


def output_shapes(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    norm: Tensor | None,
    kind: int,
    batch: Any,
    save: bool,
) -> tuple[tuple[Any, ...], ...]:
    """The shapes of y, the last h, the last c and the reserve."""
    hidden, out = weight_ih.shape[0] // kinds.GATES[kind], weight_hh.shape[1]
    rows = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    width = kinds.reserve_width(kind, norm is not None) * hidden if save else 0
    return (
        (*x.shape[:-1], out),
        (batch, out),
        (batch, hidden if kind == kinds.LSTM else 0),
        (rows, width),
    )


def _fake_scan(x: Tensor, h0: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    _, weight_ih, weight_hh, _, _, _, _, norm, batch_sizes, _, kind, _, _, save = rest
    if batch_sizes is None:
        batch = x.shape[-2]
    elif h0 is not None:
        batch = h0.shape[0]
    else:  # the first of batch_sizes, whose values are not known here
        batch = torch.library.get_ctx().new_dynamic_size()
    shapes = output_shapes(x, weight_ih, weight_hh, norm, kind, batch, save)
    return tuple(x.new_empty(shape) for shape in shapes)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> int:
    *tensors, _packed, ctx.kind, ctx.reverse, ctx.eps, save = inputs
    if not save:
        raise ValueError(f"{kinds.NAMES[ctx.kind]}: save must be true where a gradient is wanted")
    y, _, _, reserve = output
    ctx.save_for_backward(*tensors, y, reserve)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(reserve)
    return 3


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    wanted = sum(needed << bit for bit, needed in enumerate(ctx.needs_input_grad[:10]))
    if ctx.kind != kinds.LSTM:
        grad_c = None  # of an empty tensor
    gradients = scan_backward(
        grad_y, grad_h, grad_c, *ctx.saved_tensors, ctx.kind, ctx.reverse, ctx.eps, wanted
    )
    return *(g if wanted >> bit & 1 else None for bit, g in enumerate(gradients)), *[None] * 6


scan = library.declare(
    f"recurrent_scan({_ARGUMENTS}, Tensor? packed, int kind, bool reverse, float eps, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.recurrent_scan,
    fake=_fake_scan,
    check=check_scan,
    gpu=f"{_GPU}:recurrent_scan",
    setup_context=_setup,
    backward=_backward,
)

# ------------------------------------------------------------------------------------ backward


def _check_backward(*arguments: Any) -> None:
    grads, inputs = arguments[:3], arguments[3:14]
    y, reserve, kind, reverse, eps, _ = arguments[14:]
    check_scan(*inputs, None, kind, reverse, eps, True)  # type: ignore[call-arg]
    op, x, norm, batch_sizes = kinds.NAMES[kind], inputs[0], inputs[9], inputs[10]
    if batch_sizes is not None and without_values(batch_sizes):
        return
    shapes = output_shapes(
        x, inputs[3], inputs[4], norm, kind, reference.batch_of(x, batch_sizes), True
    )
    given = {"grad_y": grads[0], "grad_h": grads[1], "grad_c": grads[2], "reserve": reserve}
    for (name, tensor), shape in zip(given.items(), shapes, strict=True):
        if tensor is None:
            continue
        library.check_tensor(op, name, tensor)
        library.check_same(op, name, tensor, x)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    library.check_same(op, "y", y, x)
    if y.shape != shapes[0]:
        raise ValueError(f"{op}: y must have shape {shapes[0]}, got {tuple(y.shape)}")


def _fake_backward(
    grad_y: Tensor | None, grad_h: Tensor | None, grad_c: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    wanted = rest[-1]
    x = rest[0]
    return tuple(
        x.new_empty(t.shape) if t is not None and wanted >> bit & 1 else x.new_empty(0)
        for bit, t in enumerate(rest[:10])
    )


# Second derivatives have no kernel: a backward through this operation raises.
scan_backward = library.declare(
    "recurrent_scan_backward(Tensor? grad_y, Tensor? grad_h, Tensor? grad_c, "
    f"{_ARGUMENTS}, Tensor y, Tensor reserve, int kind, bool reverse, float eps, int wanted)"
    " -> (" + ", ".join(["Tensor"] * 10) + ")",
    reference=reference.recurrent_scan_backward,
    fake=_fake_backward,
    check=_check_backward,
    gpu=f"{_GPU}:recurrent_scan_backward",
)

# ------------------------------------------------------------------------------------- packing


def _check_pack(
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    kind: int,
    bfloat16: bool,
    pairs: bool,
) -> None:
    if not 0 <= kind < len(kinds.NAMES):
        raise ValueError(f"recurrent_pack: kind must be 0 to 3, got {kind}")
    if bfloat16 and pairs:
        raise ValueError("recurrent_pack: weights for pairs have no bfloat16 form")
    library.check_tensor("recurrent_pack", "weight_ih", weight_ih)
    x = weight_ih.new_empty(1, weight_ih.shape[-1])
    check_scan(
        x, None, None, weight_ih, weight_hh, None, None, weight_hr, None, None, None, None,
        kind, reverse=False, eps=0.0, save=False,
    )  # fmt: skip


def _fake_pack(weight: Tensor, *_: Any) -> Tensor:
    half = weight.dtype in (torch.float16, torch.bfloat16)
    size = torch.library.get_ctx().new_dynamic_size()
    return weight.new_empty(size, dtype=torch.float32 if half else weight.dtype)


pack = library.declare(
    "recurrent_pack(Tensor weight_ih, Tensor weight_hh, Tensor? weight_hr, int kind, bool bfloat16,"
    " bool pairs) -> Tensor",
    reference=reference.recurrent_pack,
    fake=_fake_pack,
    check=_check_pack,
)


def recurrent_pairs(weight_ih: Tensor, weight_hh: Tensor, rows: int, *, kind: int) -> bool:
    """Whether :func:`pack_recurrent_weights` should pack `pairs` for steps of so many sequences.

    Args:
        weight_ih, weight_hh: as for the layer, on the CPU.
        rows: sequences that a step has, most of the time.
        kind: of the cell (nnarch.kernels.recurrent.kinds).

    Returns:
        Whether Strassen's product of pairs of sequences serves these sizes, and
        :func:`nnarch.set_precision` allows it.

    Raises:
        ValueError: weights that are no matrices, or an unknown kind.
    """
    if not 0 <= kind < len(kinds.NAMES):
        raise ValueError(f"recurrent_pairs: kind must be 0 to 3, got {kind}")
    if weight_ih.dim() != 2 or weight_hh.dim() != 2:
        raise ValueError(
            f"recurrent_pairs: weights must be 2-D, got {weight_ih.dim()}-D and {weight_hh.dim()}-D"
        )
    if library.native is None or weight_ih.device.type != "cpu":
        return False
    if weight_ih.dtype != torch.float32:
        return False
    gates = kinds.GATES[kind]
    sizes = gates, weight_ih.shape[0] // gates, weight_ih.shape[1], weight_hh.shape[1], rows
    return bool(library.native.nnarch_recurrent_pairs(*map(ctypes.c_int64, sizes)))


def pack_recurrent_weights(
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None = None,
    *,
    kind: int,
    bfloat16: bool = False,
    pairs: bool = False,
) -> Tensor | None:
    """Weights in the order that the native kernels read, to pass as `packed=` again and again.

    Args:
        weight_ih, weight_hh, weight_hr: as for the layer; their values must not change afterwards.
        kind: of the cell (nnarch.kernels.recurrent.kinds).
        bfloat16: keep the state's weights in bfloat16: half of the bytes a step, and the accuracy
            of bfloat16 weights; sums stay in float32. For float32 weights.
        pairs: with what steps of pairs of sequences read (:func:`recurrent_pairs`), where the sizes
            allow it; without `bfloat16`. 2.75 times the memory.

    Returns:
        An opaque tensor; None where no native kernel runs (another device).
    """
    if weight_ih.device.type != "cpu" or library.native is None:
        return None
    hr = None if weight_hr is None else weight_hr.detach()
    return pack(weight_ih.detach(), weight_hh.detach(), hr, kind, bfloat16, pairs)


# ------------------------------------------------------------------------------------- layers


def _run(
    kind: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: tuple[Tensor | None, ...],
    batch_sizes: Tensor | None,
    packed: Tensor | None,
    reverse: bool,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    save = wants_gradient(x, h0, c0, *weights)
    y, h, c, _ = scan(x, h0, c0, *weights, batch_sizes, packed, kind, reverse, eps, save)
    return y, h, c


@arrays.public_lower_precision
def lstm_layer(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    weight_hr: Tensor | None = None,
    peephole: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 1e-5,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer in one direction over a whole sequence.

    ``i, f, g, o = W_ih·x + b_ih + W_hh·h + b_hh``; ``c' = σ(f)·c + σ(i)·tanh(g)``;
    ``h' = σ(o)·tanh(c')``, then ``W_hr·h'`` with a projection. Hochreiter and Schmidhuber, 1997,
    Long Short-Term Memory; gates in torch's order. H is the hidden size, P the size of h: that of
    the projection, or H.

    Args:
        x: [T, B, I]; [B, I] is one step; with `batch_sizes` [rows, I], the data of a
            :class:`torch.nn.utils.rnn.PackedSequence`.
        weight_ih, weight_hh: [4H, I] and [4H, P].
        bias_ih, bias_hh: [4H] or None.
        h0, c0: [B, P] and [B, H]; None is zeros.
        weight_hr: [P, H], a projection (Sak and others, 2014); or None.
        peephole: [3, H], weights from c to i, f (before the step) and o (after it) (Gers and
            Schmidhuber, 2000); or None.
        norm: [18, H], gains and biases of layer normalization (Ba and others, 2016): gain [4H] and
            bias [4H] of W_ih·x, the same of W_hh·h, gain [H] and bias [H] of c' inside tanh; or
            None.
        eps: of the normalization.
        batch_sizes: [T], int64, on the CPU: sequences that last to each step; or None.
        reverse: from the last step to the first.
        packed: what :func:`pack_recurrent_weights` made of the weights; or None.

    Returns:
        y [T, B, P] (or as `x` has it), the last h [B, P] and the last c [B, H].

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm)
    return _run(kinds.LSTM, x, h0, c0, weights, batch_sizes, packed, reverse, eps)


@arrays.public
def gru_layer(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    h0: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One GRU layer in one direction over a whole sequence.

    ``r = σ(W_ir·x + b_ir + W_hr·h + b_hr)``, z likewise; ``n = tanh(W_in·x + b_in + r·(W_hn·h +
    b_hn))``; ``h' = (1 - z)·n + z·h``. Cho and others, 2014, Learning Phrase Representations; with
    the reset gate behind the product, as torch and cuDNN have it.

    Args:
        x: as :func:`lstm_layer` has it.
        weight_ih, weight_hh: [3H, I] and [3H, H], gates r, z, n.
        bias_ih, bias_hh: [3H] or None.
        h0: [B, H]; None is zeros.
        batch_sizes, reverse, packed: as :func:`lstm_layer` has them.

    Returns:
        y [T, B, H] (or as `x` has it) and the last h [B, H].

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    weights: Sequence[Tensor | None] = (weight_ih, weight_hh, bias_ih, bias_hh)
    if autocast.is_on():
        x, h0, *weights = autocast.cast(kinds.GRU, autocast.LAYERS, x, h0, *weights)
    weights = (*weights, None, None, None)
    return _run(kinds.GRU, x, h0, None, weights, batch_sizes, packed, reverse)[:2]


@arrays.public_lower_precision
def rnn_layer(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    h0: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One Elman layer in one direction over a whole sequence.

    ``h' = act(W_ih·x + b_ih + W_hh·h + b_hh)``. Elman, 1990, Finding Structure in Time.

    Args:
        x: as :func:`lstm_layer` has it.
        weight_ih, weight_hh: [H, I] and [H, H].
        bias_ih, bias_hh: [H] or None.
        nonlinearity: "tanh" or "relu".
        h0: [B, H]; None is zeros.
        batch_sizes, reverse, packed: as :func:`lstm_layer` has them.

    Returns:
        y [T, B, H] (or as `x` has it) and the last h [B, H].

    Raises:
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"rnn: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    kind = kinds.RNN_TANH if nonlinearity == "tanh" else kinds.RNN_RELU
    weights = (weight_ih, weight_hh, bias_ih, bias_hh, None, None, None)
    return _run(kind, x, h0, None, weights, batch_sizes, packed, reverse)[:2]
