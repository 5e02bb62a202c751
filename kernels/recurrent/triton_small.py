"""Launching the scan of small hidden sizes: what fits one program, and its tiles."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides, vector
from nnarch.kernels.gpu.matmul import precision_of
from nnarch.kernels.gpu.targets import Target, current_target
from nnarch.kernels.gpu.tiles import ALL_REGISTERS, Problem, Tile, TileTable, pick, tile

from . import kinds
from .gpu_problem import Outputs, Sequence, StateGradients
from .triton_small_backward import recurrent_small_bwd_kernel
from .triton_small_kernels import recurrent_small_fwd_kernel

LEAST = 32
"""Units are padded to this many: Triton 3.6 fails to compile some smaller LSTMs."""


def _parts(kind: int) -> int:
    """Rows of the weights for a unit: its gates, and none for the input's n of a GRU."""
    return 4 if kind in (kinds.LSTM, kinds.GRU) else 1


def _groups(rows: int, least: int, tile: Tile) -> int:
    """Groups of `rows` units, a warp's each, of at least `least`."""
    return max(1, min(tile.num_warps, rows // least))


def _fits(problem: Problem, tile: Tile, target: Target) -> bool:
    """Whether a program holds the weights, n·k elements, in registers beside a step's tiles."""
    words, threads = problem.n * problem.k * problem.itemsize // 4, tile.num_warps * 32
    if problem.precision == "ieee":  # a product of every element beside them
        return words <= 64 * tile.num_warps * target.warp_size
    if target.backend == "hip" and tile["BLOCK_B"] < 16:  # the columns of AMD's instruction
        return False
    few = tile["BLOCK_B"] == 8 and threads <= 256  # else the tiles leave less to the weights
    a_thread = 128 if few else 64
    return words <= a_thread * threads and 4 * words <= target.shared_bytes  # there on their way


def _cost(problem: Problem, tile: Tile, target: Target) -> float:
    """Cycles of a step on sm_90, by its count (GPU.md), times the waves of programs."""
    waves = triton.cdiv(triton.cdiv(problem.m, tile["BLOCK_B"]), target.processors)
    idle = tile.num_warps / _groups(problem.k, 16, tile)
    work = problem.n * tile["BLOCK_B"] * (0.2 + problem.k / 1268) * idle
    return waves * (600 + work) + abs(8 - tile.num_warps)


# Left to itself ptxas spills 8 bytes of the first for 64 units on sm_100, at 80 registers.
_FOUR_AND_EIGHT = (
    tile(BLOCK_B=8, num_warps=8, num_stages=1, registers=ALL_REGISTERS),
    tile(BLOCK_B=8, num_warps=4, num_stages=1),
    tile(BLOCK_B=16, num_warps=8, num_stages=1),
    tile(BLOCK_B=16, num_warps=4, num_stages=1),
)
_SIXTEEN = (tile(BLOCK_B=8, num_warps=16, num_stages=1),)
# ptxas would rather spill than pass 128 registers here.
_VECTORS = (
    tile(BLOCK_B=1, num_warps=8, num_stages=1, registers=ALL_REGISTERS),
    tile(BLOCK_B=1, num_warps=4, num_stages=1, registers=ALL_REGISTERS),
)
SMALL = TileTable(
    "recurrent_small", {"half": _FOUR_AND_EIGHT + _SIXTEEN, "ieee": _VECTORS}, _cost, _fits
)
SMALL_BACKWARD = TileTable(
    "recurrent_small_backward", {"half": _FOUR_AND_EIGHT, "ieee": _VECTORS}, _cost, _fits
)
SMALL_BACKWARD_PROJECTED = TileTable(  # 16 sequences spill with 4 warps
    "recurrent_small_backward_projected",
    SMALL_BACKWARD.tiles | {"half": _FOUR_AND_EIGHT[:3]},
    _cost,
    _fits,
)


def _problem(kind: int, x: Tensor, weight_hh: Tensor, batch: int) -> Problem:
    # float32 is exact, TF32 or not: with 32 bits an element, too few weights fit as operands.
    hidden = weight_hh.shape[0] // kinds.GATES[kind]
    projected = weight_hh.shape[1] != hidden  # W_hr is held too
    rows = (_parts(kind) + projected) * _padded(hidden)
    return Problem(batch, rows, _padded(weight_hh.shape[1]), precision_of(x.dtype, "ieee"))


def _padded(units: int) -> int:
    return max(LEAST, triton.next_power_of_2(units))


def fits_small(kind: int, x: Tensor, weight_hh: Tensor, sequence: Sequence) -> bool:
    """Whether the state's weights fit one program on the GPU in use."""
    problem = _problem(kind, x, weight_hh, sequence.batch)
    target = current_target()
    projected = weight_hh.shape[1] * kinds.GATES[kind] != weight_hh.shape[0]
    backward = SMALL_BACKWARD_PROJECTED if projected else SMALL_BACKWARD
    return all(t.candidates(problem, target) for t in (SMALL, backward))


def _sizes(
    kind: int, weight_hh: Tensor, weight_hr: Tensor | None, problem: Problem
) -> dict[str, object]:
    hidden = weight_hh.shape[0] // kinds.GATES[kind]
    return {
        "H": hidden,
        "P": weight_hh.shape[1],
        **named_strides("w", "rk", weight_hh),
        **named_strides("p", "rk", weight_hr),
        "CELL": kind,
        "DOT": problem.precision != "ieee",
        "HIDDEN": _padded(hidden),
        "OUT": problem.k,
    }


def _grouped(sizes: dict[str, object], least: int, tile: Tile) -> dict[str, int]:
    """The groups of both sides of the weights: `least` units a group; 16 of a projection's."""
    if not sizes["DOT"]:
        return {"GROUPS": 1, "OUT_GROUPS": 1}
    hidden = _groups(sizes["HIDDEN"], least, tile)
    projected = sizes["H"] != sizes["P"]
    return {
        "GROUPS": hidden,
        "OUT_GROUPS": _groups(sizes["OUT"], 16, tile) if projected else hidden,
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
        **_sizes(kind, weight_hh, weight_hr, problem),
    }

    def run(tile: Tile) -> None:
        programs = cdiv(sequence.batch, tile["BLOCK_B"])
        # 16 rows fill an instruction: those of 8 units with four gates, so that a thread has all.
        groups = _grouped(arguments, 8 if _parts(kind) == 4 else 16, tile)
        launch(recurrent_small_fwd_kernel, flat_grid(programs), arguments | groups, tile)

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
        **_sizes(kind, weight_hh, weight_hr, problem),
    }

    def run(tile: Tile) -> None:
        programs = cdiv(sequence.batch, tile["BLOCK_B"])
        groups = _grouped(arguments, 16, tile)
        launch(recurrent_small_bwd_kernel, flat_grid(programs), arguments | groups, tile)

    run(pick(SMALL_BACKWARD if weight_hr is None else SMALL_BACKWARD_PROJECTED, problem, run))
    return result
