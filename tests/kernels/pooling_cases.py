"""What the tests of pooling share: windows, images, and each operation with torch's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as TF

from nnarch import functional as F

# kernel_size, stride, padding, dilation, ceil_mode
MAX = {
    "stem of ResNet": (3, 2, 1, 1, False),
    "overlapping": (3, 1, 1, 1, False),
    "halves": (2, 2, 0, 1, False),
    "default stride": (2, None, 0, 1, True),
    "nothing symmetric": ((3, 2), (2, 1), (1, 0), (1, 2), True),
    "large, dilated": ((3, 4), (1, 2), (1, 2), (3, 2), False),
    "gaps between windows": (2, (3, 5), 1, 1, True),
    "first windows begin last": (2, 3, 1, 4, True),  # their first tap is padding
    "single pixels": (1, 2, 0, 1, False),
    "wide": ((1, 7), 1, (0, 3), 1, False),
    "whole image": ((9, 10), 1, 0, 1, False),
}
# kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
AVERAGE = {
    "halves": (2, 2, 0, False, True, None),
    "overlapping": (3, 1, 1, False, True, None),
    "padding not counted": (3, 1, 1, False, False, None),
    "strided": (3, 2, 1, False, True, None),
    "past the end": (3, 2, 1, True, True, None),
    "past the end, not counted": ((2, 3), (3, 2), (1, 1), True, False, None),
    "own divisor": (3, 2, 1, True, True, 5),
    "negative divisor": (2, None, 0, False, False, -3),
    "nothing symmetric": ((4, 2), (1, 3), (2, 0), False, True, None),
    "gaps between windows": (2, 5, 1, True, True, None),
    "whole image": ((9, 10), None, 0, False, True, None),
}
SIZES = [(2, 5, 9, 10), (0, 3, 9, 10), (3, 1, 13, 11), (1, 67, 17, 23)]
ADAPTIVE = [1, (3, 4), (9, 2), (4, 15), 7, (None, 3), (2, None), (None, None)]


def image(size, dtype=torch.float32, memory_format=torch.contiguous_format) -> Tensor:
    return torch.randn(size).to(dtype).contiguous(memory_format=memory_format)


def awkward_image(size, dtype, memory_format) -> Tensor:
    """Many ties, some infinities, and NaN alone and side by side."""
    x = torch.randint(-2, 3, size).to(dtype)
    infinity = float("inf")
    for value, rarity in ((-infinity, 5), (infinity, 29), (float("nan"), 23)):
        x[torch.randint(rarity, size) == 0] = value
    return x.contiguous(memory_format=memory_format)


def assert_same(actual, expected) -> None:
    """Equal values and positions, NaN equal to NaN, in torch's dtype."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_stride=False)


POOLS = {
    "max": (partial(F.max_pool2d, kernel_size=3, stride=2, padding=1),
            partial(TF.max_pool2d, kernel_size=3, stride=2, padding=1)),
    "adaptive max": (partial(F.adaptive_max_pool2d, output_size=(2, 3)),
                     partial(TF.adaptive_max_pool2d, output_size=(2, 3))),
    # Divisors that are powers of two: nothing is rounded.
    "average": (partial(F.avg_pool2d, kernel_size=(2, 3), padding=1, divisor_override=4),
                partial(TF.avg_pool2d, kernel_size=(2, 3), padding=1, divisor_override=4)),
    "adaptive average": (partial(F.adaptive_avg_pool2d, output_size=(4, 2)),
                         partial(TF.adaptive_avg_pool2d, output_size=(4, 2))),
    "global average": (partial(F.adaptive_avg_pool2d, output_size=1),
                       partial(TF.adaptive_avg_pool2d, output_size=1)),
}  # fmt: skip
each_pool = pytest.mark.parametrize(("ours", "theirs"), POOLS.values(), ids=POOLS)
