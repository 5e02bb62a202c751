"""The cell of a normalized LSTM, both ways: a program has one sequence and all of its units.

The products come from outside, because a normalization needs the sums of all units of all gates
before the first cell can be computed. Rows are short (4·H), so a program holds one in registers.
"""

import triton
import triton.language as tl

from nnarch.kernels.gpu.epilogue import sigmoid, tanh

from .triton_cell import lstm_cell_backward


@triton.jit
def _row(ptr, u, u_in):
    """One row of H values in float32; ptr is None for zeros."""
    if ptr is None:
        value = tl.zeros(u.shape, tl.float32)
    else:
        value = tl.load(ptr + u, mask=u_in, other=0.0).to(tl.float32)
    return value


@triton.jit
def _put(ptr, u, value, u_in):
    tl.store(ptr + u, value.to(ptr.dtype.element_ty), mask=u_in)


@triton.jit
def _statistics(a, b, c, d, u_in, H, eps):
    """Mean and 1 / standard deviation of four rows of H values together."""
    mean = tl.sum(a + b + c + d, axis=0) / (4 * H)
    a = tl.where(u_in, a - mean, 0.0)
    b = tl.where(u_in, b - mean, 0.0)
    c = tl.where(u_in, c - mean, 0.0)
    d = tl.where(u_in, d - mean, 0.0)
    variance = tl.sum(a * a + b * b + c * c + d * d, axis=0) / (4 * H)
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def _affine(x, mean, scale, norm_ptr, gain, bias, u, u_in, H):
    """x, normalized, times one row of `norm` plus another."""
    y = (x - mean) * scale * _row(norm_ptr + gain * H, u, u_in)
    return y + _row(norm_ptr + bias * H, u, u_in)


@triton.jit
def _normalized_cell(c, norm_ptr, u, u_in, H, eps):
    """What tanh sees of c, c normalized before gain and bias, and 1 / standard deviation."""
    mean = tl.sum(c, axis=0) / H
    centred = tl.where(u_in, c - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / H + eps)
    unit = centred * scale
    gained = unit * _row(norm_ptr + 16 * H, u, u_in)
    return gained + _row(norm_ptr + 17 * H, u, u_in), unit, scale


