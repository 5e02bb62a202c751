"""The kernels of the gradients of layer and RMS normalization, and of theirs.

The gradient of the rows comes from one kernel, which for rows that fit in registers also adds up
those of the parameters, a partial sum a program. Longer rows leave that to a kernel of columns.
Partial sums are added in a fixed order (triton_reduce.py): no atomics.
"""

import triton
import triton.language as tl

from nnarch.kernels.layer_norm.triton_forward import load_columns, load_tile, row_tile


@triton.jit
def _row_scalar(ptr, r, inside):
    """One number a row, [BLOCK_R, 1]; zeros where ptr is None."""
    if ptr is None:
        value = tl.zeros(r.shape, tl.float32)
    else:
        value = tl.load(ptr + r, mask=inside, other=0.0)
    return value


@triton.jit
def _terms(grad_ptr, s_ptr, weight_ptr, r, c, columns, inside, mean, rstd, stride_gr, stride_sr):
    """grad, grad·weight and x̂ of a tile; zeros outside."""
    grad = load_tile(grad_ptr, r, c, stride_gr, inside)
    s = load_tile(s_ptr, r, c, stride_sr, inside)
    x = tl.where(inside, (s - mean) * rstd, 0.0)
    return grad, grad * load_columns(weight_ptr, c, columns, 1.0), x


