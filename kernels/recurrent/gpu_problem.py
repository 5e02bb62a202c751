"""What the GPU launchers of recurrent layers share: rows of steps, biases, products, gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from nnarch.kernels.gpu.split import NO_EPILOGUE
from nnarch.kernels.linear.triton_product import product
from nnarch.kernels.linear.triton_row import one_row

from . import kinds
from .op import output_shapes
from .reference import batch_of


@dataclass(frozen=True)
class Sequence:
    """Which of the flat rows belong to which step: step t has `first(t)` and the next ones.

    Attributes:
        steps, batch, rows: T, the sequences of the longest step, rows of all steps.
        batch_sizes: of a packed sequence, on the CPU; None where every step has `batch` rows.
        starts: [T + 1] on the device, the first row of every step and the end; None likewise.
    """

    steps: int
    batch: int
    rows: int
    batch_sizes: Tensor | None
    starts: Tensor | None

    @staticmethod
    def of(x: Tensor, batch_sizes: Tensor | None) -> Sequence:
        """The rows of `x` [T, B, I], [B, I] or, with `batch_sizes`, [rows, I]."""
        batch = batch_of(x, batch_sizes)
        if batch_sizes is None:
            steps = x.shape[0] if x.dim() == 3 else 1
            return Sequence(steps, batch, steps * batch, None, None)
        ends = torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])
        return Sequence(
            len(batch_sizes), batch, x.shape[0], batch_sizes, ends.to(x.device, non_blocking=True)
        )

    def bounds(self) -> list[int]:
        """The first row of every step, and the end."""
        if self.batch_sizes is None:
            return [t * self.batch for t in range(self.steps + 1)]
        return [0, *itertools.accumulate(self.batch_sizes.tolist())]

    def first_step_rows(self) -> slice:
        """Each sequence's row at its first step in time."""
        return slice(0, self.batch)

    def last_step_rows(self, like: Tensor) -> slice | Tensor:
        """Each sequence's row at its last step in time, on the device of `like`."""
        if self.batch_sizes is None:
            return slice(self.rows - self.batch, self.rows)
        rising = self.batch_sizes.flip(0).contiguous()
        sequence = torch.arange(self.batch, device="cpu")
        lengths = self.steps - torch.searchsorted(rising, sequence, right=True)
        starts = self.batch_sizes.cumsum(0) - self.batch_sizes
        return (starts[lengths - 1] + sequence).to(like.device)

    def previous_rows(self, reverse: bool, like: Tensor) -> Tensor:
        """For each row, that of the step before it in the scan's order, counted in
        [initial states; rows]: [rows] of int64 on the device of `like`. For packed sequences."""
        assert self.batch_sizes is not None
        counts = self.batch_sizes.tolist()
        starts = [0, *itertools.accumulate(counts)]
        parts = []
        for t, count in enumerate(counts):
            s = torch.arange(count, device="cpu")
            if reverse:
                later = counts[t + 1] if t + 1 < self.steps else 0
                parts.append(torch.where(s < later, self.batch + starts[t + 1] + s, s))
            else:
                parts.append(s if t == 0 else self.batch + starts[t - 1] + s)
        return torch.cat([torch.arange(0, device="cpu"), *parts]).to(like.device)


@dataclass(frozen=True)
class Outputs:
    """What a scan returns, in fresh memory.

    Attributes:
        states: [rows + B, P]: y and, behind it, the initial states, so that the state before any
            step is a row of one tensor.
        y, h, c, reserve: the results; y is the head of `states`.
    """

    states: Tensor
    y: Tensor
    h: Tensor
    c: Tensor
    reserve: Tensor


@dataclass(frozen=True)
class StateGradients:
    """What a scan's backward writes.

    Attributes:
        dgx: [rows, gates·H], of the input's product.
        dgh: of the state's; `dgx` itself but for the GRU.
        dy: [rows, P], of every h with what later steps add; None without a projection.
        dh0, dc0: [B, P] and [B, H]; None where there is no such input.
    """

    dgx: Tensor
    dgh: Tensor
    dy: Tensor | None
    dh0: Tensor | None
    dc0: Tensor | None


def new_outputs(
    x: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    norm: Tensor | None,
    kind: int,
    sequence: Sequence,
    save: bool,
) -> Outputs:
    """Fresh memory for the outputs, not yet written."""
    shape, *others = output_shapes(x, weight_ih, weight_hh, norm, kind, sequence.batch, save)
    states = x.new_empty((sequence.rows + sequence.batch, weight_hh.shape[1]))
    y = states[: sequence.rows].view(shape)
    return Outputs(states, y, *(x.new_empty(other) for other in others))


def multiply(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """out = a·bᵀ + bias + residual, for a [M, C], b [N, C] and out [M, N] of any strides.

    `residual` may be `out` itself: a program reads its tile before it writes it.
    """
    if out.numel():
        epilogue = NO_EPILOGUE | {"bias_ptr": bias, "residual_ptr": residual}
        (one_row if a.shape[0] == 1 else product)(a, b, out, epilogue)
    return out


def initialise(state: Tensor, given: Tensor | None) -> None:
    """state = given, or zeros."""
    if given is None:
        state.zero_()
    else:
        state.copy_(given)


def summed_outputs(
    dy: Tensor | None, grad_h: Tensor | None, y: Tensor, sequence: Sequence, reverse: bool
) -> Tensor:
    """The gradient of every output, with that of the last states added where they are outputs."""
    total = torch.zeros_like(y) if dy is None else dy.clone(memory_format=torch.contiguous_format)
    if grad_h is not None:
        ends = sequence.first_step_rows() if reverse else sequence.last_step_rows(y)
        total[ends] += grad_h
    return total


def input_product(
    rows: Tensor, weight_ih: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None, kind: int
) -> tuple[Tensor, Tensor | None]:
    """All that a step adds to the state's product: x·W_ihᵀ and the biases, [rows, gates·H].

    Returns:
        The product, and the bias of the GRU's W_hn·h [H], which the reset gate multiplies.
    """
    hidden = weight_ih.shape[0] // kinds.GATES[kind]
    bias_n = None
    folded = bias_hh
    if kind == kinds.GRU and bias_hh is not None:
        bias_n = bias_hh[2 * hidden :].contiguous()
        folded = torch.cat([bias_hh[: 2 * hidden], torch.zeros_like(bias_n)])
    gx = rows.new_empty((rows.shape[0], weight_ih.shape[0]))
    return multiply(rows, weight_ih, gx, both_biases(bias_ih, folded)), bias_n


def both_biases(bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor | None:
    """Their sum in float32, contiguous."""
    terms = [b.float() for b in (bias_ih, bias_hh) if b is not None]
    if not terms:
        return None
    return (terms[0] if len(terms) == 1 else terms[0] + terms[1]).contiguous()
