"""GPU launchers of sparse reservoirs (Numba-CUDA), and how the work is cut.

The matrix goes to the kernels in slices of 32 rows (numba_slices.py).

Two kernels (numba_kernel.py), one scan each:

- "shared": a block for each batch row; the state is in shared memory, steps are separated by
  barriers of the block. For many sequences, or reservoirs that one processor gets through quickly.
- "grid": all blocks together work on all batch rows; the state is in global memory (that is, in the
  second-level cache), steps are separated by a barrier of the grid. The launch is cooperative: it
  must not have more blocks than the GPU holds at a time.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from nnarch import library
from nnarch.kernels.gpu import numba_support

from . import numba_slices
from .numba_kernel import GRID_THREADS, SHARED_THREADS, WARP, kernels
from .numba_slices import Slices

SHARED_BYTES = 48 << 10  # what a block may have without asking for more
SMALL = 2048  # neurons that one block gets through faster than a grid barrier takes


def reservoir_pack(values: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """The matrix in slices, for the scans of a module that keeps it."""
    numba_support.check_device("reservoir_pack", values)
    return numba_slices.pack(numba_slices.cut(values, columns, rows), _compute(values))


def _slices(values: Tensor, columns: Tensor, rows: Tensor, packed: Tensor | None) -> Slices:
    # Nothing is in what the definition packed; and what came in a CPU tensor, in the simulator,
    # may be meant for the CPU's kernels.
    if packed is None or not packed.is_cuda or packed.numel() == 0:
        return numba_slices.cut(values, columns, rows)
    return numba_slices.unpack(packed, rows.numel() - 1)


def reservoir_scan(
    x: Tensor,
    w_in: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    packed: Tensor | None,
    state0: Tensor,
    leak: float,
    activation: int,
    skip: int,
) -> tuple[Tensor, Tensor]:
    """Launch a scan; see op.py for the arguments."""
    numba_support.check_device("reservoir_scan", x, values, state0)
    kept = max(0, x.shape[0] - skip)
    states = x.new_empty((kept, *state0.shape), dtype=_compute(x))
    nothing = states.new_empty(1)
    matrix = _slices(values, columns, rows, packed)
    last = _launch(
        x, w_in, bias, matrix, state0, leak, activation, skip, states,
        0, nothing, nothing, 0, nothing, nothing,
    )  # fmt: skip
    return states.to(x.dtype), last.to(x.dtype)


def reservoir_generate(
    x: Tensor,
    y0: Tensor,
    w_in: Tensor,
    bias: Tensor | None,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    packed: Tensor | None,
    state0: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    leak: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """Launch a free run; see op.py for the arguments."""
    numba_support.check_device("reservoir_generate", x, values, state0)
    fed = y0.shape[1]
    y = x.new_empty((x.shape[0], x.shape[1], fed), dtype=_compute(x))
    if b_out is None:
        b_out = x.new_zeros(fed)
    matrix = _slices(values, columns, rows, packed)
    last = _launch(
        x, w_in, bias, matrix, state0, leak, activation, x.shape[0], None,
        fed, y0, w_out, w_out.shape[1], b_out, y,
    )  # fmt: skip
    return y.to(x.dtype), last.to(x.dtype)


# -------------------------------------------------------------------------------------- launches


def _compute(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _launch(
    x: Tensor, w_in: Tensor | None, bias: Tensor | None, matrix: Slices, state0: Tensor,
    leak: float, activation: int, skip: int, states: Tensor | None, fed: int, y0: Tensor,
    w_out: Tensor, readout: int, b_out: Tensor, y: Tensor,
) -> Tensor:  # fmt: skip
    steps, batch, given = x.shape
    n, dtype = state0.shape[1], _compute(x)

    def operand(t: Tensor | None, zeros: int = 1) -> Tensor:
        """In the type that is computed in, flat, never empty: a kernel's pointer must be one."""
        if t is None or t.numel() == 0:
            return x.new_zeros(max(1, zeros), dtype=dtype)
        return t.detach().to(dtype).contiguous().view(-1)

    last = state0.detach().to(dtype).clone(memory_format=torch.contiguous_format)
    if steps == 0 or batch == 0 or n == 0:
        return last
    flat_states = states.view(-1) if states is not None and states.numel() else operand(None)
    empty = x.new_zeros(1, dtype=torch.int32)
    arguments = (
        operand(matrix.values),
        matrix.columns if matrix.columns.numel() else empty,
        matrix.lengths, matrix.starts, matrix.rows,
        operand(w_in), operand(bias, n), operand(x), int(w_in is None), given,
        leak, activation, steps, batch, n, skip, flat_states, last.view(-1),
        fed, operand(y0), operand(w_out), readout, operand(b_out),
        y.view(-1) if fed else operand(None),
    )  # fmt: skip
    with library_device(x):
        if uses_shared(n, batch, dtype, x.device):
            _launch_shared(dtype, batch, n, given, fed, arguments, x)
        else:
            _launch_grid(dtype, batch, n, fed, arguments, x)
    return last


