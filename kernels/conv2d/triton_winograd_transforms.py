"""Winograd by way of memory: the transforms of weights, images and products, a kernel each.

A transformed tensor is [points, …]: one matrix for each of the (m + 2)² points, which
triton_winograd_products.py multiplies. Images are cut into tiles of m × m outputs, counted along
rows and images.
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


@triton.jit
def _winograd_weight_kernel(
    w_ptr,  # element (group g, reduced channel r, output channel o, taps) by strides
    u_ptr,  # [points, R_GROUP, O] float32, contiguous
    R_GROUP,
    O_GROUP,
    O,  # noqa: E741
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
    # One program: BLOCK_R by BLOCK_O filters.
    tiles_o = tl.cdiv(O, BLOCK_O)
    pid = tl.program_id(0)
    r = pid // tiles_o * BLOCK_R + tl.arange(0, BLOCK_R)
    o = pid % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    inside = (r < R_GROUP)[:, None] & (o < O)[None, :]
    if INT64:
        r, o = r.to(tl.int64), o.to(tl.int64)
    w_ptr += first_tap + (r * stride_wr)[:, None]
    w_ptr += (o // O_GROUP * stride_wg + o % O_GROUP * stride_wo)[None, :]
    taps = ()
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            tap = tl.load(w_ptr + (i * stride_wh + j * stride_ww), mask=inside, other=0.0)
            taps = taps + (tap.to(tl.float32),)
    result = transform(taps, MATRIX)
    u_ptr += r[:, None] * O + o[None, :]
    for point in tl.static_range(len(MATRIX) * len(MATRIX)):
        plane = tl.cast(R_GROUP, tl.int64) * O * point
        tl.store(u_ptr + plane, result[point], mask=inside)


def transformed_weight(weight: torch.Tensor, groups: int, rotated: bool, wino: Winograd):
    """G g Gᵀ of every filter: [points, reduced channels of a group, output channels].

    Args:
        weight: [K, C / groups, 3, 3], any strides.
        groups: of the convolution.
        rotated: for the gradient of the input, which sums over K with the filters turned around.
        wino: the matrices.
    """
    k, c_group, _, _ = weight.shape
    strides = named_strides("w", "orhw", weight) | {"first_tap": 0}
    sizes = {"R_GROUP": c_group, "O_GROUP": k // groups, "O": k}
    if rotated:  # the last tap is the first, and strides run backwards
        strides = named_strides("w", "rohw", weight)
        row, column = strides["stride_wh"], strides["stride_ww"]
        strides |= {"first_tap": 2 * (row + column), "stride_wh": -row, "stride_ww": -column}
        sizes = {"R_GROUP": k // groups, "O_GROUP": c_group, "O": c_group * groups}
    points = wino.size**2
    u = weight.new_empty((points, sizes["R_GROUP"], sizes["O"]), dtype=torch.float32)
    chosen = tile(BLOCK_R=8, BLOCK_O=32)
    arguments = {
        **{"w_ptr": weight, "u_ptr": u, "MATRIX": wino.weight},
        "INT64": needs_int64(weight, u[0]),
        **sizes,
        **strides,
        "stride_wg": weight.stride(0) * (k // groups),
    }
    programs = cdiv(sizes["R_GROUP"], 8) * cdiv(sizes["O"], 32)
    launch(_winograd_weight_kernel, flat_grid(programs), arguments, chosen)
    return u


@triton.jit
def _winograd_image_kernel(
    x_ptr,  # [N, C, H, W], any strides
    v_ptr,  # [points, TILES, C] float32, contiguous
    TILES,
    TILES_H,
    TILES_W,
    C,
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
    # One program: BLOCK_C channels of BLOCK_T tiles.
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    t = pid // tiles_c * BLOCK_T + tl.arange(0, BLOCK_T)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    n, th, tw = t // (TILES_H * TILES_W), t // TILES_W % TILES_H, t % TILES_W
    t_inside, c_inside = t < TILES, c < C
    if INT64:
        n, th, tw = n.to(tl.int64), th.to(tl.int64), tw.to(tl.int64)
        t, c = t.to(tl.int64), c.to(tl.int64)
    h, w = th * STEP - PAD_H, tw * STEP - PAD_W
    outside = tl.where(t_inside, beyond(h, w, H, W, len(MATRIX[0])), -1)
    outside = tl.where(c_inside[None, :], outside[:, None], -1)
    offset = (n * stride_xn + h * stride_xh + w * stride_xw)[:, None] + (c * stride_xc)[None, :]
    pixels = square(x_ptr, offset, outside, stride_xh, stride_xw, len(MATRIX[0]))
    result = transform(pixels, MATRIX)
    v_ptr += t[:, None] * C + c[None, :]
    mask = t_inside[:, None] & c_inside[None, :]
    for point in tl.static_range(len(MATRIX) * len(MATRIX)):
        tl.store(v_ptr + tl.cast(TILES, tl.int64) * C * point, result[point], mask=mask)


def transformed_image(x: torch.Tensor, matrix, step: int, pads: tuple[int, int], tiles_hw):
    """`matrix` · tile · `matrix`ᵀ of every tile and channel: [points, tiles, C] float32.

    Args:
        x: [N, C, H, W], any strides.
        matrix: [points on a side, pixels on a side].
        step: pixels from one tile to the next.
        pads: (top, left): where the first tile starts, before the first pixel.
        tiles_hw: tiles of an image, (vertical, horizontal).
    """
    n, c, h, w = x.shape
    tiles = n * tiles_hw[0] * tiles_hw[1]
    v = x.new_empty((len(matrix) ** 2, tiles, c), dtype=torch.float32)
    chosen = tile(BLOCK_T=4, BLOCK_C=32)
    arguments = {
        **{"x_ptr": x, "v_ptr": v, "TILES": tiles, "TILES_H": tiles_hw[0], "TILES_W": tiles_hw[1]},
        **{"C": c, "H": h, "W": w, "STEP": step, "PAD_H": pads[0], "PAD_W": pads[1]},
        **named_strides("x", "nchw", x),
        **{"INT64": needs_int64(x, v[0]), "MATRIX": matrix},
    }
    launch(_winograd_image_kernel, flat_grid(cdiv(tiles, 4) * cdiv(c, 32)), arguments, chosen)
    return v


@triton.jit
def _winograd_output_kernel(
    m_ptr,  # [points, TILES, K] float32, contiguous
    y_ptr,  # [N, K, OH, OW], any strides
    bias_ptr,  # [K] each, or None
    scale_ptr,
    shift_ptr,
    residual_ptr,  # as y, or None
    alpha,
    TILES,
    TILES_H,
    TILES_W,
    K,
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
    # One program: BLOCK_K channels of BLOCK_T tiles of outputs.
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    t = pid // tiles_k * BLOCK_T + tl.arange(0, BLOCK_T)
    k = pid % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    n, th, tw = t // (TILES_H * TILES_W), t // TILES_W % TILES_H, t % TILES_W
    t_inside = t < TILES
    mask = t_inside[:, None] & (k < K)[None, :]
    if INT64:
        n, th, t, k = n.to(tl.int64), th.to(tl.int64), t.to(tl.int64), k.to(tl.int64)
    m_ptr += t[:, None] * K + k[None, :]
    products = ()
    for point in tl.static_range(len(MATRIX[0]) * len(MATRIX[0])):
        plane = tl.cast(TILES, tl.int64) * K * point
        products = products + (tl.load(m_ptr + plane, mask=mask, other=0.0),)
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
                pid % tiles_k * BLOCK_K,
                K,
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
        products: M [points, tiles, K] float32.
        y: [N, K, OH, OW], written.
        epilogue: the arguments bias_ptr, scale_ptr, shift_ptr, residual_ptr, alpha, ACTIVATION.
        wino: the matrices.
        tiles_hw: tiles of an image, (vertical, horizontal).
    """
    _, tiles, k = products.shape
    chosen = tile(BLOCK_T=4, BLOCK_K=32)
    residual = epilogue["residual_ptr"]
    arguments = {
        **{"m_ptr": products, "y_ptr": y, "K": k, "OH": y.shape[2], "OW": y.shape[3]},
        **epilogue,
        **{"TILES": tiles, "TILES_H": tiles_hw[0], "TILES_W": tiles_hw[1]},
        **named_strides("y", "nkhw", y),
        **named_strides("r", "nkhw", residual),
        **{"INT64": needs_int64(products[0], y, residual), "MATRIX": wino.output},
    }
    launch(_winograd_output_kernel, flat_grid(cdiv(tiles, 4) * cdiv(k, 32)), arguments, chosen)


