"""Launching the persistent scan: how many units a block owns, and whether the blocks fit together.

Its grid barrier waits for every block, so all of them must be resident at the same time. A plan
says how many there are and what each takes; past the bound there is none, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnarch.kernels.gpu.numba_support import (
    as_array,
    check_device,
    cooperative_grid_limit,
    has_numba,
    load_numba,
    resident_blocks,
    simulating,
    stream_of,
)
from nnarch.kernels.gpu.targets import Target, current_target

from . import kinds
from .gpu_problem import Outputs, Sequence

THREADS = 256
MOST_SEQUENCES = 8
"""From there on a product of matrices is faster (triton_step.py)."""

MOST_REGISTERS = 255
"""Of a thread: as many as exist, with which a processor still holds one block of 256 threads."""


@dataclass(frozen=True)
class Plan:
    """A launch.

    Attributes:
        blocks, threads: of the grid.
        units: that a block owns.
        batch: sequences that the kernel is compiled for.
        shared_bytes: of a block.
    """

    blocks: int
    threads: int
    units: int
    batch: int
    shared_bytes: int


def plan(kind: int, sequences: int, hidden: int, target: Target, processors: int) -> Plan:
    """How to run a scan on a GPU of `processors` processors.

    Raises:
        ValueError: too many sequences, or weights that do not fit the shared memory of the blocks
            that can be resident at the same time; the message has the numbers.
    """
    if sequences > MOST_SEQUENCES:
        raise ValueError(
            f"recurrent_scan: the persistent kernel takes {MOST_SEQUENCES} sequences, "
            f"got {sequences}"
        )
    batch = 1 << max(0, sequences - 1).bit_length()
    units = -(-hidden // processors)
    if units * batch > THREADS:
        raise ValueError(
            f"recurrent_scan: the persistent kernel of H = {hidden} and {sequences} sequences "
            f"needs {units * batch} cells a block on {processors} processors, {THREADS} exist"
        )
    blocks = -(-hidden // units)
    shared = 4 * _floats(kinds.GATES[kind], batch, hidden, units, THREADS)
    capability = (9, 0) if target.name == "sm_90" else divmod(int(target.arch), 10)
    resident = 0
    if shared <= target.shared_bytes:
        resident = cooperative_grid_limit(
            capability,
            threads=THREADS,
            registers=MOST_REGISTERS,
            shared_bytes=shared,
            processors=processors,
        )
    if blocks > resident:
        raise ValueError(
            f"recurrent_scan: the persistent kernel of H = {hidden} needs {blocks} blocks of "
            f"{shared} bytes of shared memory at the same time; {target.name} with {processors} "
            f"processors holds {resident}"
        )
    return Plan(blocks, THREADS, units, batch, shared)


def _floats(gates: int, batch: int, hidden: int, units: int, threads: int) -> int:
    """Shared memory of a block: weights, h, partial sums, sums, c."""
    parts = threads // units
    return (
        gates * hidden * units
        + batch * hidden
        + gates * batch * parts * units
        + gates * batch * units
        + batch * units
    )


def plan_here(kind: int, sequences: int, hidden: int, device: torch.device) -> Plan:
    """:func:`plan` for the GPU in use; in the simulator, which runs one block, for one block."""
    if not simulating():
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        return plan(kind, sequences, hidden, current_target(), processors)
    batch = 1 << max(0, sequences - 1).bit_length()
    threads = max(2, batch) * hidden
    shared = 4 * _floats(kinds.GATES[kind], batch, hidden, hidden, threads)
    return Plan(1, threads, hidden, batch, shared)


def fits_persistent(
    kind: int, x: Tensor, weight_hh: Tensor, weight_hr: Tensor | None, sequence: Sequence
) -> bool:
    """Whether the persistent scan runs here: NVIDIA's GPU, Numba, few sequences, enough memory."""
    hidden = weight_hh.shape[0] // kinds.GATES[kind]
    if weight_hr is not None or x.device.type != "cuda" or current_target().backend != "cuda":
        return False
    try:
        plan_here(kind, sequence.batch, hidden, x.device)
    except ValueError:
        return False
    return has_numba("recurrent_scan takes a Triton kernel a step, not one of all steps")


def persistent_forward(
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
    """As :func:`triton_small.small_forward`, without a projection.

    Raises:
        NotImplementedError: CPU tensors outside the simulator, or a projection.
        ValueError: it does not fit, as :func:`plan` says.
    """
    check_device("recurrent_scan", gx)
    if weight_hr is not None:
        raise NotImplementedError("backend 'numba' lacks nnarch::recurrent_scan with weight_hr")
    hidden = weight_hh.shape[1]
    chosen = plan_here(kind, sequence.batch, hidden, gx.device)
    floats = {"dtype": torch.float32, "device": gx.device}
    states = torch.zeros((2, chosen.batch, hidden), **floats)
    if h0 is not None:
        states[0, : sequence.batch] = h0
    cells = torch.zeros((sequence.batch, hidden), **floats)
    if c0 is not None:
        cells.copy_(c0)
    starts = sequence.starts
    if starts is None:
        starts = torch.arange(sequence.steps + 1, device=gx.device) * sequence.batch
    y = out.y.view(sequence.rows, hidden)
    results = [_float32_like(t) for t in (y, cells, out.reserve)]
    arguments = (
        gx.float(),
        weight_hh.float().contiguous(),
        torch.zeros(hidden, **floats) if bias_n is None else bias_n.float(),
        torch.zeros((3, hidden), **floats) if peephole is None else peephole.float().contiguous(),
        starts,
        states,
        cells,
        *results,
        chosen.units,
        reverse,
    )
    _launch(kind, chosen, arguments, gx)
    y.copy_(results[0])
    out.h.copy_(states[sequence.steps % 2, : sequence.batch])
    if kind == kinds.LSTM:
        out.c.copy_(results[1])
    out.reserve.copy_(results[2])


def _float32_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=torch.float32, device=tensor.device)


def _launch(kind: int, chosen: Plan, arguments: tuple[object, ...], like: Tensor) -> None:
    from .numba_kernel import persistent_kernel

    kernel = persistent_kernel(kind, chosen.batch)
    sent = tuple(as_array(a) if isinstance(a, Tensor) else a for a in arguments)
    if not simulating():
        _allow_shared_memory(kernel, sent, chosen.shared_bytes)
        resident = resident_blocks(kernel, sent, chosen.threads, chosen.shared_bytes)
        if chosen.blocks > resident:
            raise ValueError(
                f"recurrent_scan: the persistent kernel needs {chosen.blocks} blocks at the same "
                f"time, this GPU holds {resident}"
            )
    kernel[chosen.blocks, chosen.threads, stream_of(like), chosen.shared_bytes](*sent)


def _allow_shared_memory(kernel: object, arguments: tuple[object, ...], size: int) -> None:
    """Raise the 48 KiB of dynamic shared memory that a kernel may have unless it asks for more.

    Numba has no call for it, so the driver's is made as Numba makes the one beside it
    (`set_shared_memory_carveout`).
    """
    from cuda.bindings import driver as binding  # type: ignore[attr-defined]
    from numba.cuda.cudadrv.driver import driver

    types = tuple(load_numba().typeof(a) for a in arguments)
    compiled = kernel.overloads.get(types) or kernel.compile(types)  # type: ignore[attr-defined]
    function = compiled._codelibrary.get_cufunc()
    attribute = binding.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    driver.cuKernelSetAttribute(attribute, size, function.handle, function.device.id)