def library_device(x: Tensor) -> Any:
    """Make the device of `x` current."""
    from nnarch.kernels.gpu.launch import device_guard

    return device_guard(x)


def uses_shared(n: int, batch: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Which of the two kernels runs. NNARCH_RESERVOIR_KERNEL=shared|grid forces it, for tests."""
    fits = _shared_bytes(n, dtype) <= SHARED_BYTES
    forced = os.environ.get("NNARCH_RESERVOIR_KERNEL")
    if forced == "shared" and not fits:
        raise ValueError(f"reservoir: {n} neurons do not fit shared memory; use the grid kernel")
    if forced in ("shared", "grid"):
        return forced == "shared"
    return fits and (n <= SMALL or batch >= _processors(device))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shared_bytes(n: int, dtype: torch.dtype) -> int:
    """Two states, and a number of each thread for the readout."""
    return (2 * (n + 1) + SHARED_THREADS) * (8 if dtype == torch.float64 else 4)


def _launch_shared(
    dtype: torch.dtype, batch: int, n: int, given: int, fed: int, arguments: tuple[Any, ...],
    x: Tensor,
) -> None:  # fmt: skip
    library.ran.algorithm = "shared"
    threads = WARP if numba_support.simulating() else min(SHARED_THREADS, -(-n // WARP) * WARP)
    run = kernels(dtype).shared[batch, threads, numba_support.stream_of(x), _shared_bytes(n, dtype)]
    run(*map(_argument, arguments))


def _launch_grid(
    dtype: torch.dtype, batch: int, n: int, fed: int, arguments: tuple[Any, ...], x: Tensor
) -> None:
    library.ran.algorithm = "grid"
    # The state of odd steps; that of even steps is `last`. Both have a zero where padding points.
    work = x.new_zeros(2 * batch * (n + 1), dtype=dtype)
    arguments = (*arguments, work)
    threads = WARP if numba_support.simulating() else GRID_THREADS
    kernel = kernels(dtype).grid
    limit = 1  # the simulator's barrier is that of one block
    if not numba_support.simulating():
        limit = numba_support.resident_blocks(kernel, arguments, threads)
    blocks = min(limit, -(-batch * -(-n // WARP) * WARP // threads))
    check_grid(blocks, limit)
    run = kernel[blocks, threads, numba_support.stream_of(x)]
    run(*map(_argument, arguments))


def check_grid(blocks: int, limit: int) -> None:
    """Refuse a grid whose barrier would wait for blocks that never start.

    Raises:
        ValueError: more blocks than the GPU holds at a time, or none at all.
    """
    if not 1 <= blocks <= limit:
        raise ValueError(
            f"reservoir: a cooperative grid of {blocks} blocks; this GPU holds {limit} at a time"
        )


def _argument(value: Any) -> Any:
    return numba_support.as_array(value) if isinstance(value, Tensor) else value
