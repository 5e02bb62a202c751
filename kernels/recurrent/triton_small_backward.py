"""Small hidden sizes, against time: tiles and words of triton_small_kernels.py."""

import triton
import triton.language as tl

from .triton_cell import gru_cell_backward, lstm_cell_backward, rnn_derivative, step_rows
from .triton_small_kernels import (
    both,
    flat,
    gates,
    joined,
    matrix,
    peephole,
    product,
    put,
    rows,
    stacked,
    units,
    when,
)


@triton.jit
def recurrent_small_bwd_kernel(
    dy_ptr,  # [rows, P], any strides; or None
    dh_ptr,  # [B, P] or None: of the last h
    dc_ptr,  # [B, H] or None: of the last c
    h0_ptr,  # [B, P] or None
    c0_ptr,  # [B, H] or None
    w_ptr,  # W_hh [gates·H, P], any strides
    peephole_ptr,  # [3, H] or None
    proj_ptr,  # W_hr [P, H], any strides; or None
    starts_ptr,  # [T + 1] int64 or None
    y_ptr,  # [rows, P]
    reserve_ptr,  # [rows, 5·H or 4·H]
    dgx_ptr,  # [rows, gates·H]: of the input's product
    dgh_ptr,  # [rows, gates·H]: of the state's, where it is another (GRU); or None
    dy_all_ptr,  # [rows, P]: of every h, with what later steps add; or None
    dh0_ptr,  # [B, P] or None
    dc0_ptr,  # [B, H] or None
    steps,
    B,
    H,
    P,
    stride_wr,
    stride_wk,
    stride_pr,
    stride_pk,
    stride_dr,
    stride_dp,
    CELL: tl.constexpr,
    REVERSE: tl.constexpr,
    DOT: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    OUT_GROUPS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    PARTS: tl.constexpr = 4 if CELL >= 2 else 1
    SAVED: tl.constexpr = 5 if CELL == 2 else 4
    u, _ = units(HIDDEN, GROUPS, 1)
    p, _ = units(OUT, OUT_GROUPS, 1)
    unit, part = units(HIDDEN, GROUPS, PARTS)
    column = part * H + unit
    u_in, p_in, b_in, part_in = u < H, p < P, b < B, unit < H
    width = (3 if CELL == 3 else PARTS) * H
    d_in = part_in & (part < 3) if CELL == 3 else part_in

    # Transposed, [P, gates·H], and in two parts: a sum over four gates would be one long chain of
    # dependent instructions.
    if CELL >= 2:
        j = tl.arange(0, 2 * HIDDEN)
        j_in, j_row = j % HIDDEN < H, j // HIDDEN * H + j % HIDDEN
        w = matrix(w_ptr, p, p_in, j_row, j_in, stride_wk, stride_wr)
        rest_ptr = w_ptr + tl.cast(2 * H, tl.int64) * stride_wr
    k = tl.arange(0, HIDDEN)
    if CELL == 2:
        rest = matrix(rest_ptr, p, p_in, j_row, j_in, stride_wk, stride_wr)
        peep_i = peephole(peephole_ptr, 0, u, H)
        peep_f = peephole(peephole_ptr, 1, u, H)
        peep_o = peephole(peephole_ptr, 2, u, H)
        if proj_ptr is not None:
            o = tl.arange(0, OUT)
            proj = matrix(proj_ptr, u, u_in, o, o < P, stride_pk, stride_pr)
    elif CELL == 3:
        rest = matrix(rest_ptr, p, p_in, k, k < H, stride_wk, stride_wr)
    else:
        w = matrix(w_ptr, p, p_in, k, k < H, stride_wk, stride_wr)

    row = b.to(tl.int64)
    nothing = tl.zeros((OUT_GROUPS, OUT // OUT_GROUPS, BLOCK_B), tl.float32)
    dh = nothing
    if dh_ptr is not None:
        dh += rows(dh_ptr, row, P, p, both(p_in, b_in)).to(tl.float32)
    dc = tl.zeros((GROUPS, HIDDEN // GROUPS, BLOCK_B), tl.float32)
    if CELL == 2:
        if dc_ptr is not None:
            dc += rows(dc_ptr, row, H, u, both(u_in, b_in)).to(tl.float32)
        state_ptr, start_ptr, state_stride = reserve_ptr + 4 * H, c0_ptr, 5 * H
    else:
        state_ptr, start_ptr, state_stride = y_ptr, h0_ptr, P

    # What the next step (the one before in time) reads is on its way during a step.
    step = 0
    last = steps - 1
    first, count = step_rows(0 if REVERSE else last, steps, B, starts_ptr)
    before, count_before = step_rows(1 if REVERSE else last - 1, steps, B, starts_ptr)
    state = rows(state_ptr, first + row, state_stride, u, both(u_in, b < count))
    if CELL >= 2:
        state_before = rows(state_ptr, before + row, state_stride, u, both(u_in, b < count_before))
        saved = rows(reserve_ptr, first + row, SAVED * H, column, both(part_in, b < count))
    if dy_ptr is not None:
        dy = rows(dy_ptr, (first + row) * stride_dr, 1, p * stride_dp, both(p_in, b < count))
    while step < steps:
        runs, r = b < count, first + row
        known = runs & (b < count_before)  # the others start at this step, from h0 and c0
        inside, parts_inside = both(u_in, runs), both(d_in, runs)
        d = dh
        if dy_ptr is not None:
            d += dy.to(tl.float32)
            dy = rows(
                dy_ptr, (before + row) * stride_dr, 1, p * stride_dp, both(p_in, b < count_before)
            )
        if CELL >= 2:
            g0, g1, g2, g3 = gates(saved.to(tl.float32))
            saved = rows(
                reserve_ptr, before + row, SAVED * H, column, both(part_in, b < count_before)
            )
            now = state.to(tl.float32)
            s_before = tl.where(known[None, None, :], state_before.to(tl.float32), 0.0)
            if start_ptr is not None:
                s_before += rows(start_ptr, row, H, u, both(u_in, runs & ~known)).to(tl.float32)
            state = state_before
        first, count = before, count_before
        t = step + 2 if REVERSE else last - step - 2
        before, count_before = step_rows(t, steps, B, starts_ptr)
        if CELL >= 2:
            state_before = rows(
                state_ptr, before + row, state_stride, u, both(u_in, b < count_before)
            )
        if CELL == 2:
            if proj_ptr is not None:
                put(dy_all_ptr, r, P, p, d, both(p_in, runs))
                d = product(proj, flat(d), tl.zeros_like(dc), DOT)
            d0, d1, d2, d3, dc_next = lstm_cell_backward(
                d, dc, g0, g1, g2, g3, now, s_before, peep_i, peep_f, peep_o
            )
            dc = when(runs, dc_next, dc, starts_ptr)
            put(dgx_ptr, r, width, column, joined(d0, d1, d2, d3), parts_inside)
            dh_next = product(w, stacked(d0, d1), nothing, DOT)
            dh_rest = product(rest, stacked(d2, d3), nothing, DOT)
        elif CELL == 3:
            d0, d1, d2, d3, direct = gru_cell_backward(d, g0, g1, g2, g3, s_before)
            put(dgx_ptr, r, width, column, joined(d0, d1, d2, d2), parts_inside)
            put(dgh_ptr, r, width, column, joined(d0, d1, d3, d3), parts_inside)
            dh_next = product(w, stacked(d0, d1), direct, DOT)
            dh_rest = product(rest, flat(d3), nothing, DOT)
        else:
            d0 = d * rnn_derivative(state.to(tl.float32), CELL)
            state = rows(state_ptr, first + row, state_stride, u, both(u_in, b < count))
            put(dgx_ptr, r, width, u, d0, inside)
            dh_next = product(w, flat(d0), nothing, DOT)
            dh_rest = nothing
        # Each masked by itself: Triton makes one chain of a sum of two products.
        dh = tl.where(runs[None, None, :], dh_next, dh) + tl.where(
            runs[None, None, :], dh_rest, 0.0
        )
        step += 1

    if dh0_ptr is not None:
        put(dh0_ptr, row, P, p, dh, both(p_in, b_in))
    if dc0_ptr is not None:
        put(dc0_ptr, row, H, u, dc, both(u_in, b_in))
