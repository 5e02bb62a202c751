"""The kernel of the gradient of attention's queries, and the gradient of a tile of scores.

Its tensors are those of triton_backward_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nnarch.kernels.gpu.dropout import keep_tile

from .triton_tiles import (
    LOG2E,
    at_edges,
    exponents,
    key_tiles,
    load_tile,
    restrict,
    row_products,
    sequence_keys,
    store_rows,
)


@triton.jit
def score_gradient(
    q_head, g_head, q, g, lse, delta, k_head, v_head, k, v, mask_rows, seed_ptr, scale, threshold,
    survivor, outer, i, n, whole_from, whole_to, keys, L, S, low, high, stride_qm, stride_qd,
    stride_gm, stride_gd, stride_kn, stride_kd, stride_vn, stride_vd, stride_mn, D: tl.constexpr,
    DV: tl.constexpr, MASK: tl.constexpr, BANDED: tl.constexpr, EDGES: tl.constexpr,
    INT64: tl.constexpr, PRECISION: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS of some queries by the keys n … n + BLOCK_N - 1.

    q, g, k and v are their tiles, or with CHUNKS read from the heads that they lie in. BANDED tiles
    are cut by the band; with EDGES those outside whole_from … whole_to are.
    """
    j = n + tl.arange(0, BLOCK_N)
    if CHUNKS:
        wide_i, wide_j = (i.to(tl.int64) if INT64 else i), (j.to(tl.int64) if INT64 else j)
        q_rows, g_rows = q_head + wide_i * stride_qm, g_head + wide_i * stride_gm
        k_rows, v_rows = k_head + wide_j * stride_kn, v_head + wide_j * stride_vn
        s = row_products(
            q_rows, i < L, stride_qd, k_rows, j < S, stride_kd, D, BLOCK_M, BLOCK_N, PRECISION
        )
        dp = row_products(
            g_rows, i < L, stride_gd, v_rows, j < S, stride_vd, DV, BLOCK_M, BLOCK_N, PRECISION
        )
    else:
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    s *= scale * LOG2E
    s = restrict(
        s, i[:, None], j[None, :], mask_rows, stride_mn, keys, L, S, low, high,
        MASK, BANDED, INT64,
    )  # fmt: skip
    p = tl.exp2(s - exponents(lse)[:, None])
    if EDGES:
        p = at_edges(p, n, whole_from, whole_to, i[:, None], j[None, :], keys, low, high, 0.0)
    if seed_ptr is not None:
        keep = keep_tile(tl.load(seed_ptr), outer, i, n, threshold, BLOCK_N)
        dp = tl.where(keep, dp * survivor, 0.0)
    return p * (dp - delta[:, None])


@triton.jit
def _attention_bwd_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    mask_ptr,
    lengths_ptr,
    seed_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    stride_dqb,
    stride_dqh,
    stride_dqm,
    stride_dqd,
    D: tl.constexpr,
    DV: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUE_DEPTH: tl.constexpr,
    MASK: tl.constexpr,
    LEFT: tl.constexpr,
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ONE_LOOP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns a tile of queries."""
    tiles = tl.cdiv(L, BLOCK_M)
    slot, tile = tl.program_id(0) // tiles, tiles - 1 - tl.program_id(0) % tiles
    batch, head = (slot // H).to(tl.int64), (slot % H).to(tl.int64)
    i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    group = head // SHARE
    if CHUNKS:  # all but k is read again with each tile of keys
        q, g, v = None, None, None
        q_head = q_ptr + batch * stride_qb + head * stride_qh
        g_head = grad_ptr + batch * stride_gb + head * stride_gh
        k_head = k_ptr + batch * stride_kb + group * stride_kh
        v_head = v_ptr + batch * stride_vb + group * stride_vh
    else:
        q_head, g_head, k_head, v_head = None, None, None, None
        q = load_tile(
            q_ptr, batch, head, tile * BLOCK_M, stride_qb, stride_qh, stride_qm, stride_qd, L, D,
            DEPTH, BLOCK_M, True, INT64, DESCRIPTORS,
        )  # fmt: skip
        g = load_tile(
            grad_ptr, batch, head, tile * BLOCK_M, stride_gb, stride_gh, stride_gm, stride_gd, L,
            DV, VALUE_DEPTH, BLOCK_M, True, INT64, DESCRIPTORS,
        )  # fmt: skip
    row0 = (batch * H + head) * L
    lse = tl.load(lse_ptr + row0 + i, mask=i < L, other=0.0)
    delta = tl.load(delta_ptr + row0 + i, mask=i < L, other=0.0)
    if MASK != 0:
        rows = i.to(tl.int64) * stride_mm + batch * stride_mb + head * stride_mh
        mask_rows = mask_ptr + rows[:, None]
    else:
        mask_rows = None
    keys = sequence_keys(lengths_ptr, batch, S)
    i_last = tl.minimum(tile * BLOCK_M + BLOCK_M, L) - 1
    first, whole_from, whole_to, last = key_tiles(
        tile * BLOCK_M, i_last, 0, keys, low, high, BLOCK_N
    )
    dq = tl.zeros((BLOCK_M, DEPTH), tl.float32)
    for phase in tl.static_range(3 if ONE_LOOP else (0 if LEFT else 1), 4 if ONE_LOOP else 3):
        if phase == 3:
            start, stop = first, last
        elif phase == 0:
            start, stop = first, whole_from
        elif phase == 1:
            start, stop = whole_from, whole_to
        else:
            start, stop = whole_to, last
        for n in range(start, stop, BLOCK_N):
            k = load_tile(
                k_ptr, batch, group, n, stride_kb, stride_kh, stride_kn, stride_kd, S, D, DEPTH,
                BLOCK_N, phase != 1, INT64, DESCRIPTORS,
            )  # fmt: skip
            if not CHUNKS:
                v = load_tile(
                    v_ptr, batch, group, n, stride_vb, stride_vh, stride_vn, stride_vd, S, DV,
                    VALUE_DEPTH, BLOCK_N, phase != 1, INT64, DESCRIPTORS,
                )  # fmt: skip
            ds = score_gradient(
                q_head, g_head, q, g, lse, delta, k_head, v_head, k, v, mask_rows, seed_ptr, scale,
                threshold, survivor, (batch * H + head).to(tl.int32), i, n, whole_from, whole_to,
                keys, L, S, low, high, stride_qm, stride_qd, stride_gm, stride_gd, stride_kn,
                stride_kd, stride_vn, stride_vd, stride_mn, D, DV, MASK, phase % 2 == 0, phase == 3,
                INT64, PRECISION, CHUNKS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_head = dq_ptr + batch * stride_dqb + head * stride_dqh
    store_rows(dq_head, dq * scale, i, stride_dqm, stride_dqd, L, D, DEPTH, INT64)
