"""Launching the scan of small hidden sizes: what fits one program, and its tiles."""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from nnarch.kernels.gpu.launch import cdiv, dot_precision, flat_grid, launch, named_strides, vector
from nnarch.kernels.gpu.matmul import precision_of
from nnarch.kernels.gpu.targets import Target, current_target
from nnarch.kernels.gpu.tiles import Problem, Tile, TileTable, pick, tile

from . import kinds
from .gpu_problem import Outputs, Sequence, StateGradients
from .triton_small_kernels import _recurrent_small_bwd_kernel, _recurrent_small_fwd_kernel

LEAST_DOT = 64
"""Units are padded to this many where products are dots: the rows of a matrix instruction."""

LEAST = 32
"""Units are padded to this many elsewhere: Triton 3.6 fails to compile some smaller LSTMs."""


MOST_WEIGHTS = 5 * 64 * 64
"""Elements of the weights that a program holds: an LSTM of 64 units with a projection, a plain
layer of 128. Compiled kernels of twice as many units spill on one target or another."""


def _fits(problem: Problem, tile: Tile, target: Target) -> bool:
    """Whether a program holds the weights, n·k elements, beside a step's tiles."""
    weights, threads = problem.n * problem.k, tile.num_warps * target.warp_size
    if problem.precision == "ieee":  # in registers, and a product of every element beside them
        return weights <= 64 * threads
    return weights <= MOST_WEIGHTS and weights * problem.itemsize <= target.shared_bytes


def _cost(problem: Problem, tile: Tile, target: Target) -> float:
    """Waves of programs, by how long a step takes: mostly latency, whatever the tile."""
    waves = triton.cdiv(triton.cdiv(problem.m, tile["BLOCK_B"]), target.processors)
    return waves * (64 + tile["BLOCK_B"]) + 0.1 * abs(8 - tile.num_warps)


_DOTS = (
    tile(BLOCK_B=16, num_warps=8, num_stages=1),
    tile(BLOCK_B=16, num_warps=4, num_stages=1),
)
_VECTORS = (
    tile(BLOCK_B=1, num_warps=8, num_stages=1),
    tile(BLOCK_B=1, num_warps=4, num_stages=1),
)
SMALL = TileTable("recurrent_small", {"half": _DOTS, "tf32": _DOTS, "ieee": _VECTORS}, _cost, _fits)
SMALL_BACKWARD = dataclasses.replace(
    SMALL,
    name="recurrent_small_backward",
    tiles=SMALL.tiles | dict.fromkeys(("half", "tf32"), _DOTS[:1]),  # 4 warps spill on sm_100
)


def _projected_fits(problem: Problem, tile: Tile, target: Target) -> bool:
    """On sm_90, ptxas 12.8 (that of Triton 3.6) compiles 8 warps to wrong code in half precision:
    descriptors of a product are made of the stack pointer and of weights, and the kernel ends in an
    illegal access. 4 warps spill on sm_100."""
    wrong = target.name == "sm_90" and problem.precision == "half"
    if problem.precision != "ieee":  # the gates' gradients lie beside the weights
        shared = problem.n * (problem.k + tile["BLOCK_B"]) * problem.itemsize
        if shared > target.shared_bytes or tile.num_warps != (4 if wrong else 8):
            return False
    return _fits(problem, tile, target)


SMALL_BACKWARD_PROJECTED = dataclasses.replace(
    SMALL_BACKWARD,
    name="recurrent_small_backward_projected",
    tiles=SMALL_BACKWARD.tiles | {"half": _DOTS},
    fits=_projected_fits,
)


def _problem(kind: int, x: Tensor, weight_hh: Tensor, batch: int) -> Problem:
    # Three products of parts would need the weights twice: exact products stay in registers.
    float32 = "tf32" if dot_precision("matmul") == "tf32" else "ieee"
    precision = precision_of(x.dtype, float32)
    least = LEAST if precision == "ieee" else LEAST_DOT
    hidden = weight_hh.shape[0] // kinds.GATES[kind]
    padded = max(least, triton.next_power_of_2(hidden))
    out = max(least, triton.next_power_of_2(weight_hh.shape[1]))
    projected = weight_hh.shape[1] != hidden  # W_hr is held too
    return Problem(batch, (kinds.GATES[kind] + projected) * padded, out, precision)


