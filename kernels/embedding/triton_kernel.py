"""Embeddings on the GPU: the gather and the sorted sum of gradients; triton_fused.py has the rest.

Indices are not looked at beforehand, which would wait for the GPU: a row outside its table is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch.kernels.embedding.triton_fused import (
    FUSED_CASES,
    embedding_sum,
    embedding_sum_backward,
)
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

__all__ = [
    "STATIC_CASES", "embedding", "embedding_grad", "embedding_sum", "embedding_sum_backward",
]  # fmt: skip

_GATHER = tile(BLOCK_R=4, BLOCK_C=256, num_warps=4)
_SCATTER = tile(BLOCK_C=256, num_warps=2)


@triton.jit
def _embedding_fwd_kernel(
    ids_ptr,  # [rows]
    weight_ptr,  # [V, C], dense
    y_ptr,  # [rows, C]
    rows,
    V,
    C,
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    across = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    row = pid // across * BLOCK_R + tl.arange(0, BLOCK_R)
    column = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    row_inside = row < rows
    token = tl.load(ids_ptr + row, mask=row_inside, other=0)
    known = (token >= 0) & (token < V)
    if INT64:
        token, row = token.to(tl.int64), row.to(tl.int64)
    inside = row_inside[:, None] & (column < C)[None, :]
    w_at = (token * C)[:, None] + column[None, :]
    y = tl.load(weight_ptr + w_at, mask=inside & known[:, None], other=float("nan"))
    tl.store(y_ptr + (row * C)[:, None] + column[None, :], y, mask=inside)


@triton.jit
def _embedding_bwd_kernel(
    grad_ptr,  # [rows, C], dense
    sorted_ptr,  # [rows] ids, ascending
    order_ptr,  # [rows] where they were
    dw_ptr,  # [V, C], zeros
    scale,
    rows,
    V,
    C,
    skipped,
    BY_FREQUENCY: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The program of an id's first place adds up all of its places, in their order."""
    across = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    place = pid // across
    column = pid % across * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < C
    token = tl.load(sorted_ptr + place)
    before = tl.load(sorted_ptr + place - 1, mask=place > 0, other=-1)
    if (token != before) & (token != skipped) & (token >= 0) & (token < V):
        acc = tl.zeros((BLOCK_C,), tl.float32)
        at = place
        while (at < rows) & (tl.load(sorted_ptr + at, mask=at < rows, other=-1) == token):
            row = tl.load(order_ptr + at)
            if INT64:
                row = row.to(tl.int64)
            acc += tl.load(grad_ptr + row * C + column, mask=inside, other=0.0).to(tl.float32)
            at += 1
        acc *= scale
        if BY_FREQUENCY:
            acc /= (at - place).to(tl.float32)
        if INT64:
            token = token.to(tl.int64)
        tl.store(dw_ptr + token * C + column, acc.to(dw_ptr.dtype.element_ty), mask=inside)


def embedding(
    tokens: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int,
    sparse: bool,
    scale_grad_by_freq: bool,
) -> torch.Tensor:
    """``nnarch::embedding``."""
    check_dtype("embedding", weight)
    weight, ids = weight.contiguous(), tokens.contiguous()
    (vocabulary, columns), rows = weight.shape, tokens.numel()
    y = weight.new_empty((*tokens.shape, columns))
    arguments = {
        **{"ids_ptr": ids, "weight_ptr": weight, "y_ptr": y},
        **{"rows": rows, "V": vocabulary, "C": columns},
        "INT64": needs_int64(weight, y),
    }
    grid = flat_grid(cdiv(rows, _GATHER["BLOCK_R"]) * cdiv(columns, _GATHER["BLOCK_C"]))
    if y.numel() > 0:
        with device_guard(weight):
            launch(_embedding_fwd_kernel, grid, arguments, _GATHER)
    return y


def embedding_grad(
    grad: torch.Tensor,
    tokens: torch.Tensor,
    rows: int,
    padding_idx: int,
    scale: float,
    by_frequency: bool,
) -> torch.Tensor:
    """``nnarch::embedding_grad``: a stable sort of the ids, then sums in the order of places."""
    check_dtype("embedding_grad", grad)
    columns, places = grad.shape[-1], tokens.numel()
    dw = grad.new_zeros(rows, columns)
    if places == 0 or dw.numel() == 0:
        return dw
    grad = grad.contiguous()
    ids, order = torch.sort(tokens.reshape(-1), stable=True)
    arguments = {
        **{"grad_ptr": grad, "sorted_ptr": ids, "order_ptr": order, "dw_ptr": dw},
        **{"scale": float(scale), "rows": places, "V": rows, "C": columns},
        **{"skipped": padding_idx, "BY_FREQUENCY": by_frequency},
        "INT64": needs_int64(grad.view(places, columns), dw),
    }
    with device_guard(grad):
        grid = flat_grid(places * cdiv(columns, _SCATTER["BLOCK_C"]))
        launch(_embedding_bwd_kernel, grid, arguments, _SCATTER)
    return dw


def _ids(*size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int64, device="meta")


_ROWS, _VOCABULARY, _COLUMNS = 8192, 50257, 768

STATIC_CASES = [
    StaticCase(
        "embedding 8192 of 50257×768",
        lambda dtype: embedding(_ids(_ROWS), meta(_ROWS, _COLUMNS, dtype=dtype), -1, False, False),
        flops=float(_ROWS * _COLUMNS),
        elements=2.0 * _ROWS * _COLUMNS,
        fixed_bytes=8.0 * _ROWS,
    ),
    StaticCase(
        "embedding gradient 8192 of 50257×768",
        lambda dtype: embedding_grad(
            meta(_ROWS, _COLUMNS, dtype=dtype), _ids(_ROWS), _ROWS, -1, 1.0, False
        ),
        flops=float(_ROWS * _COLUMNS),
        elements=2.0 * _ROWS * _COLUMNS,
        fixed_bytes=16.0 * _ROWS,
    ),
    *FUSED_CASES,
]
