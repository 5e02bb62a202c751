"""Launching the scan of a normalized LSTM: a product and a cell a step, unfused.

A normalization sums over all units of all gates, so a fused step would need a barrier of the grid
between its product and its cell. The product is the linear layer's instead, with its own tiles and
splits, and the cell a program a sequence.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from nnarch.kernels.gpu.launch import flat_grid, launch, vector
from nnarch.kernels.gpu.tiles import tile

from .gpu_problem import Outputs, Sequence, StateGradients, initialise, multiply, summed_outputs
from .triton_norm_kernels import _recurrent_norm_bwd_kernel, _recurrent_norm_fwd_kernel

MOST_UNITS = 2048
"""A program holds a dozen rows of so many values in registers."""


def _tile(op: str, hidden: int):
    if hidden > MOST_UNITS:
        raise NotImplementedError(
            f"backend 'triton' lacks nnarch::{op} with norm for more than {MOST_UNITS} units, "
            f"got {hidden}"
        )
    block = triton.next_power_of_2(hidden)
    return tile(num_warps=min(16, max(1, block // 128)), num_stages=1, BLOCK=block)


def norm_forward(
    rows: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    norm: Tensor,
    sequence: Sequence,
    out: Outputs,
    reverse: bool,
    eps: float,
) -> None:
    """All steps; writes `out`. `rows` is the input, `bias` [4H] in float32, the rest as ever."""
    hidden, total = weight_ih.shape[0] // 4, sequence.rows
    _tile("recurrent_scan", hidden)
    gx = multiply(rows, weight_ih, rows.new_empty((total, 4 * hidden)))
    initialise(out.states[total:], h0)
    c = torch.empty((sequence.batch, hidden), dtype=torch.float32, device=rows.device)
    initialise(c, c0)
    gh = rows.new_empty((sequence.batch, 4 * hidden))
    full = rows.new_empty((sequence.batch, hidden)) if weight_hr is not None else None
    bounds = sequence.bounds()
    peephole, norm = vector(peephole), norm.contiguous()
    for step in range(sequence.steps):
        t = sequence.steps - 1 - step if reverse else step
        mine = slice(bounds[t], bounds[t + 1])
        count = bounds[t + 1] - bounds[t]
        multiply(_state_before(out.states, sequence, bounds, t, reverse), weight_hh, gh[:count])
        h = out.states[mine] if full is None else full
        reserve = out.reserve[mine] if out.reserve.numel() else None
        cell(gx[mine], gh, bias, peephole, norm, c, h, reserve, eps)
        if full is not None and weight_hr is not None:
            multiply(full[:count], weight_hr, out.states[mine])
    y = out.states[:total]
    out.h.copy_(y[sequence.first_step_rows() if reverse else sequence.last_step_rows(y)])
    out.c.copy_(c)


def cell(
    gx: Tensor,
    gh: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    norm: Tensor,
    c: Tensor,
    h: Tensor,
    reserve: Tensor | None,
    eps: float,
) -> None:
    """The cells of one step from both products; `c`, `h` and `reserve` are written."""
    arguments = {
        **{"gx_ptr": gx, "gh_ptr": gh, "bias_ptr": bias, "peephole_ptr": peephole},
        **{"norm_ptr": norm, "c_ptr": c, "h_ptr": h, "reserve_ptr": reserve},
        **{"H": norm.shape[1], "eps": float(eps)},
    }
    chosen = _tile("recurrent_scan", norm.shape[1])
    launch(_recurrent_norm_fwd_kernel, flat_grid(len(gx)), arguments, chosen)


def _state_before(
    states: Tensor, sequence: Sequence, bounds: list[int], t: int, reverse: bool
) -> Tensor:
    """The states that step t begins with: those of the step before it, then initial ones."""
    before, count = t + 1 if reverse else t - 1, bounds[t + 1] - bounds[t]
    initial = states[sequence.rows :]
    if not 0 <= before < sequence.steps:
        return initial[:count]
    first, known = bounds[before], min(count, bounds[before + 1] - bounds[before])
    if known == count:
        return states[first : first + count]
    return torch.cat([states[first : first + known], initial[known:count]])


@dataclasses.dataclass(frozen=True)
class NormGradients:
    """What the normalization's own gradient needs.

    Attributes:
        gates: [rows, 4H], of the gates before their activation.
        seen: [rows, H], of c normalized, with gain and bias.
    """

    gates: Tensor
    seen: Tensor


def norm_backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    norm: Tensor,
    y: Tensor,
    reserve: Tensor,
    sequence: Sequence,
    reverse: bool,
    eps: float,
) -> tuple[StateGradients, NormGradients]:
    """As :func:`triton_step.step_backward`."""
    (width, size), rows = weight_hh.shape, sequence.rows
    hidden = width // 4
    chosen = _tile("recurrent_scan_backward", hidden)
    dgx, dgh, gates = (y.new_empty((rows, width)) for _ in range(3))
    seen, reserve = y.new_empty((rows, hidden)), reserve.contiguous()
    dc = torch.empty((sequence.batch, hidden), dtype=torch.float32, device=y.device)
    initialise(dc, grad_c)
    dy = None if grad_y is None else grad_y.reshape(rows, size)
    dy_all = summed_outputs(dy, grad_h, y, sequence, reverse)
    through = dy_all if weight_hr is None else y.new_empty((rows, hidden))
    bounds = sequence.bounds()
    shared = {
        **{"dc_ptr": dc, "c0_ptr": vector(c0), "peephole_ptr": vector(peephole)},
        **{"norm_ptr": vector(norm), "H": hidden, "eps": float(eps)},
    }
    for step in range(sequence.steps):
        t = step if reverse else sequence.steps - 1 - step
        mine, count = slice(bounds[t], bounds[t + 1]), bounds[t + 1] - bounds[t]
        if step > 0:
            after = t - 1 if reverse else t + 1
            going = min(count, bounds[after + 1] - bounds[after])
            later = dgh[bounds[after] : bounds[after] + going]
            part = dy_all[mine][:going]
            multiply(later, weight_hh.t(), part, residual=part)
        if weight_hr is not None:
            multiply(dy_all[mine], weight_hr.t(), through[mine])
        before = t + 1 if reverse else t - 1
        exists = 0 <= before < sequence.steps
        known = min(count, bounds[before + 1] - bounds[before]) if exists else 0
        arguments = shared | {
            **{"dh_ptr": through[mine], "reserve_ptr": reserve[mine], "known": known},
            "before_ptr": reserve[bounds[before] :] if exists else None,
            **{"dgx_ptr": dgx[mine], "dgh_ptr": dgh[mine], "dgates_ptr": gates[mine]},
            "dseen_ptr": seen[mine],
        }
        launch(_recurrent_norm_bwd_kernel, flat_grid(count), arguments, chosen)
    dh0 = dc0 = None
    if h0 is not None:
        first = dgh[sequence.last_step_rows(y) if reverse else sequence.first_step_rows()]
        dh0 = multiply(first, weight_hh.t(), y.new_empty((sequence.batch, size)))
    if c0 is not None:
        dc0 = dc.to(y.dtype)
    return StateGradients(dgx, dgh, dy_all, dh0, dc0), NormGradients(gates, seen)


def norm_weight_gradient(found: NormGradients, reserve: Tensor, eps: float) -> Tensor:
    """The gradient of `norm` [18, H]: sums over rows, of what is normalized times its gradient."""
    hidden = found.seen.shape[1]
    gates, seen = found.gates.float(), found.seen.float()

    def sums(values: Tensor, gradient: Tensor) -> list[Tensor]:
        unit = torch.nn.functional.layer_norm(values.float(), (values.shape[1],), eps=eps)
        return [(unit * gradient).sum(0).view(-1, hidden), gradient.sum(0).view(-1, hidden)]

    parts = sums(reserve[:, 5 * hidden : 9 * hidden], gates)
    parts += sums(reserve[:, 9 * hidden :], gates)
    parts += sums(reserve[:, 4 * hidden : 5 * hidden], seen)
    return torch.cat(parts).to(reserve.dtype)
