"""One step of a scan: the state's product of all gates of some units, and their cell.

A tile is [sequences, units]; a gate is an accumulator. The sequences are padded to the 64 rows of
a matrix instruction, which costs nothing while the weights' way from L2 is what takes the time.
A launch runs the steps `step_from` to `step_to`: one, or all with a barrier of the grid between.
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
def _grid_barrier(counter_ptr, arrivals):
    """Wait until `arrivals` programs have come, counted since the counter was 0.

    Without a counter the grid is one program, whose threads wait for one another.
    """
    tl.debug_barrier()
    if counter_ptr is not None:
        seen = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1
        while seen < arrivals:
            seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()


@triton.jit
def _load(ptr, row, stride, column, inside):
    """A tile of a matrix [rows, stride] in float32."""
    return tl.load(ptr + (row * stride)[:, None] + column[None, :], mask=inside, other=0.0).to(
        tl.float32
    )


@triton.jit
def _put(ptr, row, stride, column, value, inside):
    """The reverse of :func:`_load`."""
    where = ptr + (row * stride)[:, None] + column[None, :]
    tl.store(where, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _peephole(ptr, row, u, H):
    """One row of the peephole weights [3, H]; zeros without any."""
    if ptr is None:
        weight = tl.zeros((1, u.shape[0]), tl.float32)
    else:
        weight = tl.load(ptr + row * H + u, mask=u < H, other=0.0).to(tl.float32)[None, :]
    return weight


@triton.jit
def _recurrent_step_fwd_kernel(
    gx_ptr,  # [rows, gates·H]: the input's product and the biases
    states_ptr,  # [ROWS + B, P]: y, then the initial states
    w_ptr,  # W_hh [gates·H, P], any strides
    bias_n_ptr,  # [H], the GRU's; or None
    peephole_ptr,  # [3, H] or None
    starts_ptr,  # [T + 1] int64, the first row of every step; None where all have B
    c_ptr,  # [B, H] float32, updated
    full_ptr,  # [B, H]: o·tanh(c), which a projection follows; None: it is the next state
    reserve_ptr,  # [rows, 5·H or 4·H] or None
    barrier_ptr,  # int32 zero, for more than one step of more than one program; else None
    step_from,
    step_to,
    steps,
    ROWS,
    B,
    H,
    P,
    stride_wr,
    stride_wk,
    CELL: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(H, BLOCK_N)
    pid = tl.program_id(0)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    u = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    u_in = u < H
    GATES: tl.constexpr = 4 if CELL == 2 else (3 if CELL == 3 else 1)
    width = GATES * H
    gate = tl.cast(H, tl.int64) * stride_wr
    w_row = w_ptr + u.to(tl.int64) * stride_wr
    s = m.to(tl.int64)
    if CELL == 2:
        peep_i = _peephole(peephole_ptr, 0, u, H)
        peep_f = _peephole(peephole_ptr, 1, u, H)
        peep_o = _peephole(peephole_ptr, 2, u, H)

    for step in range(step_from, step_to):
        t = steps - 1 - step if REVERSE else step
        first, count = step_rows(t, steps, B, starts_ptr)
        before, count_before = step_rows(t + 1 if REVERSE else t - 1, steps, B, starts_ptr)
        if pid // tiles_n * BLOCK_M < count:
            runs = m < count
            # Of the initial states where this is the sequence's first step.
            h_row = tl.where(m < count_before, before, ROWS) + s
            acc0 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc1 = acc0
            acc2 = acc0
            acc3 = acc0
            h_ptr = states_ptr + h_row * P
            for start in range(0, P, BLOCK_K):
                k = start + lane
                k_in = k < P
                h = tl.load(
                    h_ptr[:, None] + k[None, :], mask=runs[:, None] & k_in[None, :], other=0.0
                )
                where = w_row[None, :] + (k * stride_wk)[:, None]
                w_in = k_in[:, None] & u_in[None, :]
                w0 = tl.load(where, mask=w_in, other=0.0)
                acc0 = tl.dot(h, w0, acc0, input_precision=PRECISION)
                if CELL >= 2:
                    w1 = tl.load(where + gate, mask=w_in, other=0.0)
                    w2 = tl.load(where + 2 * gate, mask=w_in, other=0.0)
                    acc1 = tl.dot(h, w1, acc1, input_precision=PRECISION)
                    acc2 = tl.dot(h, w2, acc2, input_precision=PRECISION)
                if CELL == 2:
                    w3 = tl.load(where + 3 * gate, mask=w_in, other=0.0)
                    acc3 = tl.dot(h, w3, acc3, input_precision=PRECISION)

            r = first + s
            inside = runs[:, None] & u_in[None, :]
            x0 = _load(gx_ptr, r, width, u, inside)
            if CELL >= 2:
                x1 = _load(gx_ptr + H, r, width, u, inside)
                x2 = _load(gx_ptr + 2 * H, r, width, u, inside)
            if CELL == 2:
                x3 = _load(gx_ptr + 3 * H, r, width, u, inside)
                c = _load(c_ptr, s, H, u, inside)
                i, f, g, o, c, h_next = lstm_cell(
                    x0 + acc0, x1 + acc1, x2 + acc2, x3 + acc3, c, peep_i, peep_f, peep_o
                )
                _put(c_ptr, s, H, u, c, inside)
                if reserve_ptr is not None:
                    _put(reserve_ptr, r, 5 * H, u, i, inside)
                    _put(reserve_ptr + H, r, 5 * H, u, f, inside)
                    _put(reserve_ptr + 2 * H, r, 5 * H, u, g, inside)
                    _put(reserve_ptr + 3 * H, r, 5 * H, u, o, inside)
                    _put(reserve_ptr + 4 * H, r, 5 * H, u, c, inside)
            elif CELL == 3:
                hn = acc2
                if bias_n_ptr is not None:
                    hn += tl.load(bias_n_ptr + u, mask=u_in, other=0.0).to(tl.float32)[None, :]
                h_before = _load(states_ptr, h_row, P, u, inside)
                i, f, g, h_next = gru_cell(x0, x1, x2, acc0, acc1, hn, h_before)
                if reserve_ptr is not None:
                    _put(reserve_ptr, r, 4 * H, u, i, inside)
                    _put(reserve_ptr + H, r, 4 * H, u, f, inside)
                    _put(reserve_ptr + 2 * H, r, 4 * H, u, g, inside)
                    _put(reserve_ptr + 3 * H, r, 4 * H, u, hn, inside)
            else:
                h_next = rnn_act(x0 + acc0, CELL)
            if full_ptr is not None:
                _put(full_ptr, s, H, u, h_next, inside)
            else:
                _put(states_ptr, r, P, u, h_next, inside)
        _grid_barrier(barrier_ptr, (step - step_from + 1) * tl.num_programs(0))


@triton.jit
def _recurrent_step_bwd_kernel(
    dy_ptr,  # [rows, H], any strides; or None
    carry_ptr,  # [B, H]: of the last h (read) or, for the GRU, float32 (updated); or None
    dc_ptr,  # [B, H] float32, updated
    h0_ptr,  # [B, H] or None, for the GRU
    c0_ptr,  # [B, H] or None
    w_ptr,  # W_hh [gates·H, H], any strides; None: dy has the state's product already
    peephole_ptr,  # [3, H] or None
    starts_ptr,  # [T + 1] int64 or None
    y_ptr,  # [rows, H]
    reserve_ptr,  # [rows, 5·H or 4·H]
    dgx_ptr,  # [rows, gates·H]: of the input's product
    dgh_ptr,  # [rows, gates·H]: of the state's; the same tensor but for the GRU
    barrier_ptr,  # int32 zero, or None
    step_from,
    step_to,
    steps,
    B,
    H,
    stride_wr,
    stride_wk,
    stride_dr,
    stride_dp,
    CELL: tl.constexpr,
    REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n = tl.cdiv(H, BLOCK_N)
    pid = tl.program_id(0)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    u = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    u_in = u < H
    GATES: tl.constexpr = 4 if CELL == 2 else (3 if CELL == 3 else 1)
    width = GATES * H
    s = m.to(tl.int64)
    if CELL == 2:
        peep_i = _peephole(peephole_ptr, 0, u, H)
        peep_f = _peephole(peephole_ptr, 1, u, H)
        peep_o = _peephole(peephole_ptr, 2, u, H)

    for step in range(step_from, step_to):
        t = step if REVERSE else steps - 1 - step
        first, count = step_rows(t, steps, B, starts_ptr)
        before, count_before = step_rows(t + 1 if REVERSE else t - 1, steps, B, starts_ptr)
        after, count_after = step_rows(t - 1 if REVERSE else t + 1, steps, B, starts_ptr)
        if pid // tiles_n * BLOCK_M < count:
            runs = m < count
            r = first + s
            inside = runs[:, None] & u_in[None, :]
            known = (runs & (m < count_before))[:, None] & u_in[None, :]
            new = (runs & (m >= count_before))[:, None] & u_in[None, :]  # starts at this step
            going = runs & (m < count_after)
            dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if w_ptr is not None:
                d_ptr = dgh_ptr + (after + s) * width
                w_column = w_ptr + u.to(tl.int64) * stride_wk
                for start in range(0, width, BLOCK_K):
                    k = start + lane
                    k_in = k < width
                    d = tl.load(
                        d_ptr[:, None] + k[None, :], mask=going[:, None] & k_in[None, :], other=0.0
                    )
                    where = w_column[None, :] + (k.to(tl.int64) * stride_wr)[:, None]
                    w = tl.load(where, mask=k_in[:, None] & u_in[None, :], other=0.0)
                    dh = tl.dot(d, w, dh, input_precision=PRECISION)
            if dy_ptr is not None:
                dh += _load(dy_ptr, r, stride_dr, u * stride_dp, inside)
            if carry_ptr is not None:
                if CELL == 3:
                    dh += _load(carry_ptr, s, H, u, inside)
                else:
                    dh += _load(carry_ptr, s, H, u, inside & (m >= count_after)[:, None])

            if CELL == 2:
                c_before = _load(reserve_ptr + 4 * H, before + s, 5 * H, u, known)
                if c0_ptr is not None:
                    c_before += _load(c0_ptr, s, H, u, new)
                d0, d1, d2, d3, dc = lstm_cell_backward(
                    dh,
                    _load(dc_ptr, s, H, u, inside),
                    _load(reserve_ptr, r, 5 * H, u, inside),
                    _load(reserve_ptr + H, r, 5 * H, u, inside),
                    _load(reserve_ptr + 2 * H, r, 5 * H, u, inside),
                    _load(reserve_ptr + 3 * H, r, 5 * H, u, inside),
                    _load(reserve_ptr + 4 * H, r, 5 * H, u, inside),
                    c_before,
                    peep_i,
                    peep_f,
                    peep_o,
                )
                _put(dc_ptr, s, H, u, dc, inside)
                _put(dgx_ptr, r, width, u, d0, inside)
                _put(dgx_ptr + H, r, width, u, d1, inside)
                _put(dgx_ptr + 2 * H, r, width, u, d2, inside)
                _put(dgx_ptr + 3 * H, r, width, u, d3, inside)
            elif CELL == 3:
                h_before = _load(y_ptr, before + s, H, u, known)
                if h0_ptr is not None:
                    h_before += _load(h0_ptr, s, H, u, new)
                d0, d1, d2, d3, dh = gru_cell_backward(
                    dh,
                    _load(reserve_ptr, r, 4 * H, u, inside),
                    _load(reserve_ptr + H, r, 4 * H, u, inside),
                    _load(reserve_ptr + 2 * H, r, 4 * H, u, inside),
                    _load(reserve_ptr + 3 * H, r, 4 * H, u, inside),
                    h_before,
                )
                _put(carry_ptr, s, H, u, dh, inside)
                _put(dgx_ptr, r, width, u, d0, inside)
                _put(dgx_ptr + H, r, width, u, d1, inside)
                _put(dgx_ptr + 2 * H, r, width, u, d2, inside)
                _put(dgh_ptr, r, width, u, d0, inside)
                _put(dgh_ptr + H, r, width, u, d1, inside)
                _put(dgh_ptr + 2 * H, r, width, u, d3, inside)
            else:
                d0 = dh * rnn_derivative(_load(y_ptr, r, H, u, inside), CELL)
                _put(dgx_ptr, r, width, u, d0, inside)
        _grid_barrier(barrier_ptr, (step - step_from + 1) * tl.num_programs(0))
