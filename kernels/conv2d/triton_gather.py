"""The implicit GEMM at the heart of the convolution and of its input gradient.

Both are y[m, n] = Σ over taps and channels of image[pixel of m under the tap, c] · weight[...]:
a row m looks at the pixel (row_h + i·step_h, row_w + j·step_w) under tap (i, j). No im2col buffer
exists; each step of the reduction loads its BLOCK_M × BLOCK_K operand from the image by address.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from nnarch.kernels.gpu.launch import cdiv


def geometry(
    r: int, s: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> dict[str, int]:
    """The constexpr arguments that the three convolution kernels share."""
    return {
        **{"R": r, "S": s, "PAD_H": padding[0], "PAD_W": padding[1]},
        **{"STRIDE_H": stride[0], "STRIDE_W": stride[1]},
        **{"DILATION_H": dilation[0], "DILATION_W": dilation[1]},
    }


def takes_flat(channels: int, block_k: int) -> bool:
    """Whether the reduction runs over taps and channels as one index.

    It does where blocks of one tap's channels would be less than half full, as in the stem.
    """
    return channels * 2 <= block_k


def reduction_steps(taps: int, channels: int, block_k: int) -> int:
    """How many steps :func:`gather_dot` needs for the whole reduction."""
    if takes_flat(channels, block_k):
        return cdiv(taps * channels, block_k)
    return taps * cdiv(channels, block_k)


@triton.jit
def gather_dot(
    acc,  # [BLOCK_M, BLOCK_N] float32
    x_ptr,  # image, at its group's first channel
    w_ptr,  # weights, at tap 0 of its group's first reduced channel
    row,  # [BLOCK_M] offset of the row's image
    row_h,  # [BLOCK_M] image row under tap 0; may lie outside
    row_w,
    row_inside,
    column,  # [BLOCK_N] offset of the column's weights
    column_inside,
    H,
    W,
    channels,
    taps_h,
    taps_w,
    step_h,  # image rows from one tap to the next; negative in the input gradient
    step_w,
    first_step,
    last_step,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wc,
    stride_wr,
    stride_ws,
    FLAT: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc plus steps [first_step, last_step) of the product; a step is BLOCK_K channels of a tap.

    With FLAT a step is BLOCK_K consecutive (tap, channel) pairs, and every element of the operand
    has its own address.
    """
    lane = tl.arange(0, BLOCK_K)
    if INT64:
        lane, row, column = lane.to(tl.int64), row.to(tl.int64), column.to(tl.int64)
        row_h, row_w = row_h.to(tl.int64), row_w.to(tl.int64)
    chunks = tl.cdiv(channels, BLOCK_K)
    for step in range(first_step, last_step):
        if FLAT:
            tap = (step * BLOCK_K + lane) // channels
            c = (step * BLOCK_K + lane) % channels
            c_inside = tap < taps_h * taps_w
            i, j = tap // taps_w, tap % taps_w
            h = row_h[:, None] + (i * step_h)[None, :]
            w = row_w[:, None] + (j * step_w)[None, :]
            x_offset = row[:, None] + h * stride_xh + w * stride_xw + (c * stride_xc)[None, :]
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W)
            inside = inside & row_inside[:, None] & c_inside[None, :]
        else:
            tap = step // chunks
            c = step % chunks * BLOCK_K + lane
            c_inside = c < channels
            i, j = tap // taps_w, tap % taps_w
            h = row_h + i * step_h
            w = row_w + j * step_w
            x_offset = (row + h * stride_xh + w * stride_xw)[:, None] + (c * stride_xc)[None, :]
            inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & row_inside
            inside = inside[:, None] & c_inside[None, :]
        a = tl.load(x_ptr + x_offset, mask=inside, other=0.0)
        w_offset = (i * stride_wr + j * stride_ws + c * stride_wc)[:, None] + column[None, :]
        w_inside = c_inside[:, None] & column_inside[None, :]
        b = tl.load(w_ptr + w_offset, mask=w_inside, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