@triton.jit
def _winograd_weight_grad_kernel(
    s_ptr,  # [parts, points, K, C_GROUP] float32, contiguous
    dw_ptr,  # [K, C_GROUP, 3, 3], any strides
    parts,
    K,
    C_GROUP,
    stride_dk,
    stride_dc,
    stride_dh,
    stride_dw,
    MATRIX: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # One program: the gradients of BLOCK_K by BLOCK_C filters, parts added in their order.
    tiles_c = tl.cdiv(C_GROUP, BLOCK_C)
    pid = tl.program_id(0)
    k = pid // tiles_c * BLOCK_K + tl.arange(0, BLOCK_K)
    c = pid % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (k < K)[:, None] & (c < C_GROUP)[None, :]
    s_ptr += k[:, None] * C_GROUP + c[None, :]
    points: tl.constexpr = len(MATRIX[0]) * len(MATRIX[0])
    plane = tl.cast(K, tl.int64) * C_GROUP
    sums = ()
    for point in tl.static_range(points):
        total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
        for part in range(parts):
            total += tl.load(s_ptr + (part * points + point) * plane, mask=mask, other=0.0)
        sums = sums + (total,)
    taps = transform(sums, MATRIX)
    dw_ptr += (k * stride_dk)[:, None] + (c * stride_dc)[None, :]
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            tap = taps[i * 3 + j].to(dw_ptr.dtype.element_ty)
            tl.store(dw_ptr + i * stride_dh + j * stride_dw, tap, mask=mask)


def write_weight_grad(sums: torch.Tensor, dw: torch.Tensor, wino: Winograd) -> None:
    """dw = the inverse transform of the sum of the parts.

    Args:
        sums: [parts, points, K, C / groups] float32.
        dw: [K, C / groups, 3, 3], written.
        wino: the matrices.
    """
    parts, _, k, c_group = sums.shape
    arguments = {
        **{"s_ptr": sums, "dw_ptr": dw, "parts": parts, "K": k, "C_GROUP": c_group},
        **named_strides("d", "kchw", dw),
        "MATRIX": wino.weight_grad,
    }
    chosen = tile(BLOCK_K=4, BLOCK_C=32)
    programs = cdiv(k, 4) * cdiv(c_group, 32)
    launch(_winograd_weight_grad_kernel, flat_grid(programs), arguments, chosen)