@triton.jit
def _store_ds(ds_ptr, grad_sum_ptr, u, x, mean_u, mean_ux, rstd, r, c, columns, inside, stride_ar):
    ds = ((u - mean_u) - x * mean_ux) * rstd
    if grad_sum_ptr is not None:
        ds += load_tile(grad_sum_ptr, r, c, stride_ar, inside)
    tl.store(ds_ptr + r * columns + c, ds.to(ds_ptr.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm_bwd_kernel(
    grad_ptr,  # [rows, columns]
    grad_sum_ptr,  # [rows, columns] or None
    s_ptr,  # [rows, columns]
    weight_ptr,  # [columns] or None
    mean_ptr,  # [rows]; None for RMS normalization
    rstd_ptr,  # [rows]
    ds_ptr,  # [rows, columns], dense; or None
    partial_ptr,  # [programs, 2, columns] float32, of rows that are WHOLE; or None
    rows,
    columns,
    row_tiles,  # of a program
    stride_gr,
    stride_ar,
    stride_sr,
    RMS: tl.constexpr,
    WHOLE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """ds = rstd·(u - E[u] - x̂·E[u·x̂]) + grad_sum with u = grad·weight; sums of grad·x̂ and grad."""
    c = tl.arange(0, BLOCK_C)[None, :]
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for t in range(0, row_tiles):
        r = (tl.program_id(0) * row_tiles + t) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        if INT64:
            r = r.to(tl.int64)
        r_inside = r < rows
        mean, rstd = _row_scalar(mean_ptr, r, r_inside), _row_scalar(rstd_ptr, r, r_inside)
        mean_u = tl.zeros((BLOCK_R, 1), tl.float32)
        if WHOLE:
            inside = r_inside & (c < columns)
            grad, u, x = _terms(
                grad_ptr, s_ptr, weight_ptr, r, c, columns, inside, mean, rstd, stride_gr, stride_sr
            )
            if ds_ptr is not None:
                if not RMS:
                    mean_u = tl.sum(u, 1, keep_dims=True) / columns
                mean_ux = tl.sum(u * x, 1, keep_dims=True) / columns
                _store_ds(
                    ds_ptr, grad_sum_ptr, u, x, mean_u, mean_ux, rstd, r, c, columns, inside,
                    stride_ar,
                )  # fmt: skip
            if partial_ptr is not None:
                dweight += grad * x
                dbias += grad
        else:
            of_u = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
            of_ux = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
            for first in range(0, columns, BLOCK_C):
                inside = r_inside & (first + c < columns)
                grad, u, x = _terms(
                    grad_ptr, s_ptr, weight_ptr, r, first + c, columns, inside, mean, rstd,
                    stride_gr, stride_sr,
                )  # fmt: skip
                of_u += u
                of_ux += u * x
            if not RMS:
                mean_u = tl.sum(of_u, 1, keep_dims=True) / columns
            mean_ux = tl.sum(of_ux, 1, keep_dims=True) / columns
            for first in range(0, columns, BLOCK_C):
                inside = r_inside & (first + c < columns)
                grad, u, x = _terms(
                    grad_ptr, s_ptr, weight_ptr, r, first + c, columns, inside, mean, rstd,
                    stride_gr, stride_sr,
                )  # fmt: skip
                _store_ds(
                    ds_ptr, grad_sum_ptr, u, x, mean_u, mean_ux, rstd, r, first + c, columns,
                    inside, stride_ar,
                )  # fmt: skip
    if partial_ptr is not None:
        to_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * columns + c
        tl.store(to_ptr, tl.sum(dweight, 0, keep_dims=True), mask=c < columns)
        tl.store(to_ptr + columns, tl.sum(dbias, 0, keep_dims=True), mask=c < columns)


@triton.jit
def layer_norm_bwd_columns_kernel(
    grad_ptr,  # [rows, columns]
    s_ptr,  # [rows, columns]
    a_ptr,  # [rows, columns] or None
    mean_ptr,  # [rows] or None
    rstd_ptr,  # [rows]
    means_ptr,  # [2, rows]: E[a] and E[a·x̂] of each row; or None
    partial_ptr,  # [splits, 2, columns] float32
    rows,
    columns,
    row_tiles,  # of a program
    stride_gr,
    stride_sr,
    stride_ar,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over some rows of grad·x̂ (with a, of grad·rstd·(a - E[a] - x̂·E[a·x̂])), and of grad."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    dweight = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for t in range(0, row_tiles):
        r = (tl.program_id(1) * row_tiles + t) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        if INT64:
            r = r.to(tl.int64)
        r_inside = r < rows
        inside = r_inside & (c < columns)
        mean, rstd = _row_scalar(mean_ptr, r, r_inside), _row_scalar(rstd_ptr, r, r_inside)
        grad, _, x = _terms(
            grad_ptr, s_ptr, None, r, c, columns, inside, mean, rstd, stride_gr, stride_sr
        )
        if a_ptr is not None:
            a = load_tile(a_ptr, r, c, stride_ar, inside)
            of_a = _row_scalar(means_ptr, r, r_inside)
            of_ax = _row_scalar(means_ptr, rows + r, r_inside)
            x = rstd * ((a - of_a) - x * of_ax)
        dweight += grad * x
        dbias += grad
    to_ptr = partial_ptr + tl.program_id(1).to(tl.int64) * 2 * columns + c
    tl.store(to_ptr, tl.sum(dweight, 0, keep_dims=True), mask=c < columns)
    tl.store(to_ptr + columns, tl.sum(dbias, 0, keep_dims=True), mask=c < columns)


@triton.jit
def layer_norm_bwd_bwd_kernel(
    a_ptr,  # [rows, columns]: the gradient of ds
    gg_weight_ptr,  # [columns] or None: that of dweight
    gg_bias_ptr,  # [columns] or None: that of dbias
    grad_ptr,  # [rows, columns]
    s_ptr,  # [rows, columns]
    weight_ptr,  # [columns] or None
    mean_ptr,  # [rows]; None for RMS normalization
    rstd_ptr,  # [rows]
    d_grad_ptr,  # [rows, columns], dense
    d_s_ptr,  # [rows, columns], dense
    means_ptr,  # [2, rows], written: E[a] and E[a·x̂]
    rows,
    columns,
    stride_ar,
    stride_gr,
    stride_sr,
    RMS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """With u = grad·weight, q = gg_weight·grad and P(v) = v - E[v] - x̂·E[v·x̂]:

    d_grad = weight·rstd·P(a) + gg_weight·x̂ + gg_bias and
    d_s = rstd·P(q) - rstd²·(E[u·x̂]·P(a) + E[a·x̂]·P(u) + x̂·E[a·P(u)]).
    """
    r, r_inside = row_tile(rows, INT64, BLOCK_R)
    mean, rstd = _row_scalar(mean_ptr, r, r_inside), _row_scalar(rstd_ptr, r, r_inside)
    zero = tl.zeros((BLOCK_R, 1), tl.float32)
    of_a, of_u, of_q = zero, zero, zero
    of_ax, of_ux, of_qx, of_au = zero, zero, zero, zero
    for first in range(0, columns, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        inside = r_inside & (c < columns)
        a = load_tile(a_ptr, r, c, stride_ar, inside)
        grad, u, x = _terms(
            grad_ptr, s_ptr, weight_ptr, r, c, columns, inside, mean, rstd, stride_gr, stride_sr
        )
        q = grad * load_columns(gg_weight_ptr, c, columns, 0.0)
        if not RMS:
            of_a += tl.sum(a, 1, keep_dims=True)
            of_u += tl.sum(u, 1, keep_dims=True)
            of_q += tl.sum(q, 1, keep_dims=True)
        of_ax += tl.sum(a * x, 1, keep_dims=True)
        of_ux += tl.sum(u * x, 1, keep_dims=True)
        of_qx += tl.sum(q * x, 1, keep_dims=True)
        of_au += tl.sum(a * u, 1, keep_dims=True)
    of_a, of_u, of_q = of_a / columns, of_u / columns, of_q / columns
    of_ax, of_ux, of_qx = of_ax / columns, of_ux / columns, of_qx / columns
    of_apu = of_au / columns - of_a * of_u - of_ax * of_ux
    tl.store(means_ptr + r, of_a, mask=r_inside)
    tl.store(means_ptr + rows + r, of_ax, mask=r_inside)
    for first in range(0, columns, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)[None, :]
        inside = r_inside & (c < columns)
        grad, u, x = _terms(
            grad_ptr, s_ptr, weight_ptr, r, c, columns, inside, mean, rstd, stride_gr, stride_sr
        )
        gg_weight = load_columns(gg_weight_ptr, c, columns, 0.0)
        pa = (load_tile(a_ptr, r, c, stride_ar, inside) - of_a) - x * of_ax
        pu, pq = (u - of_u) - x * of_ux, (grad * gg_weight - of_q) - x * of_qx
        d_grad = load_columns(weight_ptr, c, columns, 1.0) * rstd * pa + gg_weight * x
        d_grad += load_columns(gg_bias_ptr, c, columns, 0.0)
        d_s = rstd * (pq - rstd * (of_ux * pa + of_ax * pu + of_apu * x))
        to = r * columns + c
        tl.store(d_grad_ptr + to, d_grad.to(d_grad_ptr.dtype.element_ty), mask=inside)
        tl.store(d_s_ptr + to, d_s.to(d_s_ptr.dtype.element_ty), mask=inside)
