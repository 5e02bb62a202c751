"""The forward depthwise convolution on the GPU.

There is no matrix to multiply and little to reuse: the kernel is bound by memory. A program
computes BLOCK_M pixels by BLOCK_N output channels; the taps of neighbouring pixels meet in the
first-level cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.conv2d.geometry import output_size
from nnarch.kernels.gpu.epilogue import write_tile
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    flat_grid,
    launch,
    named_strides,
    needs_int64,
    vector,
)
from nnarch.kernels.gpu.targets import Target
from nnarch.kernels.gpu.tiles import (
    Problem,
    Tile,
    TileTable,
    always_fits,
    padding_cost,
    pick,
    tile,
)


def _cost(problem: Problem, tile: Tile, target: Target) -> float:
    """Tiles run along what is contiguous in memory: channels (`vectors`) or pixels."""
    along = (tile["BLOCK_N"] >= 16) == problem.vectors
    return padding_cost(problem, tile, target) * (1.0 if along else 8.0)


_TILES = (
    tile(BLOCK_M=32, BLOCK_N=64, num_warps=4),
    tile(BLOCK_M=16, BLOCK_N=128, num_warps=8),
    tile(BLOCK_M=64, BLOCK_N=32, num_warps=4),
    tile(BLOCK_M=64, BLOCK_N=16, num_warps=4),
    tile(BLOCK_M=512, BLOCK_N=1, num_warps=4),
    tile(BLOCK_M=128, BLOCK_N=4, num_warps=4),
)
PIXELS_BY_CHANNELS = TileTable(
    "depthwise", dict.fromkeys(("half", "ieee"), _TILES), _cost, always_fits
)


def problem_of(x: torch.Tensor, pixels: int, channels: int) -> Problem:
    """What a tile of pixels by channels is chosen for."""
    precision = "ieee" if x.dtype == torch.float32 else "half"
    innermost = x.stride(1) == 1 and channels > 1
    return Problem(pixels, channels, precision=precision, vectors=innermost)


@triton.jit
def _depthwise_conv2d_fwd_kernel(
    x_ptr,  # [N, C, H, W], any strides
    w_ptr,  # [C·MULTIPLIER, 1, R, S], any strides
    y_ptr,  # [N, C·MULTIPLIER, OH, OW], any strides
    bias_ptr,  # [C·MULTIPLIER] each, or None
    scale_ptr,
    shift_ptr,
    residual_ptr,  # as y, or None
    alpha,
    M,  # N·OH·OW
    K,  # C·MULTIPLIER
    H,
    W,
    OH,
    OW,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wk,
    stride_wr,
    stride_ws,
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
    ACTIVATION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_inside, k_inside = m < M, k < K
    n, oh, ow = m // (OH * OW), m // OW % OH, m % OW
    if INT64:
        n, oh, ow, k = n.to(tl.int64), oh.to(tl.int64), ow.to(tl.int64), k.to(tl.int64)
    top, left = oh * STRIDE_H - PAD_H, ow * STRIDE_W - PAD_W
    image, channel = n * stride_xn, (k // MULTIPLIER * stride_xc)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(R):
        h = top + r * DILATION_H
        h_inside = m_inside & (h >= 0) & (h < H)
        for s in tl.static_range(S):
            w = left + s * DILATION_W
            inside = (h_inside & (w >= 0) & (w < W))[:, None] & k_inside[None, :]
            x_offset = (image + h * stride_xh + w * stride_xw)[:, None] + channel
            x = tl.load(x_ptr + x_offset, mask=inside, other=0.0).to(tl.float32)
            w_offset = k * stride_wk + r * stride_wr + s * stride_ws
            tap = tl.load(w_ptr + w_offset, mask=k_inside, other=0.0).to(tl.float32)
            acc += x * tap[None, :]

    write_tile(
        acc,
        y_ptr,
        n * stride_yn + oh * stride_yh + ow * stride_yw,
        stride_yk,
        residual_ptr,
        n * stride_rn + oh * stride_rh + ow * stride_rw,
        stride_rk,
        m_inside,
        pid % tiles_n * BLOCK_N,
        K,
        bias_ptr,
        scale_ptr,
        shift_ptr,
        alpha,
        ACTIVATION,
        BLOCK_N,
        INT64,
    )


def depthwise_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    packed: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """nnarch::depthwise_conv2d on a GPU; `packed` is a CPU matter and not read."""
    check_dtype("depthwise_conv2d", x, weight, residual)
    n, k, oh, ow = size = output_size(x.shape, weight.shape, stride, padding, dilation)
    y = library.new_output(x, size)
    if y.numel() == 0:
        return y
    pixels = n * oh * ow
    arguments = {
        **{"x_ptr": x, "w_ptr": weight, "y_ptr": y},
        **{"bias_ptr": vector(bias), "scale_ptr": vector(scale), "shift_ptr": vector(shift)},
        **{"residual_ptr": residual, "alpha": float(alpha), "ACTIVATION": activation},
        **{"M": pixels, "K": k, "H": x.shape[2], "W": x.shape[3], "OH": oh, "OW": ow},
        **named_strides("x", "nchw", x),
        **named_strides("w", "krs", weight[:, 0]),
        **named_strides("y", "nkhw", y),
        **named_strides("r", "nkhw", residual),
        **geometry(x.shape[1], weight.shape, stride, padding, dilation),
        "INT64": needs_int64(x, y, residual),
    }

    def run(tile: Tile) -> None:
        programs = cdiv(pixels, tile["BLOCK_M"]) * cdiv(k, tile["BLOCK_N"])
        launch(_depthwise_conv2d_fwd_kernel, flat_grid(programs), arguments, tile)

    with device_guard(x):
        run(pick(PIXELS_BY_CHANNELS, problem_of(x, pixels, k), run))
    return y


def geometry(
    channels: int,
    weight_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> dict[str, int]:
    """The constexpr arguments that the three depthwise kernels share."""
    k, _, r, s = weight_size
    return {
        **{"MULTIPLIER": k // channels, "R": r, "S": s},
        **{"PAD_H": padding[0], "PAD_W": padding[1]},
        **{"STRIDE_H": stride[0], "STRIDE_W": stride[1]},
        **{"DILATION_H": dilation[0], "DILATION_W": dilation[1]},
    }
