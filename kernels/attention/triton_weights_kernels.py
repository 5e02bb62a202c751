"""The kernels of attention's weights (triton_weights.py launches them).

q is [B, H, L, D] and k [B, G, S, D] with any strides, lse [B, H, L]; a mask has stride 0 where it
is broadcast, and so has the weights' gradient [B, H or 1, L, S]. Scores are always multiplied chunk
by chunk: what bounds these kernels is the memory of the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nnarch.kernels.gpu.dropout import keep_tile

from .triton_tiles import (
    LOG2E,
    exponents,
    key_tiles,
    load_rows,
    query_tiles,
    restrict,
    row_products,
    sequence_keys,
    store_rows,
    store_shared,
)


@triton.jit
def _weights_tile(
    q_head, k_head, mask_head, grad_head, lse_head, seed_ptr, scale, threshold, survivor, factor,
    outer, i, j, n, keys, L, S, low, high, stride_qm, stride_qd, stride_kn, stride_kd, stride_mm,
    stride_mn, stride_wm, stride_wn, D: tl.constexpr, MASK: tl.constexpr, INT64: tl.constexpr,
    PRECISION: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weights after dropout, times their gradient where there is one: [BLOCK_M, BLOCK_N]."""
    wide_i, wide_j = (i.to(tl.int64) if INT64 else i), (j.to(tl.int64) if INT64 else j)
    q_rows, k_rows = q_head + wide_i * stride_qm, k_head + wide_j * stride_kn
    lse = exponents(tl.load(lse_head + i, mask=i < L, other=0.0))
    if TRANSPOSED:
        s = row_products(
            k_rows, j < S, stride_kd, q_rows, i < L, stride_qd, D, BLOCK_N, BLOCK_M, PRECISION
        )
        lse, i_at, j_at = lse[None, :], i[None, :], j[:, None]
    else:
        s = row_products(
            q_rows, i < L, stride_qd, k_rows, j < S, stride_kd, D, BLOCK_M, BLOCK_N, PRECISION
        )
        lse, i_at, j_at = lse[:, None], i[:, None], j[None, :]
    mask_rows = None if MASK == 0 else mask_head + i_at.to(tl.int64) * stride_mm
    s = restrict(
        s * (scale * LOG2E), i_at, j_at, mask_rows, stride_mn, keys, L, S, low, high, MASK, True,
        INT64,
    )  # fmt: skip
    p = tl.exp2(s - lse)
    if seed_ptr is not None:
        keep = keep_tile(tl.load(seed_ptr), outer, i, n, threshold, BLOCK_N)
        if TRANSPOSED:
            keep = tl.trans(keep)
        p = tl.where(keep, p * survivor, 0.0)
    if grad_head is not None:
        at = grad_head + i_at.to(tl.int64) * stride_wm + j_at.to(tl.int64) * stride_wn
        g = tl.load(at, mask=(i_at < L) & (j_at < S), other=0.0)
        p = p * (g.to(tl.float32) * factor)
    return p


