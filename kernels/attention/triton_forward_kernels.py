"""The kernels of attention's forward: a program a tile of queries, online softmax over key tiles.

Arguments that are not explained are those of triton_call.py; `triton_forward.py` launches them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nnarch.kernels.gpu.dropout import keep_tile

from .triton_tiles import (
    LN2,
    LOG2E,
    at_edges,
    key_tiles,
    load_tile,
    restrict,
    row_products,
    sequence_keys,
)


@triton.jit
def _attention_fwd_kernel(
    q_ptr,  # [B, H, L, D], any strides
    k_ptr,  # [B, G, S, D], any strides
    v_ptr,  # [B, G, S, DV], any strides
    mask_ptr,  # broadcasts to [B, H, L, S] by its strides, or None
    lengths_ptr,  # [B] int64, or None
    seed_ptr,  # [1] int64, or None
    out_ptr,  # [B, H, L, DV], any strides; [parts, B, H, L, DV] where keys are split
    lse_ptr,  # [B, H, L]; [parts, B, H, L]
    scale,
    threshold,
    survivor,
    B,
    H,
    L,
    S,
    SHARE,  # query heads for each key head
    low,
    high,
    part_keys,  # keys of one part
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
    stride_mb,
    stride_mh,
    stride_mm,
    stride_mn,
    stride_ob,
    stride_oh,
    stride_om,
    stride_od,
    stride_op,
    STACK: tl.constexpr,  # heads stacked as rows of a program
    D: tl.constexpr,
    DV: tl.constexpr,
    DEPTH: tl.constexpr,
    VALUE_DEPTH: tl.constexpr,
    MASK: tl.constexpr,
    LEFT: tl.constexpr,  # whether `low` restricts
    LATE_SCALE: tl.constexpr,  # scores are kept unscaled: nothing is added to them, the scale > 0
    INT64: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # q, k and v are read by descriptors; nothing is stacked
    ONE_LOOP: tl.constexpr,  # the band's edges are looked for in every tile
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = L * STACK
    tiles = tl.cdiv(rows, BLOCK_M)
    slot = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles  # under causality the last has the most to do
    batch, first_head = slot // (H // STACK), slot % (H // STACK) * STACK
    batch64 = batch.to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if STACK == 1:
        head, i = first_head + row * 0, row
        i_first, i_last = tile * BLOCK_M, tl.minimum(tile * BLOCK_M + BLOCK_M, L) - 1
    else:
        head, i = first_head + row // L, row % L
        i_first, i_last = 0, L - 1
    if INT64:
        head, i = head.to(tl.int64), i.to(tl.int64)
    inside, d = row < rows, tl.arange(0, DEPTH)
    key_head = first_head // SHARE
    if DESCRIPTORS:
        q = load_tile(
            q_ptr, batch, first_head, i_first, stride_qb, stride_qh, stride_qm, stride_qd, L, D,
            DEPTH, BLOCK_M, True, INT64, DESCRIPTORS,
        )  # fmt: skip
    else:
        q_rows = q_ptr + batch64 * stride_qb + head * stride_qh + i * stride_qm
        q_mask = inside[:, None] & (d < D)[None, :]
    if CHUNKS:
        k_head = k_ptr + batch64 * stride_kb + key_head.to(tl.int64) * stride_kh
    elif not DESCRIPTORS:
        q = tl.load(q_rows[:, None] + d[None, :] * stride_qd, mask=q_mask, other=0.0)
    if MASK != 0:
        mask_rows = mask_ptr + batch64 * stride_mb + (head * stride_mh + i * stride_mm)[:, None]
    else:
        mask_rows = None
    keys = sequence_keys(lengths_ptr, batch, S)
    part = tl.program_id(1)
    begin, end = part * part_keys, tl.minimum(keys, (part + 1) * part_keys)
    first, whole_from, whole_to, last = key_tiles(i_first, i_last, begin, end, low, high, BLOCK_N)

    unit = scale * LOG2E
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, VALUE_DEPTH), tl.float32)
    # Tiles cut on the left, whole, cut; or all of them.
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
            j = n + tl.arange(0, BLOCK_N)
            if CHUNKS:
                k_rows = k_head + (j.to(tl.int64) if INT64 else j) * stride_kn
                s = row_products(
                    q_rows,
                    inside,
                    stride_qd,
                    k_rows,
                    j < S,
                    stride_kd,
                    D,
                    BLOCK_M,
                    BLOCK_N,
                    PRECISION,
                )
            else:
                k = load_tile(
                    k_ptr, batch, key_head, n, stride_kb, stride_kh, stride_kn, stride_kd, S, D,
                    DEPTH, BLOCK_N, phase != 1, INT64, DESCRIPTORS,
                )  # fmt: skip
                s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if not LATE_SCALE:
                s *= scale * LOG2E
            if phase == 3:
                s = at_edges(
                    s, n, whole_from, whole_to, i[:, None], j[None, :], keys, low, high,
                    float("-inf"),
                )  # fmt: skip
            s = restrict(
                s, i[:, None], j[None, :], mask_rows, stride_mn, keys, L, S, low, high, MASK,
                phase % 2 == 0, INT64,
            )  # fmt: skip
            new_m = tl.maximum(m, tl.max(s, 1))
            if LATE_SCALE:  # one multiply-add a score
                base = tl.where(new_m == float("-inf"), 0.0, new_m * unit)
                p = tl.exp2(s * unit - base[:, None])
                shrink = tl.exp2(m * unit - base)
            else:
                base = tl.where(new_m == float("-inf"), 0.0, new_m)
                p = tl.exp2(s - base[:, None])
                shrink = tl.exp2(m - base)
            total = total * shrink + tl.sum(p, 1)
            m = new_m
            if seed_ptr is not None:
                keep = keep_tile(
                    tl.load(seed_ptr), batch * H + first_head, row, n, threshold, BLOCK_N
                )
                p = tl.where(keep, p * survivor, 0.0)
            v = load_tile(
                v_ptr, batch, key_head, n, stride_vb, stride_vh, stride_vn, stride_vd, S, DV,
                VALUE_DEPTH, BLOCK_N, phase != 1, INT64, DESCRIPTORS,
            )  # fmt: skip
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)

    nothing = m == float("-inf")
    total = tl.where(nothing, 1.0, total)
    acc = acc / total[:, None]
    if LATE_SCALE:
        m *= unit
    lse = tl.where(nothing, float("-inf"), (m + tl.log2(total)) * LN2)
    d = tl.arange(0, VALUE_DEPTH)
    tl.store(
        out_ptr
        + part.to(tl.int64) * stride_op
        + batch64 * stride_ob
        + (head * stride_oh + i * stride_om)[:, None]
        + d[None, :] * stride_od,
        acc.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (d < DV)[None, :],
    )
    at = ((part.to(tl.int64) * B + batch64) * H + head) * L + i
    tl.store(lse_ptr + at, lse, mask=inside)


@triton.jit
def _attention_combine_kernel(
    parts_ptr,  # [PARTS, R, DV] float32, R rows of all heads
    part_lse_ptr,  # [PARTS, R]
    out_ptr,  # [B, H, L, DV], any strides
    lse_ptr,  # [R]
    R,
    H,
    L,
    stride_ob,
    stride_oh,
    stride_om,
    stride_od,
    PARTS: tl.constexpr,
    PADDED: tl.constexpr,  # PARTS rounded up to a power of two
    DV: tl.constexpr,
    VALUE_DEPTH: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    part, d = tl.arange(0, PADDED), tl.arange(0, VALUE_DEPTH)
    lse = tl.load(part_lse_ptr + part * R + r, mask=part < PARTS, other=float("-inf"))
    m = tl.max(lse, 0)
    weight = tl.exp(lse - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(weight, 0)
    at = (part[:, None].to(tl.int64) * R + r) * DV + d[None, :]
    inside = (part < PARTS)[:, None] & (d < DV)[None, :]
    out = tl.sum(tl.load(parts_ptr + at, mask=inside, other=0.0) * weight[:, None], 0)
    nothing = m == float("-inf")
    total = tl.where(nothing, 1.0, total)
    out = out / total
    batch, head, i = r // L // H, r // L % H, r % L
    at = batch * stride_ob + head * stride_oh + i * stride_om + d * stride_od
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=d < DV)
    tl.store(lse_ptr + r, tl.where(nothing, float("-inf"), m + tl.log(total)))
