"""The forward kernels of layer and RMS normalization, and dropout on its own.

A program has BLOCK_R rows. Rows of up to BLOCK_C columns (WHOLE) are in registers from their one
read to the result; longer ones are read three times, the last two from the second-level cache.
"""

import triton
import triton.language as tl

from nnarch.kernels.gpu.dropout import keep_tile


@triton.jit
def row_tile(rows, INT64: tl.constexpr, BLOCK_R: tl.constexpr):
    """This program's rows [BLOCK_R, 1], and which of them exist."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if INT64:
        r = r.to(tl.int64)
    return r[:, None], (r < rows)[:, None]


@triton.jit
def load_tile(ptr, r, c, stride, inside):
    """A tile of rows of `stride` in float32; zeros outside."""
    return tl.load(ptr + r * stride + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_columns(ptr, c, columns, ABSENT: tl.constexpr):
    """A vector [columns] in float32; where ptr is None, ABSENT everywhere."""
    if ptr is None:
        value = tl.full(c.shape, ABSENT, tl.float32)
    else:
        value = tl.load(ptr + c, mask=c < columns, other=0.0).to(tl.float32)
    return value


@triton.jit
def _dropped(x, seed_ptr, first, threshold, scale, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of this program's rows from column `first` on, times the factors of dropout."""
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    keep = keep_tile(tl.load(seed_ptr), tl.program_id(1), r, first, threshold, BLOCK_C)
    return x * tl.where(keep, scale, 0.0)


@triton.jit
def _sum_tile(
    x_ptr, residual_ptr, seed_ptr, r, c, first, inside, stride_xr, stride_rr, threshold, scale,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dropout(x) + residual, rounded to the dtype of x; zeros outside."""
    s = load_tile(x_ptr, r, c, stride_xr, inside)
    if seed_ptr is not None:
        s = _dropped(s, seed_ptr, first, threshold, scale, BLOCK_R, BLOCK_C)
    if residual_ptr is not None:
        s += load_tile(residual_ptr, r, c, stride_rr, inside)
    return s.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _store_normalized(
    y_ptr, s, mean, rstd, weight_ptr, bias_ptr, r, c, columns, inside, RMS: tl.constexpr
):
    if not RMS:
        s -= mean
    y = s * rstd * load_columns(weight_ptr, c, columns, 1.0)
    if bias_ptr is not None:
        y += load_columns(bias_ptr, c, columns, 0.0)
    tl.store(y_ptr + r * columns + c, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr,  # [rows, columns]
    residual_ptr,  # [rows, columns] or None
    weight_ptr,  # [columns] or None
    bias_ptr,  # [columns] or None
    seed_ptr,  # one int64, or None: nothing is dropped
    sum_ptr,  # [rows, columns], dense, or None: not wanted
    y_ptr,  # [rows, columns], dense
    mean_ptr,  # [rows] float32, or None
    rstd_ptr,  # [rows] float32, or None
    rows,
    columns,
    eps,
    threshold,  # of dropout
    scale,  # of what it keeps
    stride_xr,
    stride_rr,
    RMS: tl.constexpr,
    WHOLE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """s = dropout(x) + residual; y = (s - mean)·rstd·weight + bias."""
    r, r_inside = row_tile(rows, INT64, BLOCK_R)
    c = tl.arange(0, BLOCK_C)[None, :]
    mean = tl.zeros((BLOCK_R, 1), tl.float32)
    if WHOLE:
        inside = r_inside & (c < columns)
        s = _sum_tile(
            x_ptr, residual_ptr, seed_ptr, r, c, 0, inside, stride_xr, stride_rr, threshold, scale,
            BLOCK_R, BLOCK_C,
        )  # fmt: skip
        if sum_ptr is not None:
            tl.store(sum_ptr + r * columns + c, s.to(sum_ptr.dtype.element_ty), mask=inside)
        if not RMS:
            mean = tl.sum(s, 1, keep_dims=True) / columns
        deviation = tl.where(c < columns, s - mean, 0.0)
        squares = tl.sum(deviation * deviation, 1, keep_dims=True)
        rstd = tl.div_rn(1.0, tl.sqrt_rn(squares / columns + eps))
        _store_normalized(y_ptr, s, mean, rstd, weight_ptr, bias_ptr, r, c, columns, inside, RMS)
    else:
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        if not RMS:
            for first in range(0, columns, BLOCK_C):
                inside = r_inside & (first + c < columns)
                total += _sum_tile(
                    x_ptr, residual_ptr, seed_ptr, r, first + c, first, inside, stride_xr,
                    stride_rr, threshold, scale, BLOCK_R, BLOCK_C,
                )  # fmt: skip
            mean = tl.sum(total, 1, keep_dims=True) / columns
        squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for first in range(0, columns, BLOCK_C):
            inside = r_inside & (first + c < columns)
            s = _sum_tile(
                x_ptr, residual_ptr, seed_ptr, r, first + c, first, inside, stride_xr,
                stride_rr, threshold, scale, BLOCK_R, BLOCK_C,
            )  # fmt: skip
            deviation = tl.where(first + c < columns, s - mean, 0.0)
            squares += deviation * deviation
        variance = tl.sum(squares, 1, keep_dims=True) / columns
        rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        for first in range(0, columns, BLOCK_C):
            inside = r_inside & (first + c < columns)
            s = _sum_tile(
                x_ptr, residual_ptr, seed_ptr, r, first + c, first, inside, stride_xr,
                stride_rr, threshold, scale, BLOCK_R, BLOCK_C,
            )  # fmt: skip
            if sum_ptr is not None:
                s_stored = s.to(sum_ptr.dtype.element_ty)
                tl.store(sum_ptr + r * columns + first + c, s_stored, mask=inside)
            _store_normalized(
                y_ptr, s, mean, rstd, weight_ptr, bias_ptr, r, first + c, columns, inside, RMS
            )
    if mean_ptr is not None:
        tl.store(mean_ptr + r, mean, mask=r_inside)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + r, rstd, mask=r_inside)


@triton.jit
def row_dropout_kernel(
    x_ptr,  # [rows, columns]
    seed_ptr,  # one int64
    y_ptr,  # [rows, columns], dense
    rows,
    columns,
    threshold,
    scale,
    stride_xr,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = x, elements dropped or scaled."""
    r, r_inside = row_tile(rows, INT64, BLOCK_R)
    for first in range(0, columns, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        inside = r_inside & (c < columns)
        x = load_tile(x_ptr, r, c, stride_xr, inside)
        y = _dropped(x, seed_ptr, first, threshold, scale, BLOCK_R, BLOCK_C)
        tl.store(y_ptr + r * columns + c, y.to(y_ptr.dtype.element_ty), mask=inside)
