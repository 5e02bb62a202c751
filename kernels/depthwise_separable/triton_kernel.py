"""The depthwise-separable convolution on the GPU: the depthwise tile stays on the chip.

A program owns BLOCK_M output pixels by BLOCK_N output channels. For a block of BLOCK_K channels it
computes the depthwise values of its pixels in registers, applies their epilogue, and multiplies
them with the 1×1 weights: what lies between the two convolutions never reaches memory. Programs of
the same pixels and other output channels compute the depthwise values again, R·S multiply-adds
beside BLOCK_N of the product.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.conv2d.geometry import output_size
from nnarch.kernels.conv2d.triton_kernel import conv2d
from nnarch.kernels.depthwise.triton_forward import depthwise_conv2d, geometry
from nnarch.kernels.gpu.epilogue import apply_activation, write_tile
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    dot_precision,
    flat_grid,
    launch,
    named_strides,
    needs_int64,
    vector,
)
from nnarch.kernels.gpu.matmul import (
    grouped_order,
    loads_channel_vectors,
    matmul_cost,
    matmul_fits,
    matmul_tiles,
    precision_of,
)
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.gpu.tiles import Problem, Tile, TileTable, pick

__all__ = ["STATIC_CASES", "depthwise_separable_conv2d", "inverted_residual"]

# The depthwise tile is made in registers: BLOCK_M·BLOCK_K float32 beside the accumulators.
SEPARABLE = TileTable(
    "depthwise_separable",
    {
        "half": matmul_tiles(
            (64, 128, 32, 8, 2), (64, 64, 32, 4, 2), (128, 64, 32, 8, 2), (64, 32, 32, 4, 2)
        ),
        "tf32": matmul_tiles((64, 64, 32, 8, 2), (64, 64, 16, 4, 2), (64, 32, 16, 4, 2)),
        "tf32x3": matmul_tiles((64, 64, 32, 8, 2), (64, 32, 32, 8, 2), (64, 32, 16, 8, 2)),
        "ieee": matmul_tiles((64, 32, 16, 8, 2), (32, 32, 16, 4, 2)),
    },
    matmul_cost,
    matmul_fits,
)

# Kernels of more taps are unrolled too far, and so is the work that programs repeat.
_MOST_TAPS = 25


@triton.jit
def _depthwise_separable_fwd_kernel(
    x_ptr,  # [N, C, H, W], any strides
    dw_ptr,  # [C·MULTIPLIER, 1, R, S], any strides
    pw_ptr,  # [K, C·MULTIPLIER], any strides
    y_ptr,  # [N, K, OH, OW], any strides
    depthwise_scale_ptr,  # [C·MULTIPLIER] each, or None
    depthwise_shift_ptr,
    scale_ptr,  # [K] each, or None
    shift_ptr,
    residual_ptr,  # as y, or None
    depthwise_alpha,
    alpha,
    M,  # N·OH·OW
    K,
    C,  # C·MULTIPLIER
    H,
    W,
    OH,
    OW,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_dc,
    stride_dr,
    stride_ds,
    stride_pk,
    stride_pc,
    stride_yn,
    stride_yk,
    stride_yh,
    stride_yw,
    stride_rn,
    stride_rk,
    stride_rh,
    stride_rw,
    MULTIPLIER: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    DEPTHWISE_ACTIVATION: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_n = grouped_order(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), 8)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    m_inside, k_inside = m < M, k < K
    n, oh, ow = m // (OH * OW), m // OW % OH, m % OW
    if INT64:
        n, oh, ow, k = n.to(tl.int64), oh.to(tl.int64), ow.to(tl.int64), k.to(tl.int64)
        lane = lane.to(tl.int64)
    top, left = oh * STRIDE_H - PAD_H, ow * STRIDE_W - PAD_W
    image = n * stride_xn

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, C, BLOCK_K):
        c = first + lane
        c_inside = c < C
        channel = (c // MULTIPLIER * stride_xc)[None, :]
        z = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for r in range(R):
            h = top + r * DILATION_H
            h_inside = m_inside & (h >= 0) & (h < H)
            for s in range(S):
                w = left + s * DILATION_W
                inside = (h_inside & (w >= 0) & (w < W))[:, None] & c_inside[None, :]
                x_offset = (image + h * stride_xh + w * stride_xw)[:, None] + channel
                x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
                tap_offset = c * stride_dc + r * stride_dr + s * stride_ds
                tap = tl.load(dw_ptr + tap_offset, mask=c_inside, other=0.0).to(tl.float32)
                z += x * tap[None, :]
        if depthwise_scale_ptr is not None:
            z *= tl.load(depthwise_scale_ptr + c, mask=c_inside, other=0.0).to(tl.float32)[None, :]
        if depthwise_shift_ptr is not None:
            z += tl.load(depthwise_shift_ptr + c, mask=c_inside, other=0.0).to(tl.float32)[None, :]
        z = apply_activation(z, DEPTHWISE_ACTIVATION, depthwise_alpha)
        pw_offset = (c * stride_pc)[:, None] + (k * stride_pk)[None, :]
        pw = tl.load(pw_ptr + pw_offset, mask=c_inside[:, None] & k_inside[None, :], other=0.0)
        # Beyond the last channel an activation may have made something of zero.
        z = tl.where(c_inside[None, :], z, 0.0).to(pw.dtype)
        acc = tl.dot(z, pw, acc, input_precision=PRECISION)

    write_tile(
        acc,
        y_ptr,
        n * stride_yn + oh * stride_yh + ow * stride_yw,
        stride_yk,
        residual_ptr,
        n * stride_rn + oh * stride_rh + ow * stride_rw,
        stride_rk,
        m_inside,
        tile_n * BLOCK_N,
        K,
        None,
        scale_ptr,
        shift_ptr,
        alpha,
        ACTIVATION,
        BLOCK_N,
        INT64,
    )


def depthwise_separable_conv2d(
    x: torch.Tensor,
    depthwise_weight: torch.Tensor,
    pointwise_weight: torch.Tensor,
    depthwise_scale: torch.Tensor | None,
    depthwise_shift: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    depthwise_packed: torch.Tensor | None,
    pointwise_packed: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    depthwise_activation: int,
    depthwise_alpha: float,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """nnarch::depthwise_separable_conv2d on a GPU; packed weights are a CPU matter."""
    check_dtype("depthwise_separable_conv2d", x, depthwise_weight, pointwise_weight, residual)
    if depthwise_weight.shape[2] * depthwise_weight.shape[3] > _MOST_TAPS:
        z = depthwise_conv2d(
            x, depthwise_weight, None, depthwise_scale, depthwise_shift, None, None,
            stride, padding, dilation, depthwise_activation, depthwise_alpha,
        )  # fmt: skip
        return _pointwise(z, pointwise_weight, scale, shift, residual, activation, alpha)
    n, c, oh, ow = output_size(x.shape, depthwise_weight.shape, stride, padding, dilation)
    k = pointwise_weight.shape[0]
    y = library.new_output(x, (n, k, oh, ow))
    if y.numel() == 0:
        return y
    precision = dot_precision("conv")
    pixels = n * oh * ow
    matrix = pointwise_weight[:, :, 0, 0]
    problem = Problem(
        pixels, k, c, precision_of(x.dtype, precision), vectors=loads_channel_vectors(x, c)
    )
    arguments = {
        **{"x_ptr": x, "dw_ptr": depthwise_weight, "pw_ptr": matrix, "y_ptr": y},
        **{"depthwise_scale_ptr": vector(depthwise_scale)},
        **{"depthwise_shift_ptr": vector(depthwise_shift)},
        **{"scale_ptr": vector(scale), "shift_ptr": vector(shift), "residual_ptr": residual},
        **{"depthwise_alpha": float(depthwise_alpha), "alpha": float(alpha)},
        **{"M": pixels, "K": k, "C": c, "H": x.shape[2], "W": x.shape[3], "OH": oh, "OW": ow},
        **named_strides("x", "nchw", x),
        **named_strides("d", "crs", depthwise_weight[:, 0]),
        **named_strides("p", "kc", matrix),
        **named_strides("y", "nkhw", y),
        **named_strides("r", "nkhw", residual),
        **geometry(x.shape[1], depthwise_weight.shape, stride, padding, dilation),
        **{"DEPTHWISE_ACTIVATION": depthwise_activation, "ACTIVATION": activation},
        "INT64": needs_int64(x, y, residual, matrix),
        "PRECISION": precision,
    }

    def run(tile: Tile) -> None:
        programs = cdiv(pixels, tile["BLOCK_M"]) * cdiv(k, tile["BLOCK_N"])
        launch(_depthwise_separable_fwd_kernel, flat_grid(programs), arguments, tile)

    with device_guard(x):
        run(pick(SEPARABLE, problem, run))
    return y


def inverted_residual(
    x: torch.Tensor,
    expand_weight: torch.Tensor,
    depthwise_weight: torch.Tensor,
    project_weight: torch.Tensor,
    expand_bias: torch.Tensor | None,
    depthwise_bias: torch.Tensor | None,
    project_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    expand_packed: torch.Tensor | None,
    depthwise_packed: torch.Tensor | None,
    project_packed: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    expand_activation: int,
    expand_alpha: float,
    depthwise_activation: int,
    depthwise_alpha: float,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """nnarch::inverted_residual on a GPU: the expansion by itself, then the fused rest."""
    check_dtype("inverted_residual", x, expand_weight, residual)
    wide = _pointwise(x, expand_weight, None, expand_bias, None, expand_activation, expand_alpha)
    return depthwise_separable_conv2d(
        wide, depthwise_weight, project_weight, None, depthwise_bias, None, project_bias, residual,
        None, None, stride, padding, dilation, depthwise_activation, depthwise_alpha, activation,
        alpha,
    )  # fmt: skip


def _pointwise(x, weight, scale, shift, residual, activation, alpha) -> torch.Tensor:
    return conv2d(
        x, weight, None, scale, shift, residual, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, activation,
        alpha,
    )  # fmt: skip


def _case(n: int, c: int, h: int, r: int, stride: int, k: int) -> StaticCase:
    out = (h + 2 * (r // 2) - r) // stride + 1

    def run(dtype: torch.dtype) -> torch.Tensor:
        x = meta(n, c, h, h, dtype=dtype)
        dw, pw = meta(c, 1, r, r, dtype=dtype), meta(k, c, 1, 1, dtype=dtype, channels_last=False)
        b, d = meta(k, dtype=dtype), meta(c, dtype=dtype)
        rest = ([stride] * 2, [r // 2] * 4, [1, 1], 2, 0.0, 2, 0.0)
        return depthwise_separable_conv2d(x, dw, pw, d, d, b, b, None, None, None, *rest)

    return StaticCase(
        f"depthwise_separable {r}×{r} C{c}→{k} H{h} N{n} s{stride}",
        run,
        flops=2.0 * n * out * out * c * (r * r + k),
        elements=n * c * h * h + c * r * r + c * k + n * k * out * out,
        matrix=True,
    )


STATIC_CASES = [
    _case(32, 128, 56, 3, 1, 128),
    _case(32, 512, 14, 3, 1, 512),
    _case(32, 64, 112, 3, 2, 128),
    _case(32, 96, 28, 5, 1, 96),
]
"""What bench/static_gpu.py compiles."""
