"""The elementwise passes of batch normalization on the GPU, and the sums of its gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from nnarch.kernels.gpu.epilogue import activation_derivative, apply_activation
from nnarch.kernels.normalization.triton_layout import (
    channel_columns,
    elementwise_tile,
    image_rows,
    load_channels,
    load_tile,
    store_tile,
)
from nnarch.kernels.normalization.triton_reduce import split_range, store_partial


@triton.jit
def affine_kernel(
    x_ptr,
    mean_ptr,  # [channels]; None with invstd: x is not normalised
    invstd_ptr,  # [channels]; the variance where eps is given
    eps,  # or None
    scale_ptr,  # [channels] or None
    shift_ptr,  # [channels] or None
    residual_ptr,  # as x, or None
    y_ptr,
    alpha,
    channels,
    length,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_rn,
    stride_rc,
    stride_rl,
    stride_yn,
    stride_yc,
    stride_yl,
    ACTIVATION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """y = act((x - mean)·invstd·scale + shift + residual)"""
    n, c, position, inside, c_inside = elementwise_tile(channels, length, INT64, BLOCK_C, BLOCK_L)
    y = load_tile(x_ptr, n, c, position, stride_xn, stride_xc, stride_xl, inside)
    if mean_ptr is not None:
        invstd = load_channels(invstd_ptr, c, c_inside)
        if eps is not None:
            invstd = 1.0 / tl.sqrt(invstd + eps)
        y = (y - load_channels(mean_ptr, c, c_inside)) * invstd
    if scale_ptr is not None:
        y *= load_channels(scale_ptr, c, c_inside)
    if shift_ptr is not None:
        y += load_channels(shift_ptr, c, c_inside)
    if residual_ptr is not None:
        y += load_tile(residual_ptr, n, c, position, stride_rn, stride_rc, stride_rl, inside)
    y = apply_activation(y, ACTIVATION, alpha)
    store_tile(y_ptr, y, n, c, position, stride_yn, stride_yc, stride_yl, inside)


@triton.jit
def batch_norm_bwd_sums_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,  # None: no activation
    mean_ptr,
    invstd_ptr,
    partial_ptr,  # [splits, 2, channels] float32: dweight, dbias
    alpha,
    channels,
    length,
    row_tiles,
    per_split,
    stride_gn,
    stride_gc,
    stride_gl,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_yn,
    stride_yc,
    stride_yl,
    ACTIVATION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One split's Σ g·x̂ and Σ g, with g = grad·act'(y)."""
    c, c_inside = channel_columns(tl.program_id(0), channels, INT64, BLOCK_C)
    mean = load_channels(mean_ptr, c, c_inside)
    first, end = split_range(row_tiles, per_split)
    dot = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    total = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for t in range(first, end):
        n, position, inside = image_rows(t, length, INT64, BLOCK_L)
        inside = c_inside & inside
        g = load_tile(grad_ptr, n, c, position, stride_gn, stride_gc, stride_gl, inside)
        x = load_tile(x_ptr, n, c, position, stride_xn, stride_xc, stride_xl, inside)
        if y_ptr is not None:
            y = load_tile(y_ptr, n, c, position, stride_yn, stride_yc, stride_yl, inside)
            g *= activation_derivative(y, ACTIVATION, alpha)
        dot += g * (x - mean)  # g is 0 outside
        total += g
    dot *= load_channels(invstd_ptr, c, c_inside)
    store_partial(partial_ptr, dot, 0, c, c_inside, channels, 2)
    store_partial(partial_ptr, total, 1, c, c_inside, channels, 2)


@triton.jit
def batch_norm_bwd_dx_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,  # None: no activation
    weight_ptr,  # None: 1
    mean_ptr,
    invstd_ptr,
    dweight_ptr,
    dbias_ptr,
    dx_ptr,
    alpha,
    inverse_count,  # 1 / (N·L)
    channels,
    length,
    stride_gn,
    stride_gc,
    stride_gl,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_yn,
    stride_yc,
    stride_yl,
    stride_dn,
    stride_dc,
    stride_dl,
    ACTIVATION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """dx = weight·invstd·(g - E[g] - x̂·E[g·x̂]), with g = grad·act'(y)"""
    n, c, position, inside, c_inside = elementwise_tile(channels, length, INT64, BLOCK_C, BLOCK_L)
    g = load_tile(grad_ptr, n, c, position, stride_gn, stride_gc, stride_gl, inside)
    x = load_tile(x_ptr, n, c, position, stride_xn, stride_xc, stride_xl, inside)
    if y_ptr is not None:
        y = load_tile(y_ptr, n, c, position, stride_yn, stride_yc, stride_yl, inside)
        g *= activation_derivative(y, ACTIVATION, alpha)
    invstd = load_channels(invstd_ptr, c, c_inside)
    slope = invstd
    if weight_ptr is not None:
        slope *= load_channels(weight_ptr, c, c_inside)
    mean_g = load_channels(dbias_ptr, c, c_inside) * inverse_count
    mean_gx = load_channels(dweight_ptr, c, c_inside) * inverse_count
    normalized = (x - load_channels(mean_ptr, c, c_inside)) * invstd
    dx = slope * (g - mean_g - normalized * mean_gx)
    store_tile(dx_ptr, dx, n, c, position, stride_dn, stride_dc, stride_dl, inside)


