"""The Numba-CUDA kernels of sparse reservoirs. All arrays are flat; see numba_scan.py.

Arguments of both:
    values, columns, lengths, starts, rows: the matrix in slices of 32 rows.
    w_in: [n, given + fed]; bias: [n]; x: [steps, batch, given], or [.., n] where `driven`.
    leak, activation: the neuron, by its code in kernels/activation/kinds.py.
    skip: steps whose states are not kept; states: [steps - skip, batch, n].
    last: [batch, n], the state before the first step on entry, after the last on exit.
    fed, y0, w_out, readout, b_out, y: the outputs that are fed back (none where fed is 0): y0
        [batch, fed], w_out [fed, readout], b_out [fed], y [steps, batch, fed].
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from nnarch.kernels.gpu.numba_support import load_numba

from .numba_slices import WARP

numba = load_numba()
cuda, float32, float64 = numba.cuda, numba.float32, numba.float64
int32, int64 = numba.int32, numba.int64

GRID_THREADS = 256  # of a block of the grid kernel
# Of a block of the shared kernel, at most. A thread takes 137 registers; of 512 or 1024 threads
# each would have 128 or 64, and spill.
SHARED_THREADS = 256
_TANH, _SIGMOID, _RELU = 9, 10, 1


class Kernels(NamedTuple):
    """The two kernels of one type of number."""

    shared: Any
    grid: Any
    signature_shared: Any
    signature_grid: Any


class _Parts(NamedTuple):
    """What a step consists of, as device functions."""

    respond: Any
    drive: Any
    multiply: Any
    partial_output: Any
    add_up: Any


@functools.cache
def kernels(dtype: torch.dtype) -> Kernels:
    """The kernels that compute in float32 or float64."""
    number = float64 if dtype == torch.float64 else float32
    parts = _parts(number)
    f, i4, i8 = number[::1], int32[::1], int64[::1]
    signature = (
        f, i4, i4, i8, i4, f, f, f, int64, int64, float64, int64, int64, int64, int64, int64, f, f,
        int64, f, f, int64, f, f,
    )  # fmt: skip
    shared, grid = _shared_kernel(number, parts), _grid_kernel(number, parts)
    return Kernels(shared, grid, signature, (*signature, f))


def _parts(number: Any) -> _Parts:
    """They compute in `number`."""
    one, zero = number(1.0), number(0.0)

    @cuda.jit(device=True)
    def respond(z, activation):
        if activation == _TANH:
            return math.tanh(z)
        if activation == _SIGMOID:
            return one / (one + math.exp(-z))
        if activation == _RELU and z < zero:
            return zero
        return z

    @cuda.jit(device=True)
    def drive(row, t, b, w_in, bias, x, driven, given, batch, n, fed, y0, y):
        """What a neuron receives from outside in a step."""
        z = bias[row]
        if driven:
            return z + x[(t * batch + b) * n + row]
        width = given + fed
        for i in range(given):
            z += w_in[row * width + i] * x[(t * batch + b) * given + i]
        for o in range(fed):
            before = y0[b * fed + o] if t == 0 else y[((t - 1) * batch + b) * fed + o]
            z += w_in[row * width + given + o] * before
        return z

    @cuda.jit(device=True)
    def multiply(z, slice_, lane, values, columns, lengths, starts, state, offset):
        """z plus a row of the matrix times a state."""
        at = starts[slice_] + lane
        for _ in range(lengths[slice_]):
            z += values[at] * state[offset + columns[at]]
            at += WARP
        return z

    @cuda.jit(device=True)
    def partial_output(
        o, first, step, t, b, state, offset, n, given, batch, fed, x, y0, y, w_out, readout
    ):
        """A thread's share of an output: every `step`-th feature from `first` on."""
        total = zero
        for i in range(first, n, step):
            total += w_out[o * readout + i] * state[offset + i]
        for i in range(n + first, readout, step):
            j = i - n
            if j < given:
                value = x[(t * batch + b) * given + j]
            elif t == 0:
                value = y0[b * fed + j - given]
            else:
                value = y[((t - 1) * batch + b) * fed + j - given]
            total += w_out[o * readout + i] * value
        return total

    @cuda.jit(device=True)
    def add_up(memory, first, thread, threads):
        """The sum of every thread's number, in a fixed order, for thread 0; the block calls it."""
        if thread < WARP:
            for i in range(thread + WARP, threads, WARP):
                memory[first + thread] += memory[first + i]
        cuda.syncthreads()
        total = zero
        if thread == 0:
            for i in range(WARP):
                total += memory[first + i]
        return total

    return _Parts(respond, drive, multiply, partial_output, add_up)


