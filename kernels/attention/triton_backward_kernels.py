"""The kernels of attention's backward (triton_backward.py launches them): delta, and the gradients
of keys and values. That of queries is in triton_query_gradient.py.

All take the same tensors: q [B, H, L, D], k [B, G, S, D], v [B, G, S, DV] and grad [B, H, L, DV]
with any strides, lse and delta [B, H, L]; a mask with stride 0 where it is broadcast.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nnarch.kernels.gpu.dropout import keep_tile

from .triton_tiles import (
    LOG2E,
    at_edges,
    exponents,
    load_row_values,
    load_tile,
    query_tiles,
    restrict,
    row_products,
    sequence_keys,
    store_rows,
)


@triton.jit
def _attention_bwd_delta_kernel(
    grad_ptr,
    out_ptr,
    grad_lse_ptr,  # [R], or None
    delta_ptr,  # [R], R rows of all heads
    R,
    H,
    L,
    stride_gb,
    stride_gh,
    stride_gm,
    stride_gd,
    stride_ob,
    stride_oh,
    stride_om,
    stride_od,
    DV: tl.constexpr,
    VALUE_DEPTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    batch, head, i, d = r // L // H, r // L % H, r % L, tl.arange(0, VALUE_DEPTH)
    inside = (r < R)[:, None] & (d < DV)[None, :]
    g_rows = batch * stride_gb + head * stride_gh + i * stride_gm
    o_rows = batch * stride_ob + head * stride_oh + i * stride_om
    g = tl.load(grad_ptr + g_rows[:, None] + d[None, :] * stride_gd, mask=inside, other=0.0)
    o = tl.load(out_ptr + o_rows[:, None] + d[None, :] * stride_od, mask=inside, other=0.0)
    delta = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + r, mask=r < R, other=0.0)
    tl.store(delta_ptr + r, delta, mask=r < R)


@triton.jit
def _attention_bwd_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    mask_ptr,
    lengths_ptr,
    seed_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    scale,
    threshold,
    survivor,
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
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dkd,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    stride_dvd,
    D: tl.constexpr,
    DV: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUE_DEPTH: tl.constexpr,
    MASK: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns a tile of keys; scores are held transposed, [BLOCK_N, BLOCK_M]."""
    tiles, groups = tl.cdiv(S, BLOCK_N), H // SHARE
    slot, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch, group = (slot // groups).to(tl.int64), (slot % groups).to(tl.int64)
    j = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if CHUNKS:
        wide_j = j.to(tl.int64) if INT64 else j
        k_rows = k_ptr + batch * stride_kb + group * stride_kh + wide_j * stride_kn
        v_rows = v_ptr + batch * stride_vb + group * stride_vh + wide_j * stride_vn
    else:
        k = load_tile(
            k_ptr, batch, group, tile * BLOCK_N, stride_kb, stride_kh, stride_kn, stride_kd, S, D,
            DEPTH, BLOCK_N, True, INT64, DESCRIPTORS,
        )  # fmt: skip
        v = load_tile(
            v_ptr, batch, group, tile * BLOCK_N, stride_vb, stride_vh, stride_vn, stride_vd, S, DV,
            VALUE_DEPTH, BLOCK_N, True, INT64, DESCRIPTORS,
        )  # fmt: skip
    keys = sequence_keys(lengths_ptr, batch, S)
    first, whole_from, whole_to, last = query_tiles(
        tile * BLOCK_N, tile * BLOCK_N + BLOCK_N - 1, keys, L, low, high, BLOCK_M
    )
    dk = tl.zeros((BLOCK_N, DEPTH), tl.float32)
    dv = tl.zeros((BLOCK_N, VALUE_DEPTH), tl.float32)
    for e in range(0, SHARE):
        head = group * SHARE + e
        for phase in tl.static_range(3 if ONE_LOOP else 0, 4 if ONE_LOOP else 3):
            if phase == 3:
                start, stop = first, last
            elif phase == 0:
                start, stop = first, whole_from
            elif phase == 1:
                start, stop = whole_from, whole_to
            else:
                start, stop = whole_to, last
            for m in range(start, stop, BLOCK_M):
                i = m + tl.arange(0, BLOCK_M)
                q = load_tile(
                    q_ptr, batch, head, m, stride_qb, stride_qh, stride_qm, stride_qd, L, D, DEPTH,
                    BLOCK_M, phase != 1, INT64, DESCRIPTORS,
                )  # fmt: skip
                g = load_tile(
                    grad_ptr, batch, head, m, stride_gb, stride_gh, stride_gm, stride_gd, L, DV,
                    VALUE_DEPTH, BLOCK_M, phase != 1, INT64, DESCRIPTORS,
                )  # fmt: skip
                lse = load_row_values(lse_ptr, batch, head, H, m, L, BLOCK_M, DESCRIPTORS)
                delta = load_row_values(delta_ptr, batch, head, H, m, L, BLOCK_M, DESCRIPTORS)
                if MASK != 0:
                    rows = i.to(tl.int64) * stride_mm + batch * stride_mb + head * stride_mh
                    mask_rows = mask_ptr + rows[None, :]
                else:
                    mask_rows = None
                if CHUNKS:
                    wide_i = i.to(tl.int64) if INT64 else i
                    q_rows = q_ptr + batch * stride_qb + head * stride_qh + wide_i * stride_qm
                    g_rows = grad_ptr + batch * stride_gb + head * stride_gh + wide_i * stride_gm
                    s = row_products(
                        k_rows,
                        j < S,
                        stride_kd,
                        q_rows,
                        i < L,
                        stride_qd,
                        D,
                        BLOCK_N,
                        BLOCK_M,
                        PRECISION,
                    )
                    dp = row_products(
                        v_rows,
                        j < S,
                        stride_vd,
                        g_rows,
                        i < L,
                        stride_gd,
                        DV,
                        BLOCK_N,
                        BLOCK_M,
                        PRECISION,
                    )
                else:
                    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                    dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
                s *= scale * LOG2E
                s = restrict(
                    s, i[None, :], j[:, None], mask_rows, stride_mn, keys, L, S, low, high, MASK,
                    phase % 2 == 0, INT64,
                )  # fmt: skip
                p = tl.exp2(s - exponents(lse)[None, :])
                if phase == 3:
                    p = at_edges(
                        p, m, whole_from, whole_to, i[None, :], j[:, None], keys, low, high, 0.0
                    )
                kept = p
                if seed_ptr is not None:
                    keep = tl.trans(
                        keep_tile(
                            tl.load(seed_ptr), (batch * H + head).to(tl.int32), i, tile * BLOCK_N,
                            threshold, BLOCK_N,
                        )
                    )  # fmt: skip
                    kept = tl.where(keep, p * survivor, 0.0)
                    dp = tl.where(keep, dp * survivor, 0.0)
                dv = tl.dot(kept.to(g.dtype), g, dv, input_precision=PRECISION)
                ds = p * (dp - delta[None, :])
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_head = dk_ptr + batch * stride_dkb + group * stride_dkh
    dv_head = dv_ptr + batch * stride_dvb + group * stride_dvh
    store_rows(dk_head, dk * scale, j, stride_dkn, stride_dkd, S, D, DEPTH, INT64)
    store_rows(dv_head, dv, j, stride_dvn, stride_dvd, S, DV, VALUE_DEPTH, INT64)