def fits_small(kind: int, x: Tensor, weight_hh: Tensor, sequence: Sequence) -> bool:
    """Whether the state's weights fit one program on the GPU in use."""
    problem = _problem(kind, x, weight_hh, sequence.batch)
    target = current_target()
    projected = weight_hh.shape[1] * kinds.GATES[kind] != weight_hh.shape[0]
    backward = SMALL_BACKWARD_PROJECTED if projected else SMALL_BACKWARD
    return all(t.candidates(problem, target) for t in (SMALL, backward))


def _sizes(
    kind: int, x: Tensor, weight_hh: Tensor, weight_hr: Tensor | None, problem: Problem
) -> dict[str, object]:
    hidden = weight_hh.shape[0] // kinds.GATES[kind]
    least = LEAST if problem.precision == "ieee" else LEAST_DOT
    return {
        "H": hidden,
        "P": weight_hh.shape[1],
        **named_strides("w", "rk", weight_hh),
        **named_strides("p", "rk", weight_hr),
        "CELL": kind,
        "DOT": problem.precision != "ieee",
        "PRECISION": problem.precision if problem.precision == "tf32" else "ieee",
        "HIDDEN": max(least, triton.next_power_of_2(hidden)),
        "OUT": problem.k,
    }


def small_forward(
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
    """All steps in one launch; writes `out`.

    Args:
        gx, bias_n: as :func:`gpu_problem.input_product` returns them.
        h0, c0, weight_hh, weight_hr, peephole, kind, reverse: of the operation.
    """
    problem = _problem(kind, gx, weight_hh, sequence.batch)
    arguments = {
        **{"gx_ptr": gx, "h0_ptr": vector(h0), "c0_ptr": vector(c0), "w_ptr": weight_hh},
        **{"bias_n_ptr": bias_n, "peephole_ptr": vector(peephole), "proj_ptr": weight_hr},
        **{"starts_ptr": sequence.starts, "y_ptr": out.y, "h_ptr": out.h, "c_ptr": out.c},
        "reserve_ptr": out.reserve if out.reserve.numel() else None,
        **{"steps": sequence.steps, "B": sequence.batch, "REVERSE": reverse},
        **_sizes(kind, gx, weight_hh, weight_hr, problem),
    }

    def run(tile: Tile) -> None:
        programs = cdiv(sequence.batch, tile["BLOCK_B"])
        launch(_recurrent_small_fwd_kernel, flat_grid(programs), arguments, tile)

    run(pick(SMALL, problem, run))


def small_backward(
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
    """The scan's gradients but those of weights and of the input, in one launch."""
    hidden, width = weight_hh.shape[0] // kinds.GATES[kind], weight_hh.shape[0]
    dgx = y.new_empty((sequence.rows, width))
    result = StateGradients(
        dgx,
        torch.empty_like(dgx) if kind == kinds.GRU else dgx,
        y.new_empty((sequence.rows, weight_hh.shape[1])) if weight_hr is not None else None,
        None if h0 is None else y.new_empty((sequence.batch, weight_hh.shape[1])),
        None if c0 is None else y.new_empty((sequence.batch, hidden)),
    )
    dy = None if grad_y is None else grad_y.reshape(sequence.rows, weight_hh.shape[1])
    problem = _problem(kind, y, weight_hh, sequence.batch)
    arguments = {
        **{"dy_ptr": dy, "dh_ptr": vector(grad_h), "dc_ptr": vector(grad_c)},
        **{"h0_ptr": vector(h0), "c0_ptr": vector(c0), "w_ptr": weight_hh},
        **{"peephole_ptr": vector(peephole), "proj_ptr": weight_hr},
        **{"starts_ptr": sequence.starts, "reserve_ptr": vector(reserve)},
        "y_ptr": None if kind == kinds.LSTM else vector(y),
        **{"dgx_ptr": dgx, "dgh_ptr": result.dgh, "dy_all_ptr": result.dy},
        **{"dh0_ptr": result.dh0, "dc0_ptr": result.dc0},
        **{"steps": sequence.steps, "B": sequence.batch, "REVERSE": reverse},
        **named_strides("d", "rp", dy),
        **_sizes(kind, y, weight_hh, weight_hr, problem),
    }

    def run(tile: Tile) -> None:
        programs = cdiv(sequence.batch, tile["BLOCK_B"])
        launch(_recurrent_small_bwd_kernel, flat_grid(programs), arguments, tile)

    projected = weight_hh.shape[1] != hidden
    run(pick(SMALL_BACKWARD_PROJECTED if projected else SMALL_BACKWARD, problem, run))
    return result
