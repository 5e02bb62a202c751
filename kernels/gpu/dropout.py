"""Which elements of a tile dropout keeps (kernels/dropout/reference.py has the definition)."""

import triton
import triton.language as tl

SMALL = tl.constexpr(1024)
"""Elements of a tile up to which it may have fewer quads than a program of 8 warps has threads."""


@triton.jit
def keep_tile(seed, outer, rows, first_column, THRESHOLD, COLUMNS: tl.constexpr):
    """Whether each element of a tile [rows, COLUMNS] is kept.

    Args:
        seed: int64 scalar.
        outer: int32 scalar.
        rows: [R] int32, the rows.
        first_column: the first column, a multiple of 4.
        THRESHOLD: int64 scalar up to 2³²; words below it are dropped.
        COLUMNS: a power of two, at least 4.
    """
    if rows.shape[0] * COLUMNS <= SMALL:
        return _keep_each(seed, outer, rows, first_column, THRESHOLD, COLUMNS)
    quads = first_column // 4 + tl.arange(0, COLUMNS // 4)
    w0, w1, w2, w3 = _words(seed, outer, rows, quads)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], COLUMNS))
    return words.to(tl.int64) >= THRESHOLD


@triton.jit
def _keep_each(seed, outer, rows, first_column, THRESHOLD, COLUMNS: tl.constexpr):
    """The same, where each element makes the four words of its quad and takes its own.

    Where a tile has fewer quads than a program has threads, several threads hold the same quad,
    and what Triton 3.6 made of joining those on an H100 was wrong (kernels/gpu/MEASURED.md).
    """
    columns = first_column + tl.arange(0, COLUMNS)
    w0, w1, w2, w3 = _words(seed, outer, rows, columns // 4)
    place = (columns % 4)[None, :]
    low, high = tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3)
    return tl.where(place < 2, low, high).to(tl.int64) >= THRESHOLD


@triton.jit
def _words(seed, outer, rows, quads):
    """Philox's four words of each row and quad of columns."""
    c0 = quads[None, :].to(tl.uint32) + tl.zeros((rows.shape[0], 1), tl.uint32)
    c1 = rows[:, None].to(tl.uint32) + tl.zeros_like(c0)
    c2 = tl.zeros_like(c0) + outer.to(tl.uint32)
    return tl.philox(seed, c0, c1, c2, tl.zeros_like(c0))
