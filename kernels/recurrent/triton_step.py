"""Launching the scan step by step: tiles, and whether one launch runs all steps."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nnarch.kernels.gpu.launch import (
    INTERPRETED,
    cdiv,
    dot_precision,
    flat_grid,
    launch,
    named_strides,
    vector,
)
from nnarch.kernels.gpu.matmul import matmul_fits, matmul_tiles, precision_of
from nnarch.kernels.gpu.targets import Target, current_target
from nnarch.kernels.gpu.tiles import Problem, Tile, TileTable, pick

from . import kinds
from .gpu_problem import Outputs, Sequence, StateGradients, initialise, multiply, summed_outputs
from .triton_step_kernels import _recurrent_step_bwd_kernel, _recurrent_step_fwd_kernel


def _cost(problem: Problem, tile: Tile, target: Target, gates: int) -> float:
    """Waves of programs, by the operands of a program or, if that is more, its multiply-adds."""
    m, n = tile["BLOCK_M"], tile["BLOCK_N"] * gates
    programs = triton.cdiv(problem.m, m) * triton.cdiv(problem.n, tile["BLOCK_N"])
    return triton.cdiv(programs, target.processors) * (m + n + m * n / 64)


def _forward_cost(problem: Problem, tile: Tile, target: Target) -> float:
    return _cost(problem, tile, target, 4)


def _backward_cost(problem: Problem, tile: Tile, target: Target) -> float:
    return _cost(problem, tile, target, 1)


def _forward_fits(problem: Problem, tile: Tile, target: Target) -> bool:
    """As a product with four times the columns; five where operands are split in two, since beside
    those the cell's tiles spilled 40 bytes on sm_120 (64×16×32, 4 warps)."""
    times = 5 if problem.precision == "tf32x3" else 4
    wide = dict(tile.block) | {"BLOCK_N": times * tile["BLOCK_N"]}
    as_product = Tile(tuple(wide.items()), tile.num_warps, tile.num_stages)
    return matmul_fits(problem, as_product, target)


# Registers of the cell's tiles come on top of the accumulators: fewer units than a product's tile.
STEP = TileTable(
    "recurrent_step",
    {
        "half": matmul_tiles(
            (64, 16, 64, 4, 4),
            (64, 16, 64, 4, 2),
            (64, 32, 64, 8, 3),
            (64, 32, 32, 8, 2),
            (128, 16, 64, 8, 3),
        ),
        "tf32": matmul_tiles((64, 16, 32, 4, 3), (64, 16, 32, 4, 2), (64, 32, 32, 8, 2)),
        "tf32x3": matmul_tiles((64, 16, 32, 4, 3), (64, 16, 32, 8, 2), (64, 16, 16, 8, 2)),
        "ieee": matmul_tiles((16, 16, 16, 4, 2), (32, 16, 16, 4, 2), (64, 16, 16, 8, 2)),
    },
    _forward_cost,
    _forward_fits,
)
STEP_BACKWARD = TileTable(
    "recurrent_step_backward",
    {
        "half": matmul_tiles(
            (64, 16, 64, 4, 4), (64, 32, 64, 4, 3), (64, 64, 64, 8, 3), (64, 32, 32, 4, 2)
        ),
        "tf32": matmul_tiles((64, 16, 32, 4, 3), (64, 32, 32, 8, 3), (64, 32, 32, 8, 2)),
        "tf32x3": matmul_tiles((64, 16, 32, 4, 3), (64, 32, 32, 8, 2), (64, 16, 32, 8, 2)),
        "ieee": matmul_tiles((16, 16, 16, 4, 2), (32, 16, 16, 4, 2), (64, 16, 16, 8, 2)),
    },
    _backward_cost,
    matmul_fits,
)


def _processors(tensor: Tensor) -> int:
    """Programs that are sure to run at the same time: one on each processor."""
    known = current_target().processors
    if tensor.device.type == "cuda":
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return known


def _run_steps(
    kernel: Any, programs: int, arguments: dict[str, Any], tile: Tile, like: Tensor, steps: int
) -> None:
    """All steps in one launch where the grid can wait for itself, else a launch for each."""
    whole = {"step_from": 0, "step_to": steps, "barrier_ptr": None}
    if programs == 1 or steps == 1:
        launch(kernel, flat_grid(programs), arguments | whole, tile)
        return
    # The interpreter runs programs one after the other: the first would wait forever.
    if not INTERPRETED and programs <= _processors(like):
        whole["barrier_ptr"] = torch.zeros(1, dtype=torch.int32, device=like.device)
        launch(kernel, flat_grid(programs), arguments | whole, tile, cooperative=True)
        return
    for step in range(steps):
        one = {"step_from": step, "step_to": step + 1, "barrier_ptr": None}
        launch(kernel, flat_grid(programs), arguments | one, tile)


def _programs(tile: Tile, batch: int, hidden: int) -> int:
    return cdiv(batch, tile["BLOCK_M"]) * cdiv(hidden, tile["BLOCK_N"])


