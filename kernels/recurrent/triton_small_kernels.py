"""Small hidden sizes: a program keeps the state's weights and runs all steps of some sequences.

Tiles are [groups, units of a group, sequences]. Products are batched over the groups: Triton gives
every warp a group of its own and multiplies by the instructions of single warps, whose operands are
in registers. So the weights are read once, for all steps, and 8 sequences fill an instruction.
Hopper's larger instructions would read all weights from shared memory again in every step.

The rows of a group's weights are [gate, unit]: all gates of a unit end in one thread, and taking
them apart (:func:`_gates`) moves nothing. A while loop is on purpose: Triton moves the loads of
operands into a for loop, which would keep the weights in shared memory.
"""

import triton
import triton.language as tl

from .triton_cell import (
    gru_cell,
    lstm_cell,
    rnn_act,
    step_rows,
)


@triton.jit
def product(w, h, z, DOT: tl.constexpr):
    """z + w·h, for w [G, M, K], h [K, N] and z [G, M, N] in float32; N is 1 where it is no dot."""
    if DOT:
        every = tl.broadcast_to(h.to(w.dtype)[None, :, :], (w.shape[0], h.shape[0], h.shape[1]))
        y = tl.dot(w, every, acc=z)
    else:
        y = z + tl.sum(w.to(tl.float32) * tl.trans(h)[None, :, :], axis=2)[:, :, None]
    return y


@triton.jit
def flat(z):
    """[G, U, N] as [G·U, N], an operand of a product."""
    return tl.reshape(z, (z.shape[0] * z.shape[1], z.shape[2]))


@triton.jit
def stacked(a, b):
    """Two [G, U, N], one behind the other: [2·G·U, N], an operand of a product."""
    both = tl.permute(tl.join(a, b), (3, 0, 1, 2))
    return tl.reshape(both, (2 * a.shape[0] * a.shape[1], a.shape[2]))


