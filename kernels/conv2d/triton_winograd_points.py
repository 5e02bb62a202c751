"""Winograd's transforms for Triton kernels: the matrices, and their products with tiles of pixels.

The matrices are those of winograd_points.h, from the same points: `y = Aᵀ[(G g) ∘ (Bᵀ d)]` gives m
outputs of a filter of 3 taps from m + 2 inputs. They reach the kernels as constexpr tuples, so a
coefficient of 0 costs nothing and one of 1 no multiplication.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

Matrix = tuple[tuple[float, ...], ...]

TAPS = 3
POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.625, -0.625, 1.5, -1.5)}
"""The finite points of F(m, 3) by m; the last one, infinity, is understood."""


@dataclass(frozen=True)
class Winograd:
    """The matrices of F(m, 3); a row or column of each belongs to a point.

    Attributes:
        tile: m, outputs on a side of a tile.
        input: Bᵀ [m + 2, m + 2].
        weight: G [m + 2, 3].
        output: Aᵀ [m, m + 2].
        grad: G of a filter of m taps [m + 2, m]: a tile of the output's gradient.
        weight_grad: Aᵀ to 3 outputs [3, m + 2]: the gradient of the filter.
    """

    tile: int
    input: Matrix
    weight: Matrix
    output: Matrix
    grad: Matrix
    weight_grad: Matrix

    @property
    def size(self) -> int:
        """Inputs, and products, on a side of a tile."""
        return self.tile + TAPS - 1


@functools.cache
def winograd(tile: int) -> Winograd:
    """The matrices of F(tile, 3)."""
    points = POINTS[tile]
    return Winograd(
        tile=tile,
        input=tuple(_polynomial(points, i) for i in range(len(points) + 1)),
        weight=_powers(points, TAPS, scaled=True),
        output=_transposed(_powers(points, tile, scaled=False)),
        grad=_powers(points, tile, scaled=True),
        weight_grad=_transposed(_powers(points, TAPS, scaled=False)),
    )


def _polynomial(points: tuple[float, ...], skipped: int) -> tuple[float, ...]:
    """Coefficients, constant first, of Π (x − p) over all points but one (none for infinity)."""
    row = [1.0] + [0.0] * len(points)
    for j, point in enumerate(points):
        if j != skipped:
            row = [below - point * here for below, here in zip([0.0, *row], row, strict=False)]
    return tuple(row)


def _powers(points: tuple[float, ...], count: int, scaled: bool) -> Matrix:
    """1, p, p², … of each point (`scaled`: over Π (p − others)); at infinity the last alone."""
    rows = []
    for i, point in enumerate(points):
        scale = 1.0
        for j, other in enumerate(points):
            scale *= point - other if scaled and j != i else 1.0
        rows.append(tuple(point**k / scale for k in range(count)))
    return (*rows, (0.0,) * (count - 1) + (1.0,))


def _transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


# ------------------------------------------------------------------------------- in a kernel


@triton.jit
def _row(values, first: tl.constexpr, step: tl.constexpr, MATRIX: tl.constexpr, row: tl.constexpr):
    """Σ MATRIX[row][j]·values[first + j·step]. (Triton 3.6 takes no part of a constexpr tuple.)"""
    total = None
    for j in tl.static_range(len(MATRIX[0])):
        if MATRIX[row][j] != 0:
            value = values[first + j * step]
            term = value if MATRIX[row][j] == 1 else value * MATRIX[row][j]
            total = term if total is None else total + term
    return total


@triton.jit
def transform(values, MATRIX: tl.constexpr):
    """MATRIX · values · MATRIXᵀ for a square of tensors: `values` is a tuple of them, by rows."""
    n: tl.constexpr = len(MATRIX[0])
    columns = ()
    for i in tl.static_range(len(MATRIX)):
        for j in tl.static_range(n):
            columns = columns + (_row(values, j, n, MATRIX, i),)
    result = ()
    for i in tl.static_range(len(MATRIX)):
        for j in tl.static_range(len(MATRIX)):
            result = result + (_row(columns, i * n, 1, MATRIX, j),)
    return result


@triton.jit
def beyond(h, w, H, W, SIZE: tl.constexpr):
    """The rows and columns of a square at (h, w) that lie outside the image: bits 0…, and 8…."""
    bits = h * 0
    for i in tl.static_range(SIZE):
        bits |= tl.where((h + i < 0) | (h + i >= H), 1 << i, 0)
        bits |= tl.where((w + i < 0) | (w + i >= W), 256 << i, 0)
    return bits.to(tl.int32)


@triton.jit
def square(x_ptr, offset, outside, stride_xh, stride_xw, SIZE: tl.constexpr):
    """SIZE² pixels a tile and channel: a tuple, by rows, of tensors in float32; 0 in the padding.

    Args:
        x_ptr: the image.
        offset: of the first pixel, for each tile and channel.
        outside: bits of :func:`beyond`, or -1 for none at all. Kept as masks and as an address for
            each pixel, they would take most of the registers.
        stride_xh, stride_xw: of the image.
        SIZE: pixels on a side.
    """
    pixels = ()
    for i in tl.static_range(SIZE):
        for j in tl.static_range(SIZE):
            mask = (outside & ((1 << i) | (256 << j))) == 0
            pixel = tl.load(x_ptr + (i * stride_xh + j * stride_xw) + offset, mask=mask, other=0.0)
            pixels = pixels + (pixel.to(tl.float32),)
    return pixels
