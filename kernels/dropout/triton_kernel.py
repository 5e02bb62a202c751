"""Dropout on the GPU: one pass over dense rows, the mask made where it is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch import library
from nnarch.kernels.dropout.reference import survivor_scale, threshold
from nnarch.kernels.gpu.dropout import keep_tile
from nnarch.kernels.gpu.launch import (
    cdiv,
    check_dtype,
    device_guard,
    flat_grid,
    launch,
    needs_int64,
)
from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.gpu.tiles import tile

# By the length of a row: elements of a program, in rows and columns.
_TILES = {
    16: tile(ROWS=64, COLUMNS=16, num_warps=4),
    128: tile(ROWS=8, COLUMNS=128, num_warps=4),
    1024: tile(ROWS=1, COLUMNS=1024, num_warps=4),
}


@triton.jit
def _dropout_kernel(
    x_ptr,  # [rows, columns], dense
    seed_ptr,  # int64
    y_ptr,
    scale,
    threshold,
    rows,
    columns,
    INT64: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    blocks = tl.cdiv(columns, COLUMNS)
    pid = tl.program_id(0)
    first = pid % blocks * COLUMNS
    row = pid // blocks * ROWS + tl.arange(0, ROWS)
    column = first + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    kept = keep_tile(tl.load(seed_ptr), pid * 0, row, first, threshold, COLUMNS)
    start = row
    if INT64:
        start = row.to(tl.int64)
    at = (start * columns)[:, None] + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    # A product: what is dropped and not finite becomes NaN, as in torch.
    y = x * tl.where(kept, scale, 0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def dropout(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """``nnarch::dropout``."""
    check_dtype("dropout", x)
    dense = x.contiguous()
    y = torch.empty_like(dense)
    columns = x.shape[-1] if x.dim() else 1
    if x.numel() == 0:
        return library.new_output(x, x.shape)
    rows = x.numel() // columns
    chosen = next((t for width, t in _TILES.items() if columns <= width), _TILES[1024])
    arguments = {
        **{"x_ptr": dense, "seed_ptr": seed, "y_ptr": y},
        **{"scale": survivor_scale(p), "threshold": threshold(p)},
        **{"rows": rows, "columns": columns, "INT64": needs_int64(y.view(rows, columns))},
    }
    grid = flat_grid(cdiv(rows, chosen["ROWS"]) * cdiv(columns, chosen["COLUMNS"]))
    with device_guard(x):
        launch(_dropout_kernel, grid, arguments, chosen)
    if library.output_format(x) == torch.channels_last:
        return y.contiguous(memory_format=torch.channels_last)
    return y


def _case(rows: int, columns: int) -> StaticCase:
    def run(dtype: torch.dtype) -> torch.Tensor:
        seed = torch.empty(1, dtype=torch.int64, device="meta")
        return dropout(meta(rows, columns, dtype=dtype), seed, 0.1)

    elements = float(rows * columns)
    return StaticCase(f"dropout {rows}×{columns}", run, flops=elements, elements=2 * elements)


STATIC_CASES = [_case(8192, 4096), _case(65536, 64), _case(1 << 20, 10)]
