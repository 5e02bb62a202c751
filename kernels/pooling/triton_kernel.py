"""The Triton launchers of the pooling operations, and the shapes they are compiled for in CI.

Maximum pooling is in triton_max.py and, for training, triton_taps.py, its inverse in
triton_unpool.py; average pooling in triton_avg.py; triton_tile.py is what they share.
"""

from __future__ import annotations

import torch

from nnarch.kernels.gpu.static import StaticCase, meta
from nnarch.kernels.pooling.triton_avg import (
    adaptive_avg_pool2d,
    adaptive_avg_pool2d_input_grad,
    avg_pool2d,
    avg_pool2d_input_grad,
)
from nnarch.kernels.pooling.triton_max import (
    adaptive_max_pool2d,
    max_pool2d,
    max_pool2d_gather,
    max_pool2d_input_grad,
)
from nnarch.kernels.pooling.triton_taps import max_pool2d_taps, max_pool2d_taps_grad
from nnarch.kernels.pooling.triton_unpool import max_unpool2d

__all__ = [
    "STATIC_CASES",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool2d_input_grad",
    "adaptive_max_pool2d",
    "avg_pool2d",
    "avg_pool2d_input_grad",
    "max_pool2d",
    "max_pool2d_gather",
    "max_pool2d_input_grad",
    "max_pool2d_taps",
    "max_pool2d_taps_grad",
    "max_unpool2d",
]

_STEM = (8, 64, 112, 112)  # ResNet's 3×3 stride 2 pooling
_STEM_OUT = (8, 64, 56, 56)
_HEAD = (8, 2048, 7, 7)  # its global average
_PLANES = (8, 96, 55, 55)  # AlexNet's, adaptive to 6×6 at the end


def _indices(size: tuple[int, ...]) -> torch.Tensor:
    return meta(*size, dtype=torch.int64)


def _count(*tensor_sizes: tuple[int, ...]) -> float:
    return float(sum(torch.Size(s).numel() for s in tensor_sizes))


def _max_case(dtype: torch.dtype, *, channels_last: bool) -> None:
    x = meta(*_STEM, dtype=dtype, channels_last=channels_last)
    max_pool2d(x, (3, 3), (2, 2), (1, 1), (1, 1), False, True)


def _max_grad_case(dtype: torch.dtype) -> None:
    max_pool2d_input_grad(meta(*_STEM_OUT, dtype=dtype), _indices(_STEM_OUT), _STEM)


def _taps_case(dtype: torch.dtype) -> None:
    max_pool2d_taps(meta(*_STEM, dtype=dtype), (3, 3), (2, 2), (1, 1), (1, 1), False)


def _taps_grad_case(dtype: torch.dtype) -> None:
    grad, taps = meta(*_STEM_OUT, dtype=dtype), meta(*_STEM_OUT, dtype=torch.uint8)
    max_pool2d_taps_grad(grad, taps, _STEM, (3, 3), (2, 2), (1, 1), (1, 1), False)


def _avg_case(dtype: torch.dtype) -> None:
    avg_pool2d(meta(*_STEM, dtype=dtype), (2, 2), (2, 2), (0, 0), False, True, None)


def _avg_grad_case(dtype: torch.dtype) -> None:
    grad = meta(*_STEM_OUT, dtype=dtype)
    avg_pool2d_input_grad(grad, _STEM, (2, 2), (2, 2), (0, 0), False, True, None)


def _global_case(dtype: torch.dtype) -> None:
    adaptive_avg_pool2d(meta(*_HEAD, dtype=dtype), (1, 1))


def _global_grad_case(dtype: torch.dtype) -> None:
    adaptive_avg_pool2d_input_grad(meta(*_HEAD[:2], 1, 1, dtype=dtype), _HEAD)


def _adaptive_case(dtype: torch.dtype) -> None:
    adaptive_max_pool2d(meta(*_PLANES, dtype=dtype, channels_last=False), (6, 6), False)


def _gather_case(dtype: torch.dtype) -> None:
    max_pool2d_gather(meta(*_STEM, dtype=dtype), _indices(_STEM_OUT))


def _unpool_case(dtype: torch.dtype) -> None:
    max_unpool2d(meta(*_STEM_OUT, dtype=dtype), _indices(_STEM_OUT), _STEM[2:])


# The gather is counted as reading all of its input: its positions lie in nearly every sector.
STATIC_CASES = [
    StaticCase(
        "max_pool2d 3×3 s2 C64 H112 N8",
        lambda dtype: _max_case(dtype, channels_last=True),
        flops=9 * _count(_STEM_OUT),
        elements=_count(_STEM, _STEM_OUT),
        fixed_bytes=8 * _count(_STEM_OUT),
    ),
    StaticCase(
        "max_pool2d 3×3 s2 C64 H112 N8 NCHW",
        lambda dtype: _max_case(dtype, channels_last=False),
        flops=9 * _count(_STEM_OUT),
        elements=_count(_STEM, _STEM_OUT),
        fixed_bytes=8 * _count(_STEM_OUT),
    ),
    StaticCase(
        "max_pool2d_input_grad C64 H112 N8",
        _max_grad_case,
        flops=4 * _count(_STEM),
        elements=_count(_STEM, _STEM_OUT),
        fixed_bytes=8 * _count(_STEM_OUT),
    ),
    StaticCase(
        "max_pool2d_taps 3×3 s2 C64 H112 N8",
        _taps_case,
        flops=9 * _count(_STEM_OUT),
        elements=_count(_STEM, _STEM_OUT),
        fixed_bytes=_count(_STEM_OUT),
    ),
    StaticCase(
        "max_pool2d_taps_grad 3×3 s2 C64 H112 N8",
        _taps_grad_case,
        flops=9 * _count(_STEM),
        elements=_count(_STEM, _STEM_OUT),
        fixed_bytes=_count(_STEM_OUT),
    ),
    StaticCase(
        "max_pool2d_gather C64 H112 N8",
        _gather_case,
        flops=0,
        elements=_count(_STEM, _STEM_OUT),
        fixed_bytes=8 * _count(_STEM_OUT),
    ),
    StaticCase(
        "max_unpool2d C64 H112 N8",
        _unpool_case,
        flops=0,
        elements=_count(_STEM, _STEM_OUT),
        fixed_bytes=8 * _count(_STEM_OUT) + 8 * _count(_STEM),  # indices; last positions, twice
    ),
    StaticCase(
        "avg_pool2d 2×2 s2 C64 H112 N8",
        _avg_case,
        flops=4 * _count(_STEM_OUT),
        elements=_count(_STEM, _STEM_OUT),
    ),
    StaticCase(
        "avg_pool2d_input_grad 2×2 s2 C64 H112 N8",
        _avg_grad_case,
        flops=2 * _count(_STEM),
        elements=_count(_STEM, _STEM_OUT),
    ),
    StaticCase(
        "adaptive_avg_pool2d 1×1 C2048 H7 N8",
        _global_case,
        flops=_count(_HEAD),
        elements=_count(_HEAD),
    ),
    StaticCase(
        "adaptive_avg_pool2d_input_grad 1×1 C2048 H7 N8",
        _global_grad_case,
        flops=_count(_HEAD),
        elements=_count(_HEAD),
    ),
    StaticCase(
        "adaptive_max_pool2d 6×6 C96 H55 N8 NCHW",
        _adaptive_case,
        flops=_count(_PLANES),
        elements=_count(_PLANES),
    ),
]
