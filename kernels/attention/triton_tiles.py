"""What attention's Triton kernels share: rows of a head, the band's tiles, and who sees whom."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2
"""The constexpr MASK."""


@triton.jit
def load_tile(
    source,  # a pointer to [B, H, LENGTH, D] with any strides, or the tensor's descriptor
    batch,
    head,
    first,
    stride_b,
    stride_h,
    stride_row,
    stride_d,
    LENGTH,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GUARD: tl.constexpr,
    INT64: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """The rows first … first + BLOCK - 1 of a head: [BLOCK, DEPTH], zero outside.

    A descriptor needs no guards and no registers for addresses.
    """
    if DESCRIPTORS:
        rows = source.load([batch.to(tl.int32), head.to(tl.int32), first, 0])
        return tl.reshape(rows, (BLOCK, DEPTH))
    else:
        ptr = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        rows = first + tl.arange(0, BLOCK)
        return load_rows(ptr, rows, stride_row, stride_d, LENGTH, D, DEPTH, GUARD, INT64)


@triton.jit
def load_row_values(
    source, batch, head, H, first, L, BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """Values of the rows first … first + BLOCK - 1 of a head: of [B, H, L], contiguous."""
    if DESCRIPTORS:
        found = source.load([batch.to(tl.int32), head.to(tl.int32), first])
        return tl.reshape(found, (BLOCK,))
    else:
        i = first + tl.arange(0, BLOCK)
        return tl.load(source + (batch * H + head) * L + i, mask=i < L, other=0.0)


@triton.jit
def load_rows(
    ptr,  # of a head: [LENGTH, D], any strides
    rows,
    stride_row,
    stride_d,
    LENGTH,
    D: tl.constexpr,
    DEPTH: tl.constexpr,  # D rounded up to a power of two
    GUARD: tl.constexpr,  # whether rows may lie beyond LENGTH
    INT64: tl.constexpr,
):
    """A tile [rows, DEPTH], zero outside."""
    d = tl.arange(0, DEPTH)
    if INT64:
        rows = rows.to(tl.int64)
    at = ptr + rows[:, None] * stride_row + d[None, :] * stride_d
    if GUARD:
        return tl.load(at, mask=(rows < LENGTH)[:, None] & (d < D)[None, :], other=0.0)
    if D != DEPTH:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def store_rows(
    ptr, tile, rows, stride_row, stride_d, LENGTH, D: tl.constexpr, DEPTH: tl.constexpr,
    INT64: tl.constexpr,
):  # fmt: skip
    """The reverse of :func:`load_rows`, guarded."""
    d = tl.arange(0, DEPTH)
    inside = (rows < LENGTH)[:, None] & (d < D)[None, :]
    if INT64:
        rows = rows.to(tl.int64)
    at = ptr + rows[:, None] * stride_row + d[None, :] * stride_d
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def store_shared(
    ptr, slot, tile, tile_m, tile_n, L, S, ONE_ROW: tl.constexpr, ONE_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of the contiguous [slots, L or 1, S or 1], summed over the rows or columns that all
    share."""
    i, j = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_count, column_count = (1 if ONE_ROW else L), (1 if ONE_COLUMN else S)
    out = ptr + slot.to(tl.int64) * row_count * column_count
    if ONE_ROW and ONE_COLUMN:
        tl.store(out, tl.sum(tl.sum(tile, 1), 0).to(out.dtype.element_ty))
    elif ONE_ROW:
        tl.store(out + j, tl.sum(tile, 0).to(out.dtype.element_ty), mask=j < S)
    elif ONE_COLUMN:
        tl.store(out + i, tl.sum(tile, 1).to(out.dtype.element_ty), mask=i < L)
    else:
        at = out + i[:, None].to(tl.int64) * S + j[None, :]
        inside = (i < L)[:, None] & (j < S)[None, :]
        tl.store(at, tile.to(out.dtype.element_ty), mask=inside)