def _shared_kernel(number: Any, parts: _Parts) -> Any:
    """A block for each batch row, the states in its shared memory."""
    respond, drive, multiply, partial_output, add_up = parts
    zero = number(0.0)

    @cuda.jit
    def scan_shared(
        values, columns, lengths, starts, rows, w_in, bias, x, driven, given, leak, activation,
        steps, batch, n, skip, states, last, fed, y0, w_out, readout, b_out, y,
    ):  # fmt: skip
        b, thread, threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
        lane, warp, warps = thread % WARP, thread // WARP, threads // WARP
        memory = cuda.shared.array(0, dtype=number)  # two states, then a number of each thread
        slices, sums = (n + WARP - 1) // WARP, 2 * (n + 1)
        stay, rate = number(1.0 - leak), number(leak)
        for i in range(thread, n, threads):
            memory[i] = last[int64(b) * n + i]
        if thread == 0:
            memory[n] = zero
            memory[2 * n + 1] = zero
        cuda.syncthreads()
        old, new = 0, n + 1
        for t in range(int64(steps)):
            for s in range(warp, slices, warps):
                row = rows[s * WARP + lane]
                if row < n:
                    z = drive(row, t, b, w_in, bias, x, driven, given, batch, n, fed, y0, y)
                    z = multiply(z, s, lane, values, columns, lengths, starts, memory, old)
                    value = stay * memory[old + row] + rate * respond(z, activation)
                    memory[new + row] = value
                    if t >= skip:
                        states[((t - skip) * batch + b) * n + row] = value
            cuda.syncthreads()
            old, new = new, old
            for o in range(fed):
                memory[sums + thread] = partial_output(
                    o, thread, threads, t, b, memory, old, n, given, batch, fed, x, y0, y, w_out,
                    readout,
                )  # fmt: skip
                cuda.syncthreads()
                total = add_up(memory, sums, thread, threads)
                if thread == 0:
                    y[(t * batch + b) * fed + o] = total + b_out[o]
                cuda.syncthreads()
        for i in range(thread, n, threads):
            last[int64(b) * n + i] = memory[old + i]

    return scan_shared


def _grid_kernel(number: Any, parts: _Parts) -> Any:
    """All blocks for all batch rows, the states in `work`."""
    respond, drive, multiply, partial_output, add_up = parts

    @cuda.jit
    def scan_grid(
        values, columns, lengths, starts, rows, w_in, bias, x, driven, given, leak, activation,
        steps, batch, n, skip, states, last, fed, y0, w_out, readout, b_out, y, work,
    ):  # fmt: skip
        grid = cuda.cg.this_grid()
        sums = cuda.shared.array(GRID_THREADS, dtype=number)
        thread, threads = cuda.grid(1), cuda.gridsize(1)
        lane, warp, warps = thread % WARP, thread // WARP, threads // WARP
        slices = (n + WARP - 1) // WARP
        stay, rate = number(1.0 - leak), number(leak)
        for i in range(thread, int64(batch) * n, threads):
            work[i // n * (n + 1) + i % n] = last[i]
        grid.sync()
        old, new = int64(0), int64(batch) * (n + 1)
        for t in range(int64(steps)):
            for item in range(warp, int64(batch) * slices, warps):
                b, s = item // slices, item % slices
                row = rows[s * WARP + lane]
                if row < n:
                    at = b * (n + 1)
                    z = drive(row, t, b, w_in, bias, x, driven, given, batch, n, fed, y0, y)
                    z = multiply(z, s, lane, values, columns, lengths, starts, work, old + at)
                    value = stay * work[old + at + row] + rate * respond(z, activation)
                    work[new + at + row] = value
                    if t >= skip:
                        states[((t - skip) * batch + b) * n + row] = value
            grid.sync()
            old, new = new, old
            if fed:
                for item in range(cuda.blockIdx.x, int64(batch) * fed, cuda.gridDim.x):
                    b, o, me = item // fed, item % fed, cuda.threadIdx.x
                    sums[me] = partial_output(
                        o, me, cuda.blockDim.x, t, b, work, old + b * (n + 1), n, given, batch,
                        fed, x, y0, y, w_out, readout,
                    )  # fmt: skip
                    cuda.syncthreads()
                    total = add_up(sums, 0, me, cuda.blockDim.x)
                    if me == 0:
                        y[(t * batch + b) * fed + o] = total + b_out[o]
                    cuda.syncthreads()
                grid.sync()
        for i in range(thread, int64(batch) * n, threads):
            last[i] = work[old + i // n * (n + 1) + i % n]

    return scan_grid
