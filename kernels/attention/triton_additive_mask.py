"""The kernel of an additive mask's gradient; its tensors are those of triton_backward_kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_query_gradient import score_gradient
from .triton_tiles import load_rows, sequence_keys, store_shared


@triton.jit
def _attention_bwd_mask_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    mask_ptr,
    lengths_ptr,
    seed_ptr,
    lse_ptr,
    delta_ptr,
    d_mask_ptr,  # [MASK_B, MASK_H, L or 1, S or 1], contiguous
    scale,
    threshold,
    survivor,
    B,
    H,
    L,
    S,
    SHARE,
    MASK_B,
    MASK_H,
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
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_gd,
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    ONE_ROW: tl.constexpr,  # whether the mask is the same for all queries
    ONE_COLUMN: tl.constexpr,  # or for all keys
    D: tl.constexpr,
    DV: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUE_DEPTH: tl.constexpr,
    MASK: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns a tile of the mask, and goes through all that it is broadcast over."""
    tiles_m = 1 if ONE_ROW else tl.cdiv(L, BLOCK_M)
    tiles_n = 1 if ONE_COLUMN else tl.cdiv(S, BLOCK_N)
    slot, tile = tl.program_id(0) // (tiles_m * tiles_n), tl.program_id(0) % (tiles_m * tiles_n)
    tile_m, tile_n = tile // tiles_n, tile % tiles_n
    mask_batch, mask_head = slot // MASK_H, slot % MASK_H
    batches, heads = B // MASK_B, H // MASK_H  # 1 where the mask has its own
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for b in range(mask_batch * batches, mask_batch * batches + batches):
        batch = tl.zeros((), tl.int64) + b
        keys = sequence_keys(lengths_ptr, batch, S)
        for h in range(mask_head * heads, mask_head * heads + heads):
            head = tl.zeros((), tl.int64) + h
            k_head = k_ptr + batch * stride_kb + head // SHARE * stride_kh
            v_head = v_ptr + batch * stride_vb + head // SHARE * stride_vh
            q_head = q_ptr + batch * stride_qb + head * stride_qh
            g_head = grad_ptr + batch * stride_gb + head * stride_gh
            row0 = (batch * H + head) * L
            m_from, m_to = tile_m * BLOCK_M, (L if ONE_ROW else tile_m * BLOCK_M + 1)
            for m in range(m_from, m_to, BLOCK_M):
                i = m + tl.arange(0, BLOCK_M)
                q = load_rows(q_head, i, stride_qm, stride_qd, L, D, DEPTH, True, INT64)
                g = load_rows(g_head, i, stride_gm, stride_gd, L, DV, VALUE_DEPTH, True, INT64)
                lse = tl.load(lse_ptr + row0 + i, mask=i < L, other=0.0)
                delta = tl.load(delta_ptr + row0 + i, mask=i < L, other=0.0)
                rows = i.to(tl.int64) * stride_mm + batch * stride_mb + head * stride_mh
                n_from, n_to = tile_n * BLOCK_N, (S if ONE_COLUMN else tile_n * BLOCK_N + 1)
                for n in range(n_from, n_to, BLOCK_N):
                    j = n + tl.arange(0, BLOCK_N)
                    if CHUNKS:
                        k, v = None, None
                    else:
                        k = load_rows(k_head, j, stride_kn, stride_kd, S, D, DEPTH, True, INT64)
                        v = load_rows(
                            v_head, j, stride_vn, stride_vd, S, DV, VALUE_DEPTH, True, INT64
                        )
                    ds = score_gradient(
                        q_head, g_head, q, g, lse, delta, k_head, v_head, k, v,
                        mask_ptr + rows[:, None], seed_ptr, scale, threshold, survivor,
                        (batch * H + head).to(tl.int32), i, n, 0, 0, keys, L, S, low, high,
                        stride_qm, stride_qd, stride_gm, stride_gd, stride_kn, stride_kd, stride_vn,
                        stride_vd, stride_mn, D, DV, MASK, True, False, INT64, PRECISION, CHUNKS,
                        BLOCK_M, BLOCK_N,
                    )  # fmt: skip
                    acc += tl.where((i < L)[:, None], ds, 0.0)
    store_shared(
        d_mask_ptr, slot, acc, tile_m, tile_n, L, S, ONE_ROW, ONE_COLUMN, BLOCK_M, BLOCK_N
    )  # fmt: skip