def step_forward(
    gx: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_hh: Tensor,
    bias_n: Tensor | None,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    sequence: Sequence,
    out: Outputs,
    kind: int,
    reverse: bool,
) -> None:
    """As :func:`triton_small.small_forward`, for any size.

    A projection needs all units of a step before its own product: it runs unfused, as a product
    of the linear layer behind every step.
    """
    hidden, size = weight_hh.shape[0] // kinds.GATES[kind], weight_hh.shape[1]
    rows, batch = sequence.rows, sequence.batch
    initialise(out.states[rows:], h0)
    c = torch.empty((batch, hidden), dtype=torch.float32, device=gx.device)
    if kind == kinds.LSTM:
        initialise(c, c0)
    full = gx.new_empty((batch, hidden)) if weight_hr is not None else None
    problem = Problem(batch, hidden, size, precision_of(gx.dtype, dot_precision("matmul")))
    arguments = {
        **{"gx_ptr": gx, "states_ptr": out.states, "w_ptr": weight_hh, "bias_n_ptr": bias_n},
        **{"peephole_ptr": vector(peephole), "starts_ptr": sequence.starts},
        **{"c_ptr": c, "full_ptr": full},
        "reserve_ptr": out.reserve if out.reserve.numel() else None,
        **{"steps": sequence.steps, "ROWS": rows, "B": batch, "H": hidden, "P": size},
        **named_strides("w", "rk", weight_hh),
        **{"CELL": kind, "REVERSE": reverse, "PRECISION": dot_precision("matmul")},
    }

    def run(tile: Tile) -> None:
        programs = _programs(tile, batch, hidden)
        if full is None or weight_hr is None:
            kernel = _recurrent_step_fwd_kernel
            _run_steps(kernel, programs, arguments, tile, gx, sequence.steps)
            return
        bounds = sequence.bounds()
        for step in range(sequence.steps):
            t = sequence.steps - 1 - step if reverse else step
            one = {"step_from": step, "step_to": step + 1, "barrier_ptr": None}
            launch(_recurrent_step_fwd_kernel, flat_grid(programs), arguments | one, tile)
            first, end = bounds[t], bounds[t + 1]
            multiply(full[: end - first], weight_hr, out.states[first:end])

    run(pick(STEP, problem, run))
    y = out.states[:rows]
    out.h.copy_(y[sequence.first_step_rows() if reverse else sequence.last_step_rows(y)])
    if kind == kinds.LSTM:
        out.c.copy_(c)


def step_backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    sequence: Sequence,
    kind: int,
    reverse: bool,
) -> StateGradients:
    """As :func:`triton_small.small_backward`, for any size."""
    width, size = weight_hh.shape
    hidden, batch, rows = width // kinds.GATES[kind], sequence.batch, sequence.rows
    dgx = y.new_empty((rows, width))
    dgh = torch.empty_like(dgx) if kind == kinds.GRU else dgx
    dc = torch.empty((batch, hidden), dtype=torch.float32, device=y.device)
    if kind == kinds.LSTM:
        initialise(dc, grad_c)
    carry = vector(grad_h)
    if kind == kinds.GRU:
        carry = torch.empty_like(dc)
        initialise(carry, grad_h)
    dy = None if grad_y is None else grad_y.reshape(rows, size)
    dy_all, through = None, dy
    if weight_hr is not None:
        dy_all = summed_outputs(dy, grad_h, y, sequence, reverse)
        carry, through = None, y.new_empty((rows, hidden))
    problem = Problem(batch, hidden, width, precision_of(y.dtype, dot_precision("matmul")))
    arguments = {
        **{"dy_ptr": through, "carry_ptr": carry, "dc_ptr": dc, "h0_ptr": vector(h0)},
        **{"c0_ptr": vector(c0), "w_ptr": weight_hh if weight_hr is None else None},
        **{"peephole_ptr": vector(peephole), "starts_ptr": sequence.starts},
        **{"reserve_ptr": vector(reserve), "dgx_ptr": dgx, "dgh_ptr": dgh},
        "y_ptr": None if kind == kinds.LSTM else vector(y),
        **{"steps": sequence.steps, "B": batch, "H": hidden},
        **named_strides("w", "rk", weight_hh),
        **named_strides("d", "rp", through),
        **{"CELL": kind, "REVERSE": reverse, "PRECISION": dot_precision("matmul")},
    }

    def run(tile: Tile) -> None:
        programs = _programs(tile, batch, hidden)
        if dy_all is None or weight_hr is None:
            kernel = _recurrent_step_bwd_kernel
            _run_steps(kernel, programs, arguments, tile, y, sequence.steps)
            return
        bounds = sequence.bounds()
        for step in range(sequence.steps):
            t = step if reverse else sequence.steps - 1 - step
            mine = dy_all[bounds[t] : bounds[t + 1]]
            if step > 0:
                after = t - 1 if reverse else t + 1
                count = min(len(mine), bounds[after + 1] - bounds[after])
                later = dgh[bounds[after] : bounds[after] + count]
                multiply(later, weight_hh.t(), mine[:count], residual=mine[:count])
            multiply(mine, weight_hr.t(), through[bounds[t] : bounds[t + 1]])
            one = {"step_from": step, "step_to": step + 1, "barrier_ptr": None}
            launch(_recurrent_step_bwd_kernel, flat_grid(programs), arguments | one, tile)

    run(pick(STEP_BACKWARD, problem, run))
    dh0 = dc0 = None
    if h0 is not None:
        first = dgh[sequence.last_step_rows(y) if reverse else sequence.first_step_rows()]
        dh0 = y.new_empty((batch, size))
        multiply(first, weight_hh.t(), dh0, residual=carry if kind == kinds.GRU else None)
    if c0 is not None:
        dc0 = dc.to(y.dtype)
    return StateGradients(dgx, dgh, dy_all, dh0, dc0)
