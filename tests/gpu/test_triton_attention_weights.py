"""The Triton kernels of attention's weights in the interpreter, against float64."""

from __future__ import annotations

import math

import pytest
import torch

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from tolerances import assert_as_accurate  # noqa: E402
from triton_cases import DTYPES, poisoned_memory  # noqa: E402

from nnarch.kernels.attention import reference, triton_kernel, triton_weights  # noqa: E402
from nnarch.kernels.attention.op import UNBOUNDED  # noqa: E402
from nnarch.kernels.gpu import tiles  # noqa: E402

BAND = (-UNBOUNDED, UNBOUNDED)
SHAPES = {  # batch, heads, key heads, queries, keys, depth
    "one": (1, 1, 1, 1, 1, 1),
    "odd": (2, 2, 2, 37, 51, 11),
    "shared heads": (1, 6, 2, 70, 33, 40),
    "one query": (2, 4, 2, 1, 90, 32),
    "wide": (1, 2, 1, 9, 21, 80),
}


def _compare(actual, function, arguments, skip=()):
    """Hold results against the reference in the same dtype and in float64."""
    wide = [
        t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in arguments
    ]
    theirs, truth = function(*arguments), function(*wide)
    for index, (mine, their, true) in enumerate(zip(actual, theirs, truth, strict=True)):
        if index not in skip:
            assert_as_accurate(mine, their, true.double(), ulps=32, what=f"result {index}")


def check(shape, dtype=torch.float32, mask=None, lengths=None, p=0.0, band=BAND, tensors=None):
    """Forward and backward, of every head and of their mean."""
    b, h, g, n, s, d = shape
    q, k = tensors or (torch.randn(b, h, n, d).to(dtype), torch.randn(b, g, s, d).to(dtype))
    seed = torch.tensor([2**45 + 3]) if p else None
    rest, numbers = (mask, lengths, seed), (p, 1 / math.sqrt(d), *band)
    lse = reference.attention(q, k, k, *rest, *numbers)[1]
    wants_mask = mask is not None and mask.dtype != torch.bool
    for averaged in (False, True):
        arguments = (q, k, *rest, lse, *numbers, averaged)
        with poisoned_memory():
            weights = triton_kernel.attention_weights(*arguments)
        _compare([weights], lambda *a: [reference.attention_weights(*a)], arguments)
        backward = (torch.randn_like(weights), *arguments, wants_mask)
        with poisoned_memory():
            actual = triton_kernel.attention_weights_backward(*backward)
        skip = () if wants_mask else (3,)
        _compare(actual, reference.attention_weights_backward, backward, skip)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype):
    check(shape, dtype)


@pytest.mark.parametrize("band", [(-UNBOUNDED, 0), (-9, 4), (-UNBOUNDED, -40), (200, 300)])
@pytest.mark.parametrize("n, s", [(70, 150), (150, 40)])
def test_bands(n, s, band):
    check((1, 1, 1, n, s, 16), band=band)


@pytest.mark.parametrize("kind", ["bool", "added", "rows", "keys", "one"])
def test_masks(kind):
    shape = (2, 2, 1, 37, 51, 16)
    b, h, _, n, s, _ = shape
    if kind == "bool":
        mask = torch.rand(b, 1, n, s) > 0.4
        mask[0, 0, n // 2] = False
    else:
        sizes = {"added": (1, h, n, s), "rows": (b, 1, n, 1), "keys": (b, 1, 1, s), "one": (1,) * 4}
        mask = torch.randn(sizes[kind])
    check(shape, mask=mask)
    check(shape, mask=mask, lengths=torch.tensor([51, 13]), p=0.4, band=(-20, 10))


def test_views():
    qkv = torch.randn(2, 33, 3, 4, 16)
    q, k, _ = (t.transpose(1, 2) for t in qkv.unbind(2))
    check((2, 4, 4, 33, 33, 16), tensors=(q, k), band=(-UNBOUNDED, 0))


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_nothing(sizes):
    check((2, 2, 2, *sizes, 16))


_EVERY = [(p, tile) for p in ("half", "ieee") for tile in triton_weights.WEIGHTS.tiles[p]]


@pytest.mark.parametrize("precision, tile", _EVERY, ids=[f"{p} {tile}" for p, tile in _EVERY])
def test_every_tile(precision, tile):
    dtype = torch.float16 if precision == "half" else torch.float32
    with tiles.force(attention_weights=tile):
        check((1, 2, 1, 70, 150, 16), dtype, band=(-60, 20))
