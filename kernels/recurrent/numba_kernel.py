"""The persistent scan: W_hh in the shared memory of all blocks, one grid barrier a step.

A block owns some units. It holds their rows of W_hh, all gates, in shared memory, and their cells;
a step reads all of h, which every block has written a part of, from global memory. Everything is
float32: the launcher converts half precision.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from nnarch.kernels.gpu.numba_support import load_numba

from . import kinds

cuda, float32 = load_numba().cuda, load_numba().float32
_ONE = np.float32(1.0)  # a plain 1.0 would be float64, and all that it meets with it


@cuda.jit(device=True)
def _sigmoid(x):
    return _ONE / (_ONE + math.exp(-x))


@functools.cache
def persistent_kernel(kind: int, batch: int) -> Any:
    """The kernel of one cell for up to `batch` sequences, both known at compile time.

    Shared memory, in floats: W [gate][k][unit], h [sequence][k], partial sums
    [gate][sequence][part][unit], their sums [gate][sequence][unit], c [sequence][unit].
    A thread adds up one unit's gates over k = part, part + parts, …: neighbouring threads read
    neighbouring words of W, and h by broadcast.
    """
    gates = kinds.GATES[kind]
    products = gates * batch
    lstm, gru, relu = kind == kinds.LSTM, kind == kinds.GRU, kind == kinds.RNN_RELU

    @cuda.jit
    def scan(gx, w, bias_n, peephole, starts, states, c0, y, c_last, reserve, units, reverse):
        # gx [rows, gates·H], w [gates·H, H], bias_n [H], peephole [3, H], starts [T + 1],
        # states [2, batch, H] (the initial state in the first), c0 and c_last [B, H],
        # y [rows, H], reserve [rows, 5·H or 4·H] or [rows, 0].
        hidden = w.shape[1]
        steps = starts.shape[0] - 1
        sequences = c0.shape[0]
        thread, threads = cuda.threadIdx.x, cuda.blockDim.x
        first_unit = cuda.blockIdx.x * units
        parts = threads // units
        saves = reserve.shape[1] > 0

        memory = cuda.shared.array(0, float32)
        h_at = gates * hidden * units
        partial_at = h_at + batch * hidden
        sum_at = partial_at + products * parts * units
        c_at = sum_at + products * units

        for row in range(gates * units):
            gate, u = row // units, row % units
            for k in range(thread, hidden, threads):
                value = np.float32(0.0)
                if first_unit + u < hidden:
                    value = w[gate * hidden + first_unit + u, k]
                memory[(gate * hidden + k) * units + u] = value

        # Of the cell that this thread computes, if any.
        sequence, own = thread // units, thread % units
        unit = first_unit + own
        has_cell = thread < batch * units and unit < hidden and sequence < sequences
        part = thread // units
        if lstm and has_cell:
            memory[c_at + thread] = c0[sequence, unit]

        grid = cuda.cg.this_grid()
        acc = cuda.local.array(products, float32)
        for step in range(steps):
            t = step
            if reverse:
                t = steps - 1 - step
            first = starts[t]
            runs = has_cell and sequence < starts[t + 1] - first
            row = first + sequence
            x0 = x1 = x2 = x3 = np.float32(0.0)
            if runs:  # asked for now, needed after the product
                x0 = gx[row, unit]
                if gates >= 3:
                    x1 = gx[row, hidden + unit]
                    x2 = gx[row, 2 * hidden + unit]
                if gates == 4:
                    x3 = gx[row, 3 * hidden + unit]

            now, then = step % 2, 1 - step % 2
            for k in range(thread, batch * hidden, threads):
                memory[h_at + k] = states[now, k // hidden, k % hidden]
            cuda.syncthreads()

            if part < parts:
                for i in range(products):
                    acc[i] = np.float32(0.0)
                for k in range(part, hidden, parts):
                    for gate in range(gates):
                        weight = memory[(gate * hidden + k) * units + own]
                        for b in range(batch):
                            acc[gate * batch + b] += weight * memory[h_at + b * hidden + k]
                for i in range(products):
                    memory[partial_at + (i * parts + part) * units + own] = acc[i]
            cuda.syncthreads()

            for i in range(thread, products * units, threads):
                total = np.float32(0.0)
                for p in range(parts):  # always in this order
                    total += memory[partial_at + (i // units * parts + p) * units + i % units]
                memory[sum_at + i] = total
            cuda.syncthreads()

            if has_cell:
                h = memory[h_at + sequence * hidden + unit]
                s0 = memory[sum_at + thread]
                if runs:
                    if lstm:
                        c = memory[c_at + thread]
                        s1 = memory[sum_at + batch * units + thread]
                        s2 = memory[sum_at + 2 * batch * units + thread]
                        s3 = memory[sum_at + 3 * batch * units + thread]
                        gate_i = _sigmoid(x0 + s0 + peephole[0, unit] * c)
                        gate_f = _sigmoid(x1 + s1 + peephole[1, unit] * c)
                        gate_g = math.tanh(x2 + s2)
                        c = gate_f * c + gate_i * gate_g
                        gate_o = _sigmoid(x3 + s3 + peephole[2, unit] * c)
                        h = gate_o * math.tanh(c)
                        memory[c_at + thread] = c
                        if saves:
                            reserve[row, unit] = gate_i
                            reserve[row, hidden + unit] = gate_f
                            reserve[row, 2 * hidden + unit] = gate_g
                            reserve[row, 3 * hidden + unit] = gate_o
                            reserve[row, 4 * hidden + unit] = c
                    elif gru:
                        s1 = memory[sum_at + batch * units + thread]
                        s2 = memory[sum_at + 2 * batch * units + thread] + bias_n[unit]
                        gate_r = _sigmoid(x0 + s0)
                        gate_z = _sigmoid(x1 + s1)
                        gate_n = math.tanh(x2 + gate_r * s2)
                        h = (_ONE - gate_z) * gate_n + gate_z * h
                        if saves:
                            reserve[row, unit] = gate_r
                            reserve[row, hidden + unit] = gate_z
                            reserve[row, 2 * hidden + unit] = gate_n
                            reserve[row, 3 * hidden + unit] = s2
                    else:
                        h = x0 + s0
                        if not relu:
                            h = math.tanh(h)
                        elif h < np.float32(0.0):
                            h = np.float32(0.0)
                    y[row, unit] = h
                states[then, sequence, unit] = h  # of a sequence that has ended: as it was
            grid.sync()

        if lstm and has_cell:
            c_last[sequence, unit] = memory[c_at + thread]

    return scan