@triton.jit
def gates(z):
    """Four [G, U, N] from [G, 4·U, N]."""
    z = tl.reshape(z, (z.shape[0], 2, 2, z.shape[1] // 4, z.shape[2]))
    first, last = tl.split(tl.permute(z, (0, 3, 4, 2, 1)))
    z0, z1 = tl.split(first)
    z2, z3 = tl.split(last)
    return z0, z1, z2, z3


@triton.jit
def joined(z0, z1, z2, z3):
    """The reverse of :func:`gates`."""
    z = tl.permute(tl.join(tl.join(z0, z1), tl.join(z2, z3)), (0, 4, 3, 1, 2))
    return tl.reshape(z, (z0.shape[0], 4 * z0.shape[1], z0.shape[2]))


@triton.jit
def units(SIZE: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr):
    """The unit and the part (gate) of every row of the groups, [G, PARTS·U]."""
    U: tl.constexpr = SIZE // GROUPS
    m = tl.arange(0, PARTS * U)[None, :]
    return tl.arange(0, GROUPS)[:, None] * U + m % U, m // U


@triton.jit
def matrix(ptr, i, rows_in, j, columns_in, stride_i, stride_j):
    """The elements [i, j] of a matrix for i [G, M] and j [K], 0 outside."""
    inside = rows_in[:, :, None] & columns_in[None, None, :]
    where = (i.to(tl.int64) * stride_i)[:, :, None] + (j.to(tl.int64) * stride_j)[None, None, :]
    return tl.load(ptr + where, mask=inside, other=0.0)


@triton.jit
def rows(ptr, row, stride, column, inside):
    """Rows of a matrix as columns of a tile: row [N], column [G, M]."""
    where = row[None, None, :] * stride + column[:, :, None]
    return tl.load(ptr + where, mask=inside, other=0.0)


@triton.jit
def put(ptr, row, stride, column, value, inside):
    """The reverse of :func:`rows`."""
    where = row[None, None, :] * stride + column[:, :, None]
    tl.store(ptr + where, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def both(unit_in, runs):
    """Which elements of a tile exist, from [G, M] and [N]."""
    return unit_in[:, :, None] & runs[None, None, :]


@triton.jit
def peephole(ptr, row, u, H):
    """One row of the peephole weights [3, H] as [G, U, 1]; zeros without any."""
    if ptr is None:
        weight = tl.zeros((u.shape[0], u.shape[1], 1), tl.float32)
    else:
        weight = tl.load(ptr + row * H + u, mask=u < H, other=0.0).to(tl.float32)[:, :, None]
    return weight


@triton.jit
def when(runs, new, old, starts_ptr):
    """`new` for the sequences that run; in sequences of one length all of them do."""
    return new if starts_ptr is None else tl.where(runs[None, None, :], new, old)


@triton.jit
def recurrent_small_fwd_kernel(
    gx_ptr,  # [rows, gates·H]: the input's product and the biases
    h0_ptr,  # [B, P] or None
    c0_ptr,  # [B, H] or None
    w_ptr,  # W_hh [gates·H, P], any strides
    bias_n_ptr,  # [H], the GRU's; or None
    peephole_ptr,  # [3, H] or None
    proj_ptr,  # W_hr [P, H], any strides; or None
    starts_ptr,  # [T + 1] int64, the first row of every step; None where all have B
    y_ptr,  # [rows, P]
    h_ptr,  # [B, P]
    c_ptr,  # [B, H]
    reserve_ptr,  # [rows, 5·H or 4·H] or None
    steps,
    B,
    H,
    P,
    stride_wr,
    stride_wk,
    stride_pr,
    stride_pk,
    CELL: tl.constexpr,
    REVERSE: tl.constexpr,
    DOT: tl.constexpr,
    HIDDEN: tl.constexpr,  # at least H
    OUT: tl.constexpr,  # at least P; HIDDEN without a projection
    GROUPS: tl.constexpr,  # of HIDDEN
    OUT_GROUPS: tl.constexpr,  # of OUT; GROUPS without a projection
    BLOCK_B: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    PARTS: tl.constexpr = 4 if CELL >= 2 else 1
    u, _ = units(HIDDEN, GROUPS, 1)
    p, _ = units(OUT, OUT_GROUPS, 1)
    unit, part = units(HIDDEN, GROUPS, PARTS)
    u_in, p_in, b_in, part_in = u < H, p < P, b < B, unit < H
    width = (3 if CELL == 3 else PARTS) * H

    # A GRU's parts are r, z, W_hn·h + b_hn and the input's n: no weights in the last, no input in
    # the third.
    k = tl.arange(0, OUT)
    w_in = part_in & (part < 3) if CELL == 3 else part_in
    x_in = part_in & (part != 2) if CELL == 3 else part_in
    x_column = tl.where(part == 3, 2, part) * H + unit if CELL == 3 else part * H + unit
    w = matrix(w_ptr, part * H + unit, w_in, k, k < P, stride_wr, stride_wk)
    if CELL == 2:
        peep_i = peephole(peephole_ptr, 0, u, H)
        peep_f = peephole(peephole_ptr, 1, u, H)
        peep_o = peephole(peephole_ptr, 2, u, H)
        if proj_ptr is not None:
            j = tl.arange(0, HIDDEN)
            proj = matrix(proj_ptr, p, p_in, j, j < H, stride_pr, stride_pk)
    if CELL == 3 and bias_n_ptr is not None:
        bias_in = part_in & (part == 2)
        bias = tl.load(bias_n_ptr + unit, mask=bias_in, other=0.0).to(tl.float32)[:, :, None]

    row = b.to(tl.int64)
    h = tl.zeros((OUT_GROUPS, OUT // OUT_GROUPS, BLOCK_B), tl.float32)
    c = tl.zeros((GROUPS, HIDDEN // GROUPS, BLOCK_B), tl.float32)
    if h0_ptr is not None:
        h += rows(h0_ptr, row, P, p, both(p_in, b_in)).to(tl.float32)
    if CELL == 2 and c0_ptr is not None:
        c += rows(c0_ptr, row, H, u, both(u_in, b_in)).to(tl.float32)

    # The next step's input is on its way during a step, and its rows' numbers a step before.
    step = 0
    last = steps - 1
    first, count = step_rows(last if REVERSE else 0, steps, B, starts_ptr)
    first_next, count_next = step_rows(last - 1 if REVERSE else 1, steps, B, starts_ptr)
    x = rows(gx_ptr, first + row, width, x_column, both(x_in, b < count))
    while step < steps:
        runs, r = b < count, first + row
        x_next = rows(gx_ptr, first_next + row, width, x_column, both(x_in, b < count_next))
        first, count = first_next, count_next
        after = last - step - 2 if REVERSE else step + 2
        first_next, count_next = step_rows(after, steps, B, starts_ptr)

        z = x.to(tl.float32)
        if CELL == 3 and bias_n_ptr is not None:
            z += bias
        z = product(w, flat(h), z, DOT)
        if CELL == 2:
            z0, z1, z2, z3 = gates(z)
            g0, g1, g2, g3, c_next, h_next = lstm_cell(z0, z1, z2, z3, c, peep_i, peep_f, peep_o)
            c = when(runs, c_next, c, starts_ptr)
            if reserve_ptr is not None:
                activated = joined(g0, g1, g2, g3)
                put(reserve_ptr, r, 5 * H, part * H + unit, activated, both(part_in, runs))
                put(reserve_ptr + 4 * H, r, 5 * H, u, c_next, both(u_in, runs))
            if proj_ptr is not None:
                nothing = tl.zeros_like(h)
                h_next = product(proj, flat(h_next), nothing, DOT)
        elif CELL == 3:
            z0, z1, hn, z3 = gates(z)
            g0, g1, g2, h_next = gru_cell(z0, z1, z3, 0.0, 0.0, hn, h)
            if reserve_ptr is not None:
                activated = joined(g0, g1, g2, hn)
                put(reserve_ptr, r, 4 * H, part * H + unit, activated, both(part_in, runs))
        else:
            h_next = rnn_act(z, CELL)
        h = when(runs, h_next, h, starts_ptr)
        put(y_ptr, r, P, p, h_next, both(p_in, runs))
        x = x_next
        step += 1

    put(h_ptr, row, P, p, h, both(p_in, b_in))
    if CELL == 2:
        put(c_ptr, row, H, u, c, both(u_in, b_in))