@triton.jit
def batch_norm_bwd_bwd_sums_kernel(
    a_ptr,  # gradient of dx
    grad_ptr,
    x_ptr,
    mean_ptr,
    invstd_ptr,
    partial_ptr,  # [splits, 5, channels] float32
    channels,
    length,
    row_tiles,
    per_split,
    stride_an,
    stride_ac,
    stride_al,
    stride_gn,
    stride_gc,
    stride_gl,
    stride_xn,
    stride_xc,
    stride_xl,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One split's Σ a, Σ g, Σ a·x̂, Σ g·x̂ and Σ a·g."""
    c, c_inside = channel_columns(tl.program_id(0), channels, INT64, BLOCK_C)
    mean = load_channels(mean_ptr, c, c_inside)
    invstd = load_channels(invstd_ptr, c, c_inside)
    first, end = split_range(row_tiles, per_split)
    sum_a = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    sum_g = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    sum_ax = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    sum_gx = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    sum_ag = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for t in range(first, end):
        n, position, inside = image_rows(t, length, INT64, BLOCK_L)
        inside = c_inside & inside
        a = load_tile(a_ptr, n, c, position, stride_an, stride_ac, stride_al, inside)
        g = load_tile(grad_ptr, n, c, position, stride_gn, stride_gc, stride_gl, inside)
        x = load_tile(x_ptr, n, c, position, stride_xn, stride_xc, stride_xl, inside)
        normalized = (x - mean) * invstd  # a and g are 0 outside
        sum_a += a
        sum_g += g
        sum_ax += a * normalized
        sum_gx += g * normalized
        sum_ag += a * g
    store_partial(partial_ptr, sum_a, 0, c, c_inside, channels, 5)
    store_partial(partial_ptr, sum_g, 1, c, c_inside, channels, 5)
    store_partial(partial_ptr, sum_ax, 2, c, c_inside, channels, 5)
    store_partial(partial_ptr, sum_gx, 3, c, c_inside, channels, 5)
    store_partial(partial_ptr, sum_ag, 4, c, c_inside, channels, 5)


@triton.jit
def batch_norm_bwd_bwd_kernel(
    a_ptr,
    grad_ptr,
    x_ptr,
    gg_weight_ptr,
    gg_bias_ptr,
    weight_ptr,  # None: 1
    mean_ptr,
    invstd_ptr,
    sums_ptr,  # [5, channels]: Σ a, Σ g, Σ a·x̂, Σ g·x̂, Σ a·g
    d_grad_ptr,
    d_x_ptr,
    d_weight_ptr,  # [channels]
    inverse_count,  # 1 / (N·L)
    channels,
    length,
    stride_an,
    stride_ac,
    stride_al,
    stride_gn,
    stride_gc,
    stride_gl,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_dn,  # of d_grad and of d_x
    stride_dc,
    stride_dl,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """The gradients of <a, dx> + <gg_weight, dweight> + <gg_bias, dbias> for grad, x and weight.

    With P v = v - E[v] - x̂·E[v·x̂], dx is slope·P g and what is differentiated is symmetric in P.
    """
    n, c, position, inside, c_inside = elementwise_tile(channels, length, INT64, BLOCK_C, BLOCK_L)
    mean_a = load_channels(sums_ptr, c, c_inside) * inverse_count
    mean_g = load_channels(sums_ptr + channels, c, c_inside) * inverse_count
    mean_ax = load_channels(sums_ptr + 2 * channels, c, c_inside) * inverse_count
    mean_gx = load_channels(sums_ptr + 3 * channels, c, c_inside) * inverse_count
    mean_ag = load_channels(sums_ptr + 4 * channels, c, c_inside) * inverse_count
    mean_apg = mean_ag - mean_a * mean_g - mean_ax * mean_gx  # E[a·P g]

    invstd = load_channels(invstd_ptr, c, c_inside)
    slope = invstd
    if weight_ptr is not None:
        slope *= load_channels(weight_ptr, c, c_inside)
    gg_weight = load_channels(gg_weight_ptr, c, c_inside)
    gg_bias = load_channels(gg_bias_ptr, c, c_inside)

    a = load_tile(a_ptr, n, c, position, stride_an, stride_ac, stride_al, inside)
    g = load_tile(grad_ptr, n, c, position, stride_gn, stride_gc, stride_gl, inside)
    x = load_tile(x_ptr, n, c, position, stride_xn, stride_xc, stride_xl, inside)
    normalized = (x - load_channels(mean_ptr, c, c_inside)) * invstd
    pa = a - mean_a - normalized * mean_ax
    pg = g - mean_g - normalized * mean_gx
    d_grad = slope * pa + gg_weight * normalized + gg_bias
    through_statistics = mean_gx * pa + mean_ax * pg + normalized * mean_apg
    d_x = invstd * (gg_weight * pg - slope * through_statistics)
    store_tile(d_grad_ptr, d_grad, n, c, position, stride_dn, stride_dc, stride_dl, inside)
    store_tile(d_x_ptr, d_x, n, c, position, stride_dn, stride_dc, stride_dl, inside)
    if tl.program_id(0) < tl.cdiv(channels, BLOCK_C):  # one program of each channel block
        tl.store(d_weight_ptr + c, invstd * mean_apg / inverse_count, mask=c_inside)
