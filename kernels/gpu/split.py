"""Reductions split among programs: into how many parts, and the second stage that adds them.

Parts go to a float32 buffer, each program to its own place, and are added in a fixed order: the
result has the same bits in every run. No atomics.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu import targets
from nnarch.kernels.gpu.epilogue import write_tile
from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides, needs_int64
from nnarch.kernels.gpu.tiles import Tile, tile


@functools.lru_cache(maxsize=4096)
def best_split(
    tiles: int, steps: int, processors: int, step: tuple[int, int, int] = (64, 64, 32)
) -> tuple[int, float]:
    """Into how many parts to split a reduction, and the time that it then takes.

    Args:
        tiles: programs without a split.
        steps: of the reduction; a part keeps at least four.
        processors: that run one program at a time each.
        step: rows, columns and depth of a step's product.

    Returns:
        (parts, time), the time in steps of one processor: whole waves of programs, and for a split
        the parts' way to memory and back and the second launch.
    """
    m, n, k = step
    operands = (m + n) * k  # a step takes as long as they take from the cache
    way = 16 * m * n / operands  # float32, there and back, at a quarter of the cache's rate
    second_launch = 12 * 4096 / operands

    def time(parts: int) -> float:
        work = cdiv(tiles * parts, processors) * cdiv(steps, parts)
        return work if parts == 1 else work + way * tiles * parts / processors + second_launch

    most = max(1, min(steps // 4, 2 * processors))
    return min(((parts, time(parts)) for parts in range(1, most + 1)), key=lambda pair: pair[1])


def split_count(tiles: int, steps: int, step: tuple[int, int, int] = (64, 64, 32)) -> int:
    """The parts of :func:`best_split` on the GPU in use."""
    return best_split(tiles, steps, targets.current_target().processors, step)[0]


@triton.jit
def _finish_kernel(
    partial_ptr,  # [splits, M, K] float32
    y_ptr,  # [N, K, H, W] by strides; a row m of the product is a pixel (n, h, w)
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    alpha,
    M,
    K,
    H,
    W,
    splits,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = act(epilogue(sum of the partial products)), the parts added in their order."""
    tiles_n = tl.cdiv(K, BLOCK_N)
    pid = tl.program_id(0)
    m = pid // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < M)[:, None] & (k < K)[None, :]
    n, h, w = m // (H * W), m // W % H, m % W
    if INT64:
        m, n, h, k = m.to(tl.int64), n.to(tl.int64), h.to(tl.int64), k.to(tl.int64)

    part_ptr = partial_ptr + m[:, None] * K + k[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(splits):
        acc += tl.load(part_ptr, mask=inside, other=0.0)
        part_ptr += tl.cast(M, tl.int64) * K

    write_tile(
        acc,
        y_ptr,
        n * stride_yn + h * stride_yh + w * stride_yw,
        stride_yk,
        residual_ptr,
        n * stride_rn + h * stride_rh + w * stride_rw,
        stride_rk,
        m < M,
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


NO_EPILOGUE = {
    **{"bias_ptr": None, "scale_ptr": None, "shift_ptr": None, "residual_ptr": None},
    **{"alpha": 0.0, "ACTIVATION": 0},
}


def finish_split(partial: torch.Tensor, y: torch.Tensor, epilogue: dict[str, Any]) -> None:
    """Sum the parts of a split reduction and apply the epilogue.

    Args:
        partial: [splits, M, K] float32, M = N·H·W.
        y: [N, K, H, W], written.
        epilogue: the arguments bias_ptr, scale_ptr, shift_ptr, residual_ptr, alpha, ACTIVATION.
    """
    splits, m, k = partial.shape
    chosen = _enough_programs(m * k, tile(BLOCK_M=16, BLOCK_N=64), tile(BLOCK_M=4, BLOCK_N=32))
    arguments = {
        "partial_ptr": partial,
        "y_ptr": y,
        **epilogue,
        **{"M": m, "K": k, "H": y.shape[2], "W": y.shape[3], "splits": splits},
        **named_strides("y", "nkhw", y),
        **named_strides("r", "nkhw", epilogue["residual_ptr"]),
        "INT64": needs_int64(partial[0], y, epilogue["residual_ptr"]),
    }
    programs = cdiv(m, chosen["BLOCK_M"]) * cdiv(k, chosen["BLOCK_N"])
    launch(_finish_kernel, flat_grid(programs), arguments, chosen)


def _enough_programs(elements: int, large: Tile, small: Tile) -> Tile:
    """`large`, or `small` where `large` would leave most processors without a program."""
    size = math.prod(extent for _, extent in large.block)
    return large if elements >= 2 * size * targets.current_target().processors else small


@triton.jit
def _sum_parts_kernel(
    partial_ptr,  # [splits, K, R·S, C / groups] float32
    out_ptr,  # [K, C / groups, R·S] contiguous
    numel,
    C_GROUP,
    TAPS,
    splits,
    INT64: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the parts, added in their order, in the layout of the weight."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if not INT64:
        i = i.to(tl.int32)
    inside = i < numel
    tap, c, k = i % TAPS, i // TAPS % C_GROUP, i // TAPS // C_GROUP
    part_ptr = partial_ptr + (k * TAPS + tap) * C_GROUP + c
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        acc += tl.load(part_ptr, mask=inside, other=0.0)
        part_ptr += numel
    tl.store(out_ptr + i, acc.to(out_ptr.dtype.element_ty), mask=inside)


def sum_parts(partial: torch.Tensor, dw: torch.Tensor) -> None:
    """dw = Σ parts, for weight gradients.

    Args:
        partial: [splits, K, R·S, C / groups] float32.
        dw: [K, C / groups, R, S] contiguous, written.
    """
    splits, _, taps, channels = partial.shape
    chosen = _enough_programs(dw.numel(), tile(BLOCK=512), tile(BLOCK=32, num_warps=1))
    arguments = {
        **{"partial_ptr": partial, "out_ptr": dw, "numel": dw.numel(), "splits": splits},
        **{"C_GROUP": channels, "TAPS": taps, "INT64": needs_int64(dw)},
    }
    launch(_sum_parts_kernel, flat_grid(cdiv(dw.numel(), chosen["BLOCK"])), arguments, chosen)
