"""The pixels of a strided convolution's input, sorted by which taps reach them.

A pixel h meets tap r where h + padding - r·dilation is a multiple of the stride. The pixels of one
phase, (h + padding) mod stride, share their taps: every (stride / gcd(stride, dilation))-th from
the first. Gradients by the input work phase by phase and touch no tap in vain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl


def tap_steps(stride: Sequence[int], dilation: Sequence[int]) -> dict[str, int]:
    """Distance between the taps of a phase, as the constexpr arguments TAP_STEP_H and _W."""
    return {
        "TAP_STEP_H": stride[0] // math.gcd(stride[0], dilation[0]),
        "TAP_STEP_W": stride[1] // math.gcd(stride[1], dilation[1]),
    }


@triton.jit
def first_tap(phase, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """Least tap r with r·DILATION ≡ phase (mod STRIDE), or TAPS where none is."""
    first = phase * 0 + TAPS
    for i in tl.static_range(min(TAPS, STRIDE)):
        r = min(TAPS, STRIDE) - 1 - i
        first = tl.where(r * DILATION % STRIDE == phase, r, first)
    return first


@triton.jit
def phase_start(phase, PADDING: tl.constexpr, STRIDE: tl.constexpr):
    """The first pixel h >= 0 of a phase; the next are STRIDE apart."""
    return (phase + STRIDE - PADDING % STRIDE) % STRIDE


@triton.jit
def pixels_in(first, size, STRIDE: tl.constexpr):
    """How many pixels of [0, size) the phase that starts at `first` has."""
    return tl.maximum((size - first + STRIDE - 1) // STRIDE, 0)


@triton.jit
def output_under(
    h, tap, PADDING: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, TAPS: tl.constexpr
):
    """(h + PADDING - tap·DILATION) / STRIDE, exact, where the numerator may be negative.

    Integer division in Triton rounds to zero; a multiple of the stride on top avoids the question.
    """
    return (h + PADDING - tap * DILATION + TAPS * DILATION * STRIDE) // STRIDE - TAPS * DILATION
