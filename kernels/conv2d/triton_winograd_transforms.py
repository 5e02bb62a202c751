"""Winograd by way of memory: the transforms of weights, images and products, a kernel each.

A transformed tensor is [points, groups, …]: a matrix for each of the (m + 2)² points and for each
group, which triton_winograd_products.py multiplies. Its channels are rounded up to 16 with zeros
("stored"), so that 16 bytes can be loaded at a time whatever their number. Images are cut into
tiles of m × m outputs, counted along rows and images.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch.kernels.conv2d.triton_winograd_points import (
    Winograd,
    beyond,
    square,
    transform,
)
from nnarch.kernels.gpu.epilogue import write_tile
from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides, needs_int64
from nnarch.kernels.gpu.tiles import tile


def stored(channels: int) -> int:
    """How many channels a transformed tensor has for so many."""
    return cdiv(channels, 16) * 16


@triton.jit
def _winograd_weight_kernel(
    w_ptr,  # element (group g, reduced channel r, output channel o, taps) by strides
    u_ptr,  # [points, groups, R_STORED, O_STORED] float32, contiguous
    groups,
    R_GROUP,
    O_GROUP,
    R_STORED,
    O_STORED,
    first_tap,
    stride_wg,
    stride_wr,
    stride_wo,
    stride_wh,
    stride_ww,
    INT64: tl.constexpr,
    MATRIX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    # One program: BLOCK_R by BLOCK_O filters of one group.
    tiles_r, tiles_o = tl.cdiv(R_STORED, BLOCK_R), tl.cdiv(O_STORED, BLOCK_O)
    pid = tl.program_id(0)
    r = pid // tiles_o % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    o = pid % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    group = (pid // tiles_o // tiles_r).to(tl.int64)
    inside = (r < R_GROUP)[:, None] & (o < O_GROUP)[None, :]
    is_stored = (r < R_STORED)[:, None] & (o < O_STORED)[None, :]
    if INT64:
        r, o = r.to(tl.int64), o.to(tl.int64)
    w_ptr += group * stride_wg + first_tap
    w_ptr += (r * stride_wr)[:, None] + (o * stride_wo)[None, :]
    taps = ()
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            tap = tl.load(w_ptr + (i * stride_wh + j * stride_ww), mask=inside, other=0.0)
            taps = taps + (tap.to(tl.float32),)
    result = transform(taps, MATRIX)
    plane = tl.cast(R_STORED, tl.int64) * O_STORED
    u_ptr += group * plane + r[:, None] * O_STORED + o[None, :]
    for point in tl.static_range(len(MATRIX) * len(MATRIX)):
        tl.store(u_ptr + plane * groups * point, result[point], mask=is_stored)


def transformed_weight(weight: torch.Tensor, groups: int, rotated: bool, wino: Winograd):
    """G g Gᵀ of every filter: [points, groups, reduced channels, output channels], stored.

    Args:
        weight: [K, C / groups, 3, 3], any strides.
        groups: of the convolution.
        rotated: for the gradient of the input, which sums over K with the filters turned around.
        wino: the matrices.
    """
    k, c_group, _, _ = weight.shape
    reduced, columns = c_group, k // groups
    strides = named_strides("w", "orhw", weight) | {"first_tap": 0}
    if rotated:  # the last tap is the first, and strides run backwards
        reduced, columns = columns, reduced
        strides = named_strides("w", "rohw", weight)
        down, right = strides["stride_wh"], strides["stride_ww"]
        strides |= {"first_tap": 2 * (down + right), "stride_wh": -down, "stride_ww": -right}
    size = (wino.size**2, groups, stored(reduced), stored(columns))
    u = weight.new_empty(size, dtype=torch.float32)
    chosen = tile(BLOCK_R=8, BLOCK_O=32)
    arguments = {
        **{"w_ptr": weight, "u_ptr": u, "groups": groups, "MATRIX": wino.weight},
        **{"R_GROUP": reduced, "O_GROUP": columns, "R_STORED": size[2], "O_STORED": size[3]},
        **strides,
        **{"stride_wg": weight.stride(0) * (k // groups), "INT64": needs_int64(weight, u[0, 0])},
    }
    programs = groups * cdiv(size[2], 8) * cdiv(size[3], 32)
    launch(_winograd_weight_kernel, flat_grid(programs), arguments, chosen)
    return u


@triton.jit
def _winograd_image_kernel(
    x_ptr,  # [N, C, H, W], any strides
    v_ptr,  # [points, groups, TILES, C_STORED] float32, contiguous
    TILES,
    TILES_H,
    TILES_W,
    groups,
    C_GROUP,
    C_STORED,
    H,
    W,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    STEP: tl.constexpr,  # pixels from one tile to the next
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    INT64: tl.constexpr,
    MATRIX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: BLOCK_C channels of one group of BLOCK_T tiles.
    tiles_c = tl.cdiv(C_STORED, BLOCK_C)
    pid = tl.program_id(0)
    t = pid // tiles_c // groups * BLOCK_T + tl.arange(0, BLOCK_T)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    group = (pid // tiles_c % groups).to(tl.int64)
    n, th, tw = t // (TILES_H * TILES_W), t // TILES_W % TILES_H, t % TILES_W
    t_inside = t < TILES
    outside = tl.where((c < C_GROUP)[None, :], tl.where(t_inside, 0, -1)[:, None], -1)
    is_stored = t_inside[:, None] & (c < C_STORED)[None, :]
    if INT64:
        n, th, tw = n.to(tl.int64), th.to(tl.int64), tw.to(tl.int64)
        t, c = t.to(tl.int64), c.to(tl.int64)
    h, w = th * STEP - PAD_H, tw * STEP - PAD_W
    outside |= beyond(h, w, H, W, len(MATRIX[0]))[:, None]
    offset = (n * stride_xn + h * stride_xh + w * stride_xw)[:, None] + (c * stride_xc)[None, :]
    x_ptr += group * C_GROUP * stride_xc
    pixels = square(x_ptr, offset, outside, stride_xh, stride_xw, len(MATRIX[0]))
    result = transform(pixels, MATRIX)
    plane = tl.cast(TILES, tl.int64) * C_STORED
    v_ptr += group * plane + t[:, None] * C_STORED + c[None, :]
    for point in tl.static_range(len(MATRIX) * len(MATRIX)):
        tl.store(v_ptr + plane * groups * point, result[point], mask=is_stored)


def transformed_image(x: torch.Tensor, groups: int, matrix, step: int, pads, tiles_hw):
    """`matrix` · tile · `matrix`ᵀ of every tile: [points, groups, tiles, stored channels].

    Args:
        x: [N, C, H, W], any strides.
        groups: of the channels.
        matrix: [points on a side, pixels on a side].
        step: pixels from one tile to the next.
        pads: (top, left): where the first tile starts, before the first pixel.
        tiles_hw: tiles of an image, (vertical, horizontal).
    """
    n, c, h, w = x.shape
    tiles = n * tiles_hw[0] * tiles_hw[1]
    size = (len(matrix) ** 2, groups, tiles, stored(c // groups))
    v = x.new_empty(size, dtype=torch.float32)
    chosen = tile(BLOCK_T=4, BLOCK_C=32)
    arguments = {
        **{"x_ptr": x, "v_ptr": v, "groups": groups, "C_GROUP": c // groups, "C_STORED": size[3]},
        **{"TILES": tiles, "TILES_H": tiles_hw[0], "TILES_W": tiles_hw[1]},
        **{"H": h, "W": w, "STEP": step, "PAD_H": pads[0], "PAD_W": pads[1]},
        **named_strides("x", "nchw", x),
        **{"INT64": needs_int64(x, v[0, 0]), "MATRIX": matrix},
    }
    programs = groups * cdiv(tiles, 4) * cdiv(size[3], 32)
    launch(_winograd_image_kernel, flat_grid(programs), arguments, chosen)
    return v


@triton.jit
def _winograd_output_kernel(
    m_ptr,  # [points, groups, TILES, K_STORED] float32, contiguous
    y_ptr,  # [N, K, OH, OW], any strides
    bias_ptr,  # [K] each, or None
    scale_ptr,
    shift_ptr,
    residual_ptr,  # as y, or None
    alpha,
    TILES,
    TILES_H,
    TILES_W,
    groups,
    K_GROUP,
    K_STORED,
    OH,
    OW,
    stride_yn,
    stride_yk,
    stride_yh,
    stride_yw,
    stride_rn,
    stride_rk,
    stride_rh,
    stride_rw,
    ACTIVATION: tl.constexpr,
    INT64: tl.constexpr,
    MATRIX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # One program: BLOCK_K channels of one group of BLOCK_T tiles of outputs.
    tiles_k = tl.cdiv(K_GROUP, BLOCK_K)
    pid = tl.program_id(0)
    group = pid // tiles_k % groups
    t = pid // tiles_k // groups * BLOCK_T + tl.arange(0, BLOCK_T)
    k = pid % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    n, th, tw = t // (TILES_H * TILES_W), t // TILES_W % TILES_H, t % TILES_W
    t_inside = t < TILES
    mask = t_inside[:, None] & (k < K_STORED)[None, :]
    if INT64:
        n, th, t, k = n.to(tl.int64), th.to(tl.int64), t.to(tl.int64), k.to(tl.int64)
    plane = tl.cast(TILES, tl.int64) * K_STORED
    m_ptr += group * plane + t[:, None] * K_STORED + k[None, :]
    products = ()
    for point in tl.static_range(len(MATRIX[0]) * len(MATRIX[0])):
        product = tl.load(m_ptr + plane * groups * point, mask=mask, other=0.0)
        products = products + (product,)
    outputs = transform(products, MATRIX)
    m: tl.constexpr = len(MATRIX)
    for i in tl.static_range(m):
        for j in tl.static_range(m):
            h, w = th * m + i, tw * m + j
            write_tile(
                outputs[i * m + j],
                y_ptr,
                n * stride_yn + h * stride_yh + w * stride_yw,
                stride_yk,
                residual_ptr,
                n * stride_rn + h * stride_rh + w * stride_rw,
                stride_rk,
                t_inside & (h < OH) & (w < OW),
                group * K_GROUP + pid % tiles_k * BLOCK_K,
                (group + 1) * K_GROUP,
                bias_ptr,
                scale_ptr,
                shift_ptr,
                alpha,
                ACTIVATION,
                BLOCK_K,
                INT64,
            )


def write_outputs(products: torch.Tensor, y: torch.Tensor, epilogue, wino: Winograd, tiles_hw):
    """y = epilogue(Aᵀ M A) of every tile.

    Args:
        products: M [points, groups, tiles, stored K] float32.
        y: [N, K, OH, OW], written.
        epilogue: the arguments bias_ptr, scale_ptr, shift_ptr, residual_ptr, alpha, ACTIVATION.
        wino: the matrices.
        tiles_hw: tiles of an image, (vertical, horizontal).
    """
    _, groups, tiles, k_stored = products.shape
    k_group = y.shape[1] // groups
    chosen = tile(BLOCK_T=4, BLOCK_K=32)
    residual = epilogue["residual_ptr"]
    arguments = {
        **{"m_ptr": products, "y_ptr": y, "OH": y.shape[2], "OW": y.shape[3]},
        **{"groups": groups, "K_GROUP": k_group, "K_STORED": k_stored},
        **epilogue,
        **{"TILES": tiles, "TILES_H": tiles_hw[0], "TILES_W": tiles_hw[1]},
        **named_strides("y", "nkhw", y),
        **named_strides("r", "nkhw", residual),
        **{"INT64": needs_int64(products[0, 0], y, residual), "MATRIX": wino.output},
    }
    programs = groups * cdiv(tiles, 4) * cdiv(k_group, 32)
    launch(_winograd_output_kernel, flat_grid(programs), arguments, chosen)


@triton.jit
def _winograd_weight_grad_kernel(
    s_ptr,  # [parts, points, groups, K_STORED, C_STORED] float32, contiguous
    dw_ptr,  # [groups·K_GROUP, C_GROUP, 3, 3], any strides
    parts,
    groups,
    K_GROUP,
    C_GROUP,
    K_STORED,
    C_STORED,
    stride_dk,
    stride_dc,
    stride_dh,
    stride_dw,
    MATRIX: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: gradients of BLOCK_K by BLOCK_C filters of one group, parts added in their order.
    tiles_k, tiles_c = tl.cdiv(K_GROUP, BLOCK_K), tl.cdiv(C_GROUP, BLOCK_C)
    pid = tl.program_id(0)
    k = pid // tiles_c % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    group = pid // tiles_c // tiles_k
    mask = (k < K_GROUP)[:, None] & (c < C_GROUP)[None, :]
    plane = tl.cast(K_STORED, tl.int64) * C_STORED
    s_ptr += group * plane + k[:, None] * C_STORED + c[None, :]
    points: tl.constexpr = len(MATRIX[0]) * len(MATRIX[0])
    sums = ()
    for point in tl.static_range(points):
        total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        for part in range(parts):
            part_ptr = s_ptr + (part * points + point) * groups * plane
            total += tl.load(part_ptr, mask=mask, other=0.0)
        sums = sums + (total,)
    taps = transform(sums, MATRIX)
    dw_ptr += ((group * K_GROUP + k) * stride_dk)[:, None] + (c * stride_dc)[None, :]
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            tap = taps[i * 3 + j].to(dw_ptr.dtype.element_ty)
            tl.store(dw_ptr + i * stride_dh + j * stride_dw, tap, mask=mask)


def write_weight_grad(sums: torch.Tensor, dw: torch.Tensor, wino: Winograd) -> None:
    """dw = the inverse transform of the sum of the parts.

    Args:
        sums: [parts, points, groups, stored K, stored C] float32.
        dw: [K, C / groups, 3, 3], written; fewer than 2³¹ elements (the choice of algorithm sees
            to it).
        wino: the matrices.
    """
    parts, _, groups, k_stored, c_stored = sums.shape
    k_group, c_group = dw.shape[0] // groups, dw.shape[1]
    arguments = {
        **{"s_ptr": sums, "dw_ptr": dw, "parts": parts, "groups": groups},
        **{"K_GROUP": k_group, "C_GROUP": c_group, "K_STORED": k_stored, "C_STORED": c_stored},
        **named_strides("d", "kchw", dw),
        "MATRIX": wino.weight_grad,
    }
    chosen = tile(BLOCK_K=4, BLOCK_C=32)
    programs = groups * cdiv(k_group, 4) * cdiv(c_group, 32)
    launch(_winograd_weight_grad_kernel, flat_grid(programs), arguments, chosen)