@triton.jit
def row_products(
    a_rows,  # pointers to the rows of one operand, [M]
    a_inside,
    stride_ad,
    b_rows,  # and of the other, [N]
    b_inside,
    stride_bd,
    D: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a·bᵀ from memory, some columns at a time: where no matrix instruction multiplies, a thread
    holds its rows of both operands, and whole heads would not fit its registers."""
    acc = tl.zeros((M, N), tl.float32)
    # Unrolled, the loads of all chunks are in flight at a time; a bound that is not known (the
    # third axis has one program) keeps wide heads' loop, and their registers, from that.
    end = D if D <= 64 else D + tl.program_id(2)
    for first in range(0, end, 32):
        d = first + tl.arange(0, 32)
        a_mask, b_mask = a_inside[:, None] & (d < D)[None, :], b_inside[:, None] & (d < D)[None, :]
        a = tl.load(a_rows[:, None] + d[None, :] * stride_ad, mask=a_mask, other=0.0)
        b = tl.load(b_rows[:, None] + d[None, :] * stride_bd, mask=b_mask, other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    return acc


@triton.jit
def sequence_keys(lengths_ptr, batch, S):
    """How many keys a sequence has."""
    keys = S
    if lengths_ptr is not None:
        keys = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), S).to(tl.int32)
    return keys


@triton.jit
def key_tiles(i_first, i_last, begin, end, low, high, BLOCK_N: tl.constexpr):
    """Where the key tiles of some queries begin, are whole from and to, and end.

    Args:
        i_first, i_last: the queries.
        begin, end: the keys that exist; `begin` is a multiple of BLOCK_N.
        low, high: of the band.

    Returns:
        Four positions that rise; in the middle part every query sees every key of a tile.
    """
    first = tl.maximum(begin, (tl.maximum(i_first + low, 0) // BLOCK_N) * BLOCK_N)
    last = tl.maximum(first, tl.minimum(end, i_last + high + 1))
    whole_from = tl.cdiv(tl.maximum(i_last + low, first), BLOCK_N) * BLOCK_N
    whole_from = tl.minimum(whole_from, first + tl.cdiv(last - first, BLOCK_N) * BLOCK_N)
    whole_to = tl.maximum(tl.minimum(end, i_first + high + 1), 0) // BLOCK_N * BLOCK_N
    return first, whole_from, tl.maximum(whole_to, whole_from), last


@triton.jit
def query_tiles(j_first, j_last, keys, L, low, high, BLOCK_M: tl.constexpr):
    """The same for the query tiles of the keys j_first … j_last, where `keys` exist."""
    first = tl.maximum(j_first - high, 0) // BLOCK_M * BLOCK_M
    last = tl.maximum(first, tl.minimum(L, tl.minimum(j_last, keys - 1) - low + 1))
    last = tl.where(j_first < keys, last, first)
    whole_from = tl.cdiv(tl.maximum(j_last - high, first), BLOCK_M) * BLOCK_M
    whole_from = tl.minimum(whole_from, first + tl.cdiv(last - first, BLOCK_M) * BLOCK_M)
    whole_to = tl.maximum(tl.minimum(L, j_first - low + 1), 0) // BLOCK_M * BLOCK_M
    whole_to = tl.where(j_last < keys, whole_to, whole_from)
    return first, whole_from, tl.maximum(whole_to, whole_from), last


@triton.jit
def within_band(tile, i, j, keys, low, high, outside):
    """The tile's values, and another outside the band and beyond the keys."""
    return tl.where((j - i >= low) & (j - i <= high) & (j < keys), tile, outside)


@triton.jit
def at_edges(tile, first, whole_from, whole_to, i, j, keys, low, high, outside):
    """:func:`within_band` for tiles that begin outside whole_from … whole_to; no cost inside."""
    if (first < whole_from) | (first >= whole_to):
        tile = within_band(tile, i, j, keys, low, high, outside)
    return tile


@triton.jit
def restrict(
    scores,  # [M, N] or [N, M], in units of log 2
    i,  # queries and keys, shaped to broadcast with the scores
    j,
    mask_rows,  # the mask's pointer to the first key of each query, shaped as i; or None
    stride_mn,
    keys,
    L,
    S,
    low,
    high,
    MASK: tl.constexpr,
    BANDED: tl.constexpr,  # whether some query of the tile may not see some key
    INT64: tl.constexpr,
):
    """The scores with the mask added, and -inf where a query does not see a key."""
    if BANDED:
        scores = within_band(scores, i, j, keys, low, high, float("-inf"))
    if MASK != 0:
        column = j.to(tl.int64) if INT64 else j
        at, inside = mask_rows + column * stride_mn, (i < L) & (j < S)
        if MASK == 1:
            scores = tl.where(tl.load(at, mask=inside, other=0) != 0, scores, float("-inf"))
        else:
            scores += tl.load(at, mask=inside, other=0.0).to(tl.float32) * LOG2E
    return scores


@triton.jit
def exponents(lse):
    """A log-sum-exp in units of log 2, and 0 where a query sees nothing: its scores are -inf."""
    return tl.where(lse == float("-inf"), 0.0, lse * LOG2E)