@triton.jit
def _recurrent_norm_fwd_kernel(
    gx_ptr,  # [n, 4·H]: x·W_ihᵀ of this step's rows
    gh_ptr,  # [n, 4·H]: h·W_hhᵀ
    bias_ptr,  # [4·H] float32, both biases; or None
    peephole_ptr,  # [3, H] or None
    norm_ptr,  # [18, H]
    c_ptr,  # [B, H] float32, updated
    h_ptr,  # [n, H], written: o·tanh(…)
    reserve_ptr,  # [n, 13·H] or None
    H,
    eps,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    u = tl.arange(0, BLOCK)
    u_in = u < H
    gx_ptr += b * 4 * H
    gh_ptr += b * 4 * H
    x0, x1 = _row(gx_ptr, u, u_in), _row(gx_ptr + H, u, u_in)
    x2, x3 = _row(gx_ptr + 2 * H, u, u_in), _row(gx_ptr + 3 * H, u, u_in)
    h0, h1 = _row(gh_ptr, u, u_in), _row(gh_ptr + H, u, u_in)
    h2, h3 = _row(gh_ptr + 2 * H, u, u_in), _row(gh_ptr + 3 * H, u, u_in)
    if reserve_ptr is not None:
        reserve_ptr += b * 13 * H
        _put(reserve_ptr + 5 * H, u, x0, u_in)
        _put(reserve_ptr + 6 * H, u, x1, u_in)
        _put(reserve_ptr + 7 * H, u, x2, u_in)
        _put(reserve_ptr + 8 * H, u, x3, u_in)
        _put(reserve_ptr + 9 * H, u, h0, u_in)
        _put(reserve_ptr + 10 * H, u, h1, u_in)
        _put(reserve_ptr + 11 * H, u, h2, u_in)
        _put(reserve_ptr + 12 * H, u, h3, u_in)
    x_mean, x_scale = _statistics(x0, x1, x2, x3, u_in, H, eps)
    h_mean, h_scale = _statistics(h0, h1, h2, h3, u_in, H, eps)
    i = _affine(x0, x_mean, x_scale, norm_ptr, 0, 4, u, u_in, H)
    f = _affine(x1, x_mean, x_scale, norm_ptr, 1, 5, u, u_in, H)
    g = _affine(x2, x_mean, x_scale, norm_ptr, 2, 6, u, u_in, H)
    o = _affine(x3, x_mean, x_scale, norm_ptr, 3, 7, u, u_in, H)
    i += _affine(h0, h_mean, h_scale, norm_ptr, 8, 12, u, u_in, H)
    f += _affine(h1, h_mean, h_scale, norm_ptr, 9, 13, u, u_in, H)
    g += _affine(h2, h_mean, h_scale, norm_ptr, 10, 14, u, u_in, H)
    o += _affine(h3, h_mean, h_scale, norm_ptr, 11, 15, u, u_in, H)
    if bias_ptr is not None:
        i += _row(bias_ptr, u, u_in)
        f += _row(bias_ptr + H, u, u_in)
        g += _row(bias_ptr + 2 * H, u, u_in)
        o += _row(bias_ptr + 3 * H, u, u_in)
    c_ptr += b * H
    c = _row(c_ptr, u, u_in)
    if peephole_ptr is not None:
        i += c * _row(peephole_ptr, u, u_in)
        f += c * _row(peephole_ptr + H, u, u_in)
    i, f, g = sigmoid(i), sigmoid(f), tanh(g)
    c = tl.where(u_in, f * c + i * g, 0.0)
    if peephole_ptr is not None:
        o += c * _row(peephole_ptr + 2 * H, u, u_in)
    o = sigmoid(o)
    seen, _, _ = _normalized_cell(c, norm_ptr, u, u_in, H, eps)
    _put(c_ptr, u, c, u_in)
    _put(h_ptr + b * H, u, o * tanh(seen), u_in)
    if reserve_ptr is not None:
        _put(reserve_ptr, u, i, u_in)
        _put(reserve_ptr + H, u, f, u_in)
        _put(reserve_ptr + 2 * H, u, g, u_in)
        _put(reserve_ptr + 3 * H, u, o, u_in)
        _put(reserve_ptr + 4 * H, u, c, u_in)


@triton.jit
def _norm_backward(ptr, out_ptr, norm_ptr, first, d0, d1, d2, d3, u, u_in, H, eps):
    """The gradient of four rows before normalization, from that behind gain and bias."""
    x0, x1 = _row(ptr, u, u_in), _row(ptr + H, u, u_in)
    x2, x3 = _row(ptr + 2 * H, u, u_in), _row(ptr + 3 * H, u, u_in)
    mean, scale = _statistics(x0, x1, x2, x3, u_in, H, eps)
    x0, x1, x2, x3 = (
        (x0 - mean) * scale,
        (x1 - mean) * scale,
        (x2 - mean) * scale,
        (x3 - mean) * scale,
    )
    d0 *= _row(norm_ptr + first * H, u, u_in)
    d1 *= _row(norm_ptr + (first + 1) * H, u, u_in)
    d2 *= _row(norm_ptr + (first + 2) * H, u, u_in)
    d3 *= _row(norm_ptr + (first + 3) * H, u, u_in)
    of_mean = tl.sum(d0 + d1 + d2 + d3, axis=0) / (4 * H)
    of_scale = tl.sum(d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3, axis=0) / (4 * H)
    _put(out_ptr, u, (d0 - of_mean - x0 * of_scale) * scale, u_in)
    _put(out_ptr + H, u, (d1 - of_mean - x1 * of_scale) * scale, u_in)
    _put(out_ptr + 2 * H, u, (d2 - of_mean - x2 * of_scale) * scale, u_in)
    _put(out_ptr + 3 * H, u, (d3 - of_mean - x3 * of_scale) * scale, u_in)


@triton.jit
def _recurrent_norm_bwd_kernel(
    dh_ptr,  # [n, H]: of o·tanh(…), complete
    dc_ptr,  # [B, H] float32, updated
    before_ptr,  # [known, 13·H]: the rows of the step before, of which c is read; or None
    c0_ptr,  # [B, H] or None
    peephole_ptr,  # [3, H] or None
    norm_ptr,  # [18, H]
    reserve_ptr,  # [n, 13·H]
    dgx_ptr,  # [n, 4·H], written: of x·W_ihᵀ
    dgh_ptr,  # [n, 4·H], written: of h·W_hhᵀ
    dgates_ptr,  # [n, 4·H], written: of the sum of both, normalized
    dseen_ptr,  # [n, H], written: of what tanh sees of c
    known,
    H,
    eps,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    u = tl.arange(0, BLOCK)
    u_in = u < H
    reserve_ptr += b * 13 * H
    o, c = _row(reserve_ptr + 3 * H, u, u_in), _row(reserve_ptr + 4 * H, u, u_in)
    seen, unit, scale = _normalized_cell(c, norm_ptr, u, u_in, H, eps)
    seen = tanh(seen)
    dh = _row(dh_ptr + b * H, u, u_in)
    d_seen = dh * o * (1.0 - seen * seen)
    _put(dseen_ptr + b * H, u, d_seen, u_in)
    d_unit = d_seen * _row(norm_ptr + 16 * H, u, u_in)
    d_c = d_unit - tl.sum(d_unit, axis=0) / H - unit * (tl.sum(d_unit * unit, axis=0) / H)
    d3 = dh * seen * o * (1.0 - o)

    sequence = b + tl.zeros((BLOCK,), tl.int64)
    c_before = tl.zeros((BLOCK,), tl.float32)
    if before_ptr is not None:
        c_before += _row(before_ptr + b * 13 * H + 4 * H, u, u_in & (sequence < known))
    if c0_ptr is not None:
        c_before += _row(c0_ptr + b * H, u, u_in & (sequence >= known))
    dc_ptr += b * H
    d_c = _row(dc_ptr, u, u_in) + d_c * scale
    peep_i = tl.zeros((BLOCK,), tl.float32)
    peep_f = peep_i
    if peephole_ptr is not None:
        peep_i += _row(peephole_ptr, u, u_in)
        peep_f += _row(peephole_ptr + H, u, u_in)
        d_c += d3 * _row(peephole_ptr + 2 * H, u, u_in)
    # Nothing comes through h: that part of the cell is above, normalized.
    d0, d1, d2, _, d_c = lstm_cell_backward(
        0.0,
        d_c,
        _row(reserve_ptr, u, u_in),
        _row(reserve_ptr + H, u, u_in),
        _row(reserve_ptr + 2 * H, u, u_in),
        o,
        c,
        c_before,
        peep_i,
        peep_f,
        0.0,
    )
    _put(dc_ptr, u, d_c, u_in)
    row = b * 4 * H
    dgates_ptr += row
    _put(dgates_ptr, u, d0, u_in)
    _put(dgates_ptr + H, u, d1, u_in)
    _put(dgates_ptr + 2 * H, u, d2, u_in)
    _put(dgates_ptr + 3 * H, u, d3, u_in)
    _norm_backward(reserve_ptr + 5 * H, dgx_ptr + row, norm_ptr, 0, d0, d1, d2, d3, u, u_in, H, eps)
    _norm_backward(reserve_ptr + 9 * H, dgh_ptr + row, norm_ptr, 8, d0, d1, d2, d3, u, u_in, H, eps)
