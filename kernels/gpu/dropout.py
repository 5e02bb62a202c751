"""Which elements of a tile dropout keeps (kernels/dropout/reference.py has the definition)."""

import triton
import triton.language as tl


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
    quads = first_column // 4 + tl.arange(0, COLUMNS // 4)
    c0 = quads[None, :].to(tl.uint32) + tl.zeros((rows.shape[0], 1), tl.uint32)
    c1 = rows[:, None].to(tl.uint32) + tl.zeros_like(c0)
    c2 = tl.zeros_like(c0) + outer.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0))
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], COLUMNS))
    return words.to(tl.int64) >= THRESHOLD
