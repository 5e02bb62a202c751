"""Attention's forward on the GPU: a program a tile of queries, online softmax over key tiles.

Few queries and many keys (decoding) fill a GPU only where the keys are split among programs: each
writes its own normalised output and log-sum-exp, and a second kernel weighs them. The query heads
that share a key head are stacked as rows of one tile there, so that keys are read once.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnarch.kernels.gpu.dropout import keep_tile
from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides
from nnarch.kernels.gpu.targets import current_target
from nnarch.kernels.gpu.tiles import Tile, pick

from . import reference
from .triton_call import LEAST_DESCRIBED, Call
from .triton_tables import DescribedTile, TileRow, attention_table, described, narrowed, padded
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

SPLIT_KEYS = 512
"""Keys of one part, at least; the parts depend on the shape alone."""
MOST_SPLITS = 64


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


# ------------------------------------------------------------------------------------ launching


def _shared(m: int, n: int, stages: int) -> int:
    return m + 2 * stages * n


_FORWARD_ROWS: dict[str, list[TileRow]] = dict(
    half=[
        (64, 128, 4, 3, 0, 64, 0, 1.30),
        (64, 32, 4, 3, 0, 64, 0, 1.44),
        (64, 64, 4, 3, 0, 128, 0, 1.45),
        (128, 64, 8, 3, 0, 128, 0, 1.56),
        (128, 64, 8, 2, 64, 128, 128),
        (64, 64, 8, 2, 256, 256, 128),
        (64, 32, 8, 2, 256, 256, 256),
        (64, 32, 8, 1, 256, 256, 256),
    ],
    tf32=[
        (128, 32, 8, 2, 0, 128, 0),
        (64, 64, 8, 2, 0, 128, 0),
        (64, 32, 8, 2, 128, 128, 0),
        (64, 32, 8, 1, 256, 256, 0),
    ],
    tf32x3=[
        (64, 64, 4, 2, 0, (64, 0), 0, 1.30),
        (64, 32, 4, 1, 0, (128, 0), 0, 1.55),
        (64, 64, 8, 1, 0, (0, 128), 0),
        (64, 32, 8, 1, 128, 256, 0),
        (64, 16, 8, 1, 256, 256, 0),
    ],
    ieee=[(64, 32, 8, 1, 256, 256, 256), (32, 32, 4, 1, 256, 256, 256)],
)
FORWARD = attention_table(
    "attention",
    _shared,
    128,
    described=[
        DescribedTile((64, 64, 4, 3), 64, 1.14, registers=128),
        DescribedTile((64, 64, 4, 3), 128, 1.37, one_loop=False),
    ],
    **_FORWARD_ROWS,
)
FORWARD_MASKED = attention_table(
    "attention_masked",
    _shared,
    128,
    **narrowed(
        _FORWARD_ROWS,
        half={
            (64, 128, 4, 3): (0, 0, 0),
            (64, 64, 4, 3): (0, 64, 0),
            (128, 64, 8, 3): (0, 64, 0),
            (128, 64, 8, 2): (0, (64, 128), 0),  # boolean masks: 16 bytes on sm_90
            (64, 64, 8, 2): (256, (0, 128), 64),
            (64, 32, 8, 2): (256, ({256}, 256), 256),
            (64, 32, 4, 2): (0, (128, 0), 0),
        },
        tf32={(64, 64, 8, 2): (0, 64, 0)},
        tf32x3={
            (64, 64, 4, 2): (0, 0, 0),
            (64, 32, 8, 1): (0, 0, 0),
            (64, 16, 8, 1): (128, 128, 0),
            (32, 16, 8, 1): (256, 256, 0),
        },
    ),
)
DECODE = attention_table(
    "attention_decode",
    _shared,
    128,
    half=[
        (16, 128, 4, 2, 128, 128, 128),
        (16, 64, 4, 2, 256, 256, 256),
        (16, 32, 4, 2, 256, 256, 256),
    ],
    tf32=[(16, 64, 4, 2, 128, 128, 0), (16, 32, 4, 2, 128, 128, 0), (16, 32, 4, 1, 256, 256, 0)],
    tf32x3=[
        (16, 64, 4, 2, 128, 128, 0),
        (16, 32, 4, 2, 128, 128, 0),
        (16, 32, 4, 1, 256, 256, 0),
        (16, 16, 4, 1, 256, 256, 0),
    ],
    ieee=[(16, 32, 4, 1, 256, 256, 256), (16, 16, 4, 1, 256, 256, 256)],
)
FEW_ROWS = 16
"""Rows up to which the keys may be split, and the heads of a group stacked."""


def forward(call: Call, value: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the forward; nothing is empty. `value` is the call's."""
    query, batch, heads, length, keys = call.query, call.batch, call.heads, call.length, call.keys
    share = heads // call.groups
    out = reference.new_output(query, value)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    stack = share if length * share <= FEW_ROWS and call.seed is None else 1
    few = length * stack <= FEW_ROWS
    parts = _parts(batch * heads // stack, keys) if few else 1
    part_keys = cdiv(cdiv(keys, parts), SPLIT_KEYS) * SPLIT_KEYS
    parts = cdiv(keys, part_keys)
    into, into_lse = out, lse
    if parts > 1:
        into = query.new_empty((parts, *out.shape), dtype=torch.float32)
        into_lse = lse.new_empty((parts, *lse.shape))
    products, problem = call.products(128, LEAST_DESCRIBED)
    problem = dataclasses.replace(problem, m=length * stack)
    arguments = {
        **call.arguments(),
        **{"out_ptr": into, "lse_ptr": into_lse, "B": batch, "LEFT": call.left},
        **{"part_keys": part_keys, "STACK": stack},
        **{"DESCRIPTORS": False, "ONE_LOOP": False},
        "LATE_SCALE": call.scale > 0 and (call.mask is None or call.mask.dtype == torch.bool),
        **named_strides("o", "bhmd", into if parts == 1 else into[0]),
        "stride_op": into.stride(0) if parts > 1 else 0,
        **products,
    }

    def run(tile: Tile) -> None:
        programs = cdiv(length * stack, tile["BLOCK_M"]) * batch * (heads // stack)
        found = described(tile, {"q_ptr": query, "k_ptr": call.key, "v_ptr": value})
        launch(_attention_fwd_kernel, (*flat_grid(programs), parts), arguments | found, tile)

    table = DECODE if few else FORWARD_MASKED if call.masked else FORWARD
    run(pick(table, problem, run))
    if parts > 1:
        _combine(into, into_lse, out, lse, parts)
    return out, lse


def _parts(programs: int, keys: int) -> int:
    """Into how many parts of the keys a decoding step is split: two waves of programs at most."""
    wanted = cdiv(2 * current_target().processors, programs)
    return max(1, min(wanted, cdiv(keys, SPLIT_KEYS), MOST_SPLITS))


def _combine(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, count: int) -> None:
    arguments = {
        **{"parts_ptr": parts, "part_lse_ptr": part_lse, "out_ptr": out, "lse_ptr": lse},
        **{"R": lse.numel(), "H": out.shape[1], "L": out.shape[2]},
        **named_strides("o", "bhmd", out),
        **{"PARTS": count, "PADDED": triton.next_power_of_2(count)},
        **{"DV": out.shape[3], "VALUE_DEPTH": padded(out.shape[3])},
    }
    launch(_attention_combine_kernel, flat_grid(lse.numel()), arguments)