@triton.jit
def _attention_weights_kernel(
    q_ptr,
    k_ptr,
    mask_ptr,
    lengths_ptr,
    seed_ptr,
    lse_ptr,
    grad_ptr,  # of the weights, or None
    out_ptr,  # [OUT_B, OUT_H, L or 1, S or 1], contiguous
    scale,
    threshold,
    survivor,
    factor,
    B,
    H,
    L,
    S,
    SHARE,
    OUT_B,
    OUT_H,
    low,
    high,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    stride_wb,
    stride_wh,
    stride_wm,
    stride_wn,
    ONE_ROW: tl.constexpr,  # whether the output is summed over queries
    ONE_COLUMN: tl.constexpr,  # or over keys
    D: tl.constexpr,
    MASK: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns a tile of the output: the weights, or their mean times `factor`; where they
    have a gradient a mask's. It goes through all sequences and heads that are summed there."""
    tiles_m = 1 if ONE_ROW else tl.cdiv(L, BLOCK_M)
    tiles_n = 1 if ONE_COLUMN else tl.cdiv(S, BLOCK_N)
    slot, tile = tl.program_id(0) // (tiles_m * tiles_n), tl.program_id(0) % (tiles_m * tiles_n)
    tile_m, tile_n = tile // tiles_n, tile % tiles_n
    batches, heads = B // OUT_B, H // OUT_H  # 1 where the output has its own
    first_batch, first_head = slot // OUT_H * batches, slot % OUT_H * heads
    m_from, m_to = tile_m * BLOCK_M, (L if ONE_ROW else tile_m * BLOCK_M + 1)
    n_from, n_to = tile_n * BLOCK_N, (S if ONE_COLUMN else tile_n * BLOCK_N + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b in range(first_batch, first_batch + batches):
        batch = tl.zeros((), tl.int64) + b
        keys = sequence_keys(lengths_ptr, batch, S)
        for h in range(first_head, first_head + heads):
            head = tl.zeros((), tl.int64) + h
            for m in range(m_from, m_to, BLOCK_M):
                i = m + tl.arange(0, BLOCK_M)
                # Keys that some of these queries see.
                seen_from = tl.maximum(n_from, tl.maximum(m + low, 0) // BLOCK_N * BLOCK_N)
                seen_to = tl.minimum(n_to, tl.minimum(keys, m + BLOCK_M + high))
                for n in range(seen_from, seen_to, BLOCK_N):
                    p = _weights_tile(
                        q_ptr + batch * stride_qb + head * stride_qh,
                        k_ptr + batch * stride_kb + head // SHARE * stride_kh,
                        None if MASK == 0 else mask_ptr + batch * stride_mb + head * stride_mh,
                        None
                        if grad_ptr is None
                        else grad_ptr + batch * stride_wb + head * stride_wh,
                        lse_ptr + (batch * H + head) * L,
                        seed_ptr, scale, threshold, survivor, factor,
                        (batch * H + head).to(tl.int32), i, n + tl.arange(0, BLOCK_N), n, keys, L,
                        S, low, high, stride_qm, stride_qd, stride_kn, stride_kd, stride_mm,
                        stride_mn, stride_wm, stride_wn, D, MASK, INT64, PRECISION, False, BLOCK_M,
                        BLOCK_N,
                    )  # fmt: skip
                    acc += tl.where((i < L)[:, None], p, 0.0)
    if grad_ptr is None:
        acc *= factor
    store_shared(
        out_ptr, slot, acc, tile_m, tile_n, L, S, ONE_ROW, ONE_COLUMN, BLOCK_M, BLOCK_N
    )  # fmt: skip


@triton.jit
def _attention_weights_bwd_q_kernel(
    q_ptr,
    k_ptr,
    mask_ptr,
    lengths_ptr,
    seed_ptr,
    lse_ptr,
    grad_ptr,
    dq_ptr,
    d_lse_ptr,  # [B, H, L]
    scale,
    threshold,
    survivor,
    factor,
    H,
    L,
    S,
    SHARE,
    low,
    high,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    stride_wb,
    stride_wh,
    stride_wm,
    stride_wn,
    stride_dqb,
    stride_dqh,
    stride_dqm,
    stride_dqd,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    MASK: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns a tile of queries."""
    tiles = tl.cdiv(L, BLOCK_M)
    slot, tile = tl.program_id(0) // tiles, tiles - 1 - tl.program_id(0) % tiles
    batch, head = (slot // H).to(tl.int64), (slot % H).to(tl.int64)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    k_head = k_ptr + batch * stride_kb + head // SHARE * stride_kh
    keys = sequence_keys(lengths_ptr, batch, S)
    i_last = tl.minimum(tile * BLOCK_M + BLOCK_M, L) - 1
    first, _, _, last = key_tiles(tile * BLOCK_M, i_last, 0, keys, low, high, BLOCK_N)
    dq = tl.zeros((BLOCK_M, DEPTH), tl.float32)
    d_lse = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(first, last, BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        ds = _weights_tile(
            q_ptr + batch * stride_qb + head * stride_qh,
            k_head,
            None if MASK == 0 else mask_ptr + batch * stride_mb + head * stride_mh,
            grad_ptr + batch * stride_wb + head * stride_wh,
            lse_ptr + (batch * H + head) * L,
            seed_ptr, scale, threshold, survivor, factor, (batch * H + head).to(tl.int32), i, j, n,
            keys, L, S, low, high, stride_qm, stride_qd, stride_kn, stride_kd, stride_mm, stride_mn,
            stride_wm, stride_wn, D, MASK, INT64, PRECISION, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        d_lse -= tl.sum(ds, 1)
        k = load_rows(k_head, j, stride_kn, stride_kd, S, D, DEPTH, True, INT64)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(d_lse_ptr + (batch * H + head) * L + i, d_lse, mask=i < L)
    dq_head = dq_ptr + batch * stride_dqb + head * stride_dqh
    store_rows(dq_head, dq * scale, i, stride_dqm, stride_dqd, L, D, DEPTH, INT64)


@triton.jit
def _attention_weights_bwd_k_kernel(
    q_ptr,
    k_ptr,
    mask_ptr,
    lengths_ptr,
    seed_ptr,
    lse_ptr,
    grad_ptr,
    dk_ptr,
    scale,
    threshold,
    survivor,
    factor,
    H,
    L,
    S,
    SHARE,
    low,
    high,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    stride_wb,
    stride_wh,
    stride_wm,
    stride_wn,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dkd,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    MASK: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns a tile of keys; weights are held transposed, [BLOCK_N, BLOCK_M]."""
    tiles, groups = tl.cdiv(S, BLOCK_N), H // SHARE
    slot, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, group = (slot // groups).to(tl.int64), (slot % groups).to(tl.int64)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = sequence_keys(lengths_ptr, batch, S)
    first, _, _, last = query_tiles(
        tile * BLOCK_N, tile * BLOCK_N + BLOCK_N - 1, keys, L, low, high, BLOCK_M
    )
    dk = tl.zeros((BLOCK_N, DEPTH), tl.float32)
    for e in range(0, SHARE):
        head = group * SHARE + e
        q_head = q_ptr + batch * stride_qb + head * stride_qh
        for m in range(first, last, BLOCK_M):
            i = m + tl.arange(0, BLOCK_M)
            ds = _weights_tile(
                q_head,
                k_ptr + batch * stride_kb + group * stride_kh,
                None if MASK == 0 else mask_ptr + batch * stride_mb + head * stride_mh,
                grad_ptr + batch * stride_wb + head * stride_wh,
                lse_ptr + (batch * H + head) * L,
                seed_ptr, scale, threshold, survivor, factor, (batch * H + head).to(tl.int32), i, j,
                tile * BLOCK_N, keys, L, S, low, high, stride_qm, stride_qd, stride_kn, stride_kd,
                stride_mm, stride_mn, stride_wm, stride_wn, D, MASK, INT64, PRECISION, True,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            q = load_rows(q_head, i, stride_qm, stride_qd, L, D, DEPTH, True, INT64)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_head = dk_ptr + batch * stride_dkb + group * stride_dkh
    store_rows(dk_head, dk * scale, j, stride_dkn, stride_dkd, S, D, DEPTH, INT64)
