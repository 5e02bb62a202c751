"""What the kernels that multiply matrices share: tiles, program order, split reduction, finish."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu import targets
from nnarch.kernels.gpu.epilogue import write_tile
from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, needs_int64, strides
from nnarch.kernels.gpu.tiles import Tile, TileTable, matmul_cost, matmul_fits, tile


def _tiles(*rows: tuple[int, int, int, int, int]) -> tuple[Tile, ...]:
    return tuple(
        tile(warps, stages, all_registers=True, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k)
        for m, n, k, warps, stages in rows
    )


# BLOCK_M ≥ 64 throughout: HGMMA and tcgen05 multiply at least 64 rows. The last tiles of a list
# serve operands whose elements have an address each (few or oddly many channels).
MATMUL_TILES = {
    "half": _tiles(
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 32, 4, 3),
        (128, 64, 64, 4, 3),
        (64, 64, 64, 4, 3),
        (128, 32, 64, 4, 3),
        (64, 64, 32, 4, 2),
        (64, 32, 32, 4, 2),
    ),
    "tf32": _tiles(
        (128, 128, 32, 8, 3),
        (128, 64, 32, 4, 3),
        (64, 64, 32, 4, 3),
        (128, 32, 32, 4, 3),
        (64, 64, 16, 4, 2),
        (64, 32, 16, 4, 2),
    ),
    "ieee": _tiles(
        (64, 64, 16, 4, 2),
        (64, 32, 16, 4, 2),
        (32, 32, 16, 4, 2),
    ),
}
MATMUL = TileTable("matmul", MATMUL_TILES, matmul_cost, matmul_fits)


def loads_vectors(*extents: int) -> bool:
    """Whether Triton reads operands with these row lengths and strides 16 bytes at a time.

    It specialises a kernel on every integer argument that 16 divides, and proves it from that.
    """
    return all(extent % 16 == 0 for extent in extents)


def loads_channel_vectors(x: torch.Tensor, channels: int) -> bool:
    """:func:`loads_vectors` for blocks of channels of an image [N, C, H, W]."""
    return x.stride(1) == 1 and loads_vectors(channels, x.stride(0), x.stride(2), x.stride(3))


def channels_innermost(x: torch.Tensor, channels: int) -> torch.Tensor:
    """[N, C, H, W] with C at stride 1, copied to it unless a group has only a few channels.

    The copy moves the tensor twice; without it every element of an operand has its own address.
    """
    if x.stride(1) == 1 or channels < 16:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def precision_of(dtype: torch.dtype, float32: str) -> str:
    """The key of a tile table: "half", or what float32 operands are multiplied with."""
    return float32 if dtype == torch.float32 else "half"


def split_count(output_tiles: int, steps: int) -> int:
    """Into how many parts to split the reduction, so that few output tiles fill the GPU.

    Args:
        output_tiles: programs without a split.
        steps: of BLOCK_K in the reduction; a part keeps at least four.
    """
    processors = targets.current_target().processors
    if output_tiles * 2 > processors:
        return 1
    return max(1, min(processors // output_tiles, steps // 4))


@triton.jit
def grouped_order(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column tile of a program, GROUP_M row tiles at a time: operands are reused in L2."""
    per_group = GROUP_M * tiles_n
    first = pid // per_group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + pid % per_group % rows, pid % per_group // rows


# ------------------------------------------------------------------- second stage of a split


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


def finish_split(partial: torch.Tensor, y: torch.Tensor, epilogue: dict[str, Any]) -> None:
    """Sum the parts of a split reduction and apply the epilogue.

    Args:
        partial: [splits, M, K] float32, M = N·H·W.
        y: [N, K, H, W], written.
        epilogue: the arguments bias_ptr, scale_ptr, shift_ptr, residual_ptr, alpha, ACTIVATION.
    """
    splits, m, k = partial.shape
    block_m, block_n = 16, 64
    arguments = {
        "partial_ptr": partial,
        "y_ptr": y,
        **epilogue,
        **{"M": m, "K": k, "H": y.shape[2], "W": y.shape[3], "splits": splits},
        **named_strides("y", "nkhw", y),
        **named_strides("r", "nkhw", epilogue["residual_ptr"]),
        "INT64": needs_int64(partial[0], y, epilogue["residual_ptr"]),
        **{"BLOCK_M": block_m, "BLOCK_N": block_n},
    }
    launch(_finish_kernel, flat_grid(cdiv(m, block_m) * cdiv(k, block_n)), arguments)


def named_strides(tensor_name: str, dims: str, tensor: torch.Tensor | None) -> dict[str, int]:
    """{"stride_<tensor><dim>": elements} for each letter of `dims`; zeros for None."""
    values = strides(tensor, len(dims))
    return {f"stride_{tensor_name}{d}": s for d, s in zip(dims, values, strict=True)}
