"""Small hidden sizes: a program keeps the state's weights and runs all steps of some sequences.

Tiles are [units, sequences], so that units fill the 64 rows that matrix instructions want and the
sequences of a program may be few. Exact float32 has no matrix instruction: there a program has one
sequence, and the product is a multiplication and a sum over registers.
"""

import triton
import triton.language as tl

from .triton_cell import (
    gru_cell,
    gru_cell_backward,
    lstm_cell,
    lstm_cell_backward,
    rnn_act,
    rnn_derivative,
    step_rows,
)


@triton.jit
def _product(w, h, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """w [M, K] times h [K, N]; N is 1 where it is not a dot."""
    if DOT:
        y = tl.dot(w, h.to(w.dtype), input_precision=PRECISION)
    else:
        y = tl.sum(w.to(tl.float32) * tl.trans(h), axis=1)[:, None]
    return y


@triton.jit
def _matrix(ptr, first, i, rows, j, columns, stride_i, stride_j):
    """The elements [first + i, j] of a matrix, 0 where i or j lies beyond."""
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    row = (first + i).to(tl.int64) * stride_i
    return tl.load(ptr + row[:, None] + (j * stride_j)[None, :], mask=inside, other=0.0)


@triton.jit
def _rows(ptr, first, stride, column, inside):
    """Rows of a matrix [rows, stride] as columns of a tile, in float32."""
    return tl.load(ptr + first[None, :] * stride + column[:, None], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _put(ptr, first, stride, column, value, inside):
    """The reverse of :func:`_rows`."""
    where = ptr + first[None, :] * stride + column[:, None]
    tl.store(where, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _peephole(ptr, row, u, H):
    """One row of the peephole weights [3, H] as a column; zeros without any."""
    if ptr is None:
        weight = tl.zeros((u.shape[0], 1), tl.float32)
    else:
        weight = tl.load(ptr + row * H + u, mask=u < H, other=0.0).to(tl.float32)[:, None]
    return weight


@triton.jit
def _recurrent_small_fwd_kernel(
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
    PRECISION: tl.constexpr,
    HIDDEN: tl.constexpr,  # at least H
    OUT: tl.constexpr,  # at least P; HIDDEN without a projection
    BLOCK_B: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u, p = tl.arange(0, HIDDEN), tl.arange(0, OUT)
    u_in, p_in, b_in = u < H, p < P, b < B
    GATES: tl.constexpr = 4 if CELL == 2 else (3 if CELL == 3 else 1)
    width = GATES * H

    w0 = _matrix(w_ptr, 0, u, H, p, P, stride_wr, stride_wk)
    if CELL >= 2:
        w1 = _matrix(w_ptr, H, u, H, p, P, stride_wr, stride_wk)
        w2 = _matrix(w_ptr, 2 * H, u, H, p, P, stride_wr, stride_wk)
    if CELL == 2:
        w3 = _matrix(w_ptr, 3 * H, u, H, p, P, stride_wr, stride_wk)
        peep_i = _peephole(peephole_ptr, 0, u, H)
        peep_f = _peephole(peephole_ptr, 1, u, H)
        peep_o = _peephole(peephole_ptr, 2, u, H)
        if proj_ptr is not None:
            proj = _matrix(proj_ptr, 0, p, P, u, H, stride_pr, stride_pk)
    if CELL == 3:
        bias_n = tl.zeros((HIDDEN, 1), tl.float32)
        if bias_n_ptr is not None:
            bias_n += tl.load(bias_n_ptr + u, mask=u_in, other=0.0).to(tl.float32)[:, None]

    row = b.to(tl.int64)
    h = tl.zeros((OUT, BLOCK_B), tl.float32)
    c = tl.zeros((HIDDEN, BLOCK_B), tl.float32)
    if h0_ptr is not None:
        h += _rows(h0_ptr, row, P, p, p_in[:, None] & b_in[None, :])
    if CELL == 2 and c0_ptr is not None:
        c += _rows(c0_ptr, row, H, u, u_in[:, None] & b_in[None, :])

    for step in range(steps):
        t = steps - 1 - step if REVERSE else step
        first, count = step_rows(t, steps, B, starts_ptr)
        runs = b < count
        r = first + row
        inside = u_in[:, None] & runs[None, :]
        x0 = _rows(gx_ptr, r, width, u, inside)
        if CELL >= 2:
            x1 = _rows(gx_ptr + H, r, width, u, inside)
            x2 = _rows(gx_ptr + 2 * H, r, width, u, inside)
        if CELL == 2:
            x3 = _rows(gx_ptr + 3 * H, r, width, u, inside)
            g0, g1, g2, g3, c_next, h_next = lstm_cell(
                x0 + _product(w0, h, DOT, PRECISION),
                x1 + _product(w1, h, DOT, PRECISION),
                x2 + _product(w2, h, DOT, PRECISION),
                x3 + _product(w3, h, DOT, PRECISION),
                c,
                peep_i,
                peep_f,
                peep_o,
            )
            c = tl.where(runs[None, :], c_next, c)
            if reserve_ptr is not None:
                _put(reserve_ptr, r, 5 * H, u, g0, inside)
                _put(reserve_ptr + H, r, 5 * H, u, g1, inside)
                _put(reserve_ptr + 2 * H, r, 5 * H, u, g2, inside)
                _put(reserve_ptr + 3 * H, r, 5 * H, u, g3, inside)
                _put(reserve_ptr + 4 * H, r, 5 * H, u, c_next, inside)
            if proj_ptr is not None:
                h_next = _product(proj, h_next, DOT, PRECISION)
        elif CELL == 3:
            hn = _product(w2, h, DOT, PRECISION) + bias_n
            g0, g1, g2, h_next = gru_cell(
                x0,
                x1,
                x2,
                _product(w0, h, DOT, PRECISION),
                _product(w1, h, DOT, PRECISION),
                hn,
                h,
            )
            if reserve_ptr is not None:
                _put(reserve_ptr, r, 4 * H, u, g0, inside)
                _put(reserve_ptr + H, r, 4 * H, u, g1, inside)
                _put(reserve_ptr + 2 * H, r, 4 * H, u, g2, inside)
                _put(reserve_ptr + 3 * H, r, 4 * H, u, hn, inside)
        else:
            h_next = rnn_act(x0 + _product(w0, h, DOT, PRECISION), CELL)
        h = tl.where(runs[None, :], h_next, h)
        _put(y_ptr, r, P, p, h_next, p_in[:, None] & runs[None, :])

    _put(h_ptr, row, P, p, h, p_in[:, None] & b_in[None, :])
    if CELL == 2:
        _put(c_ptr, row, H, u, c, u_in[:, None] & b_in[None, :])


@triton.jit
def _recurrent_small_bwd_kernel(
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
    PRECISION: tl.constexpr,
    HIDDEN: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    u, p = tl.arange(0, HIDDEN), tl.arange(0, OUT)
    u_in, p_in, b_in = u < H, p < P, b < B
    GATES: tl.constexpr = 4 if CELL == 2 else (3 if CELL == 3 else 1)
    width = GATES * H

    # Transposed: [P, H], so that the product is the same as in the forward.
    w0 = _matrix(w_ptr, 0, p, P, u, H, stride_wk, stride_wr)
    if CELL >= 2:
        w1 = _matrix(w_ptr + H * stride_wr, 0, p, P, u, H, stride_wk, stride_wr)
        w2 = _matrix(w_ptr + 2 * H * stride_wr, 0, p, P, u, H, stride_wk, stride_wr)
    if CELL == 2:
        w3 = _matrix(w_ptr + 3 * H * stride_wr, 0, p, P, u, H, stride_wk, stride_wr)
        peep_i = _peephole(peephole_ptr, 0, u, H)
        peep_f = _peephole(peephole_ptr, 1, u, H)
        peep_o = _peephole(peephole_ptr, 2, u, H)
        if proj_ptr is not None:
            proj = _matrix(proj_ptr, 0, u, H, p, P, stride_pk, stride_pr)

    row = b.to(tl.int64)
    dh = tl.zeros((OUT, BLOCK_B), tl.float32)
    dc = tl.zeros((HIDDEN, BLOCK_B), tl.float32)
    if dh_ptr is not None:
        dh += _rows(dh_ptr, row, P, p, p_in[:, None] & b_in[None, :])
    if CELL == 2 and dc_ptr is not None:
        dc += _rows(dc_ptr, row, H, u, u_in[:, None] & b_in[None, :])

    for step in range(steps):
        t = step if REVERSE else steps - 1 - step
        first, count = step_rows(t, steps, B, starts_ptr)
        before, count_before = step_rows(t + 1 if REVERSE else t - 1, steps, B, starts_ptr)
        runs = b < count
        r, r_before = first + row, before + row
        inside, out_inside = u_in[:, None] & runs[None, :], p_in[:, None] & runs[None, :]
        known = (b < count_before) & runs  # the others start at this step, from h0 and c0
        d = dh
        if dy_ptr is not None:
            where = dy_ptr + r[None, :] * stride_dr + (p * stride_dp)[:, None]
            d += tl.load(where, mask=out_inside, other=0.0).to(tl.float32)
        if CELL == 2:
            if proj_ptr is not None:
                _put(dy_all_ptr, r, P, p, d, out_inside)
                d_full = _product(proj, d, DOT, PRECISION)
            else:
                d_full = d
            c_before = _rows(
                reserve_ptr + 4 * H, r_before, 5 * H, u, u_in[:, None] & known[None, :]
            )
            if c0_ptr is not None:
                c_before += _rows(c0_ptr, row, H, u, u_in[:, None] & (runs & ~known)[None, :])
            d0, d1, d2, d3, dc_next = lstm_cell_backward(
                d_full,
                dc,
                _rows(reserve_ptr, r, 5 * H, u, inside),
                _rows(reserve_ptr + H, r, 5 * H, u, inside),
                _rows(reserve_ptr + 2 * H, r, 5 * H, u, inside),
                _rows(reserve_ptr + 3 * H, r, 5 * H, u, inside),
                _rows(reserve_ptr + 4 * H, r, 5 * H, u, inside),
                c_before,
                peep_i,
                peep_f,
                peep_o,
            )
            dc = tl.where(runs[None, :], dc_next, dc)
            _put(dgx_ptr, r, width, u, d0, inside)
            _put(dgx_ptr + H, r, width, u, d1, inside)
            _put(dgx_ptr + 2 * H, r, width, u, d2, inside)
            _put(dgx_ptr + 3 * H, r, width, u, d3, inside)
            dh_next = _product(w0, d0, DOT, PRECISION) + _product(w1, d1, DOT, PRECISION)
            dh_next += _product(w2, d2, DOT, PRECISION)
            dh_next += _product(w3, d3, DOT, PRECISION)
        elif CELL == 3:
            h_before = _rows(y_ptr, r_before, P, p, p_in[:, None] & known[None, :])
            if h0_ptr is not None:
                h_before += _rows(h0_ptr, row, P, p, p_in[:, None] & (runs & ~known)[None, :])
            d0, d1, d2, d3, dh_next = gru_cell_backward(
                d,
                _rows(reserve_ptr, r, 4 * H, u, inside),
                _rows(reserve_ptr + H, r, 4 * H, u, inside),
                _rows(reserve_ptr + 2 * H, r, 4 * H, u, inside),
                _rows(reserve_ptr + 3 * H, r, 4 * H, u, inside),
                h_before,
            )
            _put(dgx_ptr, r, width, u, d0, inside)
            _put(dgx_ptr + H, r, width, u, d1, inside)
            _put(dgx_ptr + 2 * H, r, width, u, d2, inside)
            _put(dgh_ptr, r, width, u, d0, inside)
            _put(dgh_ptr + H, r, width, u, d1, inside)
            _put(dgh_ptr + 2 * H, r, width, u, d3, inside)
            dh_next += _product(w0, d0, DOT, PRECISION)
            dh_next += _product(w1, d1, DOT, PRECISION)
            dh_next += _product(w2, d3, DOT, PRECISION)
        else:
            d0 = d * rnn_derivative(_rows(y_ptr, r, P, p, out_inside), CELL)
            _put(dgx_ptr, r, width, u, d0, inside)
            dh_next = _product(w0, d0, DOT, PRECISION)
        dh = tl.where(runs[None, :], dh_next, dh)

    if dh0_ptr is not None:
        _put(dh0_ptr, row, P, p, dh, p_in[:, None] & b_in[None, :])
    if dc0_ptr is not None:
        _put(dc0_ptr, row, H, u, dc, u_in[:, None] & b_in[None, :])
