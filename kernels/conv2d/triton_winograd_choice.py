"""When a convolution on the GPU runs by Winograd's algorithm: predicted times, compared.

Each kernel takes the longer of its arithmetic and its memory traffic, as in kernels/gpu/survey.py.
Little of it was measured: that is why Winograd has to win by a third. It only ever runs in float32
without loss, on vector units. In float16, bfloat16 and TF32 the direct product ends up at the
bandwidth of the memory that Winograd would use several times over, and 10 bits of mantissa do not
survive its transforms. Against the three TF32 products of ADR 9 it still has to be weighed: an H100
runs 256 channels at 14×14, batch 32, in 132 µs directly and in more than 360 by 2×2 tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nnarch.kernels.gpu import targets
from nnarch.kernels.gpu.launch import cdiv, dot_precision
from nnarch.kernels.gpu.targets import Target
from nnarch.precision import get_precision

# The share of its peak that each product reaches. For "ieee" the share of multiply-adds among the
# instructions of its loop, compiled for sm_90: the direct one is the 64×64×16 tile of MATMUL_TILES.
# For "tf32x3" from an H100: the direct product ran at 56 of 165 TFLOP/s; on vector units the fused
# kernel at 9 of 67, a product of two row-major matrices at 43 (64×64×16, 4 warps).
_SHARES = {
    "ieee": {"direct": 0.72, "weight_grad": 0.64, "fused": 0.70, "products": 0.80},
    "tf32x3": {"direct": 0.34, "weight_grad": 0.34, "fused": 0.14, "products": 0.64},
}
_STREAMED = 0.8  # of the bandwidth, by the transforms: an assumption
_LAUNCH = 3e-6  # seconds between dependent kernels: an assumption
_LEAST_GAIN = 1.5
_LEAST_CHANNELS = 16  # of a group, in and out: blocks would be half empty
_MOST_WORKSPACE = 2**28  # float32 values: transformed images and products, 1 GiB
_MOST_WEIGHT = 2**26  # values of a transformed weight, as on the CPU


@dataclass(frozen=True)
class Work:
    """A 3×3 convolution with stride 1, or the gradient that is one.

    Attributes:
        n: images.
        h, w: of the output.
        depth: input channels of a group.
        columns: output channels of a group.
        groups: of the convolution.
    """

    n: int
    h: int
    w: int
    depth: int
    columns: int
    groups: int = 1

    @property
    def pixels(self) -> int:
        """Of all outputs."""
        return self.n * self.h * self.w

    @property
    def image_values(self) -> int:
        """Of input and output, taken to be of one size."""
        return self.pixels * self.groups * (self.depth + self.columns)

    def tiles(self, m: int) -> int:
        """Of m × m outputs."""
        return self.n * cdiv(self.h, m) * cdiv(self.w, m)

    def transformed_values(self, m: int) -> int:
        """Of both images, transformed."""
        return (m + 2) ** 2 * self.tiles(m) * self.groups * (self.depth + self.columns)

    def weight_values(self, m: int) -> int:
        """Of the transformed weight."""
        return (m + 2) ** 2 * self.groups * self.depth * self.columns


def _math(multiply_adds: float, product: str, target: Target) -> float:
    exact = target.dot_precisions[0]
    direct = product in ("direct", "weight_grad")
    peak = target.tflops[exact if direct else "ieee"]
    return 2 * multiply_adds / (peak * 1e12 * _SHARES[exact][product])


def _memory(values: float, target: Target, share: float = 1.0) -> float:
    return 4 * values / (target.gigabytes_per_s * 1e9 * share)


def _waves(programs: int, target: Target) -> float:
    """Time of whole waves of programs over that of busy processors."""
    return cdiv(programs, target.processors) * target.processors / programs


def _whole(value: int, block: int) -> int:
    return cdiv(value, block) * block


def direct_seconds(work: Work, target: Target, product: str = "direct") -> float:
    """Of the implicit product, or of `product`. Its reduction is split: no wave is short."""
    rows, columns = _whole(work.pixels, 32), _whole(work.columns, 32)
    products = work.groups * rows * columns * 9 * _whole(work.depth, 16)
    moved = work.image_values + 9 * work.groups * work.depth * work.columns
    return max(_math(products, product, target), _memory(moved, target)) + _LAUNCH


def _weight_seconds(work: Work, m: int, target: Target) -> float:
    values = work.weight_values(m) + 9 * work.groups * work.depth * work.columns
    return _memory(values, target, _STREAMED) + _LAUNCH


def fused_seconds(work: Work, target: Target) -> float:
    """Of F(2×2, 3×3) in one kernel."""
    rows, columns = cdiv(work.tiles(2), 32), cdiv(work.columns, 32)
    programs = work.groups * rows * columns
    products = programs * 16 * 32 * 32 * _whole(work.depth, 8)
    math = _math(products, "fused", target) * _waves(programs, target)
    moved = work.image_values + work.weight_values(2)
    return max(math, _memory(moved, target)) + _LAUNCH + _weight_seconds(work, 2, target)


def _products_seconds(rows: int, columns: int, depth: int, groups: int, target: Target) -> float:
    """Of 36 products of matrices."""
    programs = 36 * groups * cdiv(rows, 64) * cdiv(columns, 64)
    math = _math(programs * 64 * 64 * _whole(depth, 16), "products", target)
    moved = 36 * groups * (rows * columns + rows * depth + depth * columns)
    return max(math * _waves(programs, target), _memory(moved, target)) + _LAUNCH


def tiled_seconds(work: Work, target: Target) -> float:
    """Of F(4×4, 3×3) by way of memory."""
    streamed = work.image_values + work.transformed_values(4)
    products = _products_seconds(work.tiles(4), work.columns, work.depth, work.groups, target)
    transforms = _memory(streamed, target, _STREAMED) + 2 * _LAUNCH
    return products + transforms + _weight_seconds(work, 4, target)


def weight_grad_seconds(work: Work, target: Target) -> float:
    """Of the gradient of the weight by F(3×3, 4×4). Its depth is split: no wave is short."""
    streamed = work.image_values + work.transformed_values(4)
    rows, columns = _whole(work.columns, 64), _whole(work.depth, 64)
    products = 36 * work.groups * rows * columns * _whole(work.tiles(4), 16)
    read = work.transformed_values(4) + work.weight_values(4)
    math = max(_math(products, "products", target), _memory(read, target))
    written = _memory(2 * work.weight_values(4), target, _STREAMED)
    return math + _memory(streamed, target, _STREAMED) + written + 4 * _LAUNCH


def fastest_tile(work: Work, target: Target) -> int:
    """2 or 4, or 0 for the direct product: the least of the predicted times."""
    predicted = {0: direct_seconds(work, target) / _LEAST_GAIN}
    if work.weight_values(2) <= _MOST_WEIGHT:
        predicted[2] = fused_seconds(work, target)
    if work.weight_values(4) <= _MOST_WEIGHT and work.transformed_values(4) <= _MOST_WORKSPACE:
        predicted[4] = tiled_seconds(work, target)
    return min(predicted, key=predicted.__getitem__)


def transforms_weight_grad(work: Work, target: Target) -> bool:
    """Whether the gradient of the weight goes by Winograd's algorithm."""
    if work.transformed_values(4) > _MOST_WORKSPACE or work.weight_values(4) > _MOST_WEIGHT:
        return False
    direct = direct_seconds(work, target, "weight_grad")
    return weight_grad_seconds(work, target) * _LEAST_GAIN < direct


def may_transform(
    dtype: torch.dtype,
    weight_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether Winograd's algorithm can run, and whether the user lets it.

    ``nnarch.set_precision("highest")`` forbids it, and so does a request for TF32.
    """
    return (
        dtype == torch.float32
        and tuple(weight_size[2:]) == (3, 3)
        and tuple(stride) == tuple(dilation) == (1, 1)
        and get_precision() != "highest"
        and dot_precision("conv") != "tf32"
    )


def choose_tile(work: Work) -> int:
    """:func:`fastest_tile` on the GPU in use."""
    return fastest_tile(work, targets.current_target()) if _has_work(work) else 0


def choose_weight_grad(work: Work) -> bool:
    """:func:`transforms_weight_grad` on the GPU in use."""
    return _has_work(work) and transforms_weight_grad(work, targets.current_target())


def _has_work(work: Work) -> bool:
    return min(work.n, work.h, work.w) > 0 and min(work.depth, work.columns) >= _LEAST_CHANNELS
