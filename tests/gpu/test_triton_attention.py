"""The Triton kernels of attention in the interpreter, against float64."""

from __future__ import annotations

import math

import pytest
import torch

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from tolerances import assert_as_accurate  # noqa: E402
from triton_cases import DTYPES, poisoned_memory  # noqa: E402

from nnarch.kernels.attention import (  # noqa: E402
    reference,
    triton_backward,
    triton_forward,
    triton_kernel,
)
from nnarch.kernels.attention.op import UNBOUNDED  # noqa: E402
from nnarch.kernels.gpu import plans, tiles  # noqa: E402

BAND = (-UNBOUNDED, UNBOUNDED)
SHAPES = {  # batch, heads, key heads, queries, keys, depth, value depth
    "one": (1, 1, 1, 1, 1, 1, 1),
    "odd": (2, 2, 2, 37, 51, 11, 19),
    "shared heads": (1, 6, 2, 70, 33, 16, 16),
    "decode, shared heads": (2, 8, 2, 1, 90, 32, 24),
    "decode in parts": (1, 2, 1, 3, 1100, 16, 16),
}


def _tensors(shape, dtype=torch.float32):
    b, h, g, n, s, d, dv = shape
    sizes = ((b, h, n, d), (b, g, s, d), (b, g, s, dv))
    return [torch.randn(size).to(dtype) for size in sizes]


def _mask(kind, shape, dtype):
    b, h, _, n, s, _, _ = shape
    if kind == "bool":
        mask = torch.rand(b, 1, n, s) > 0.4
        mask[0, 0, n // 2] = False
        return mask
    sizes = {"added": (1, h, n, s), "rows": (b, 1, n, 1), "keys": (b, 1, 1, s), "one": (1,) * 4}
    return torch.randn(sizes[kind]).to(dtype)


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


def check(
    tensors, mask=None, lengths=None, seed=None, p=0.0, band=BAND, grad_lse=False, scale=None
):
    """Forward and backward."""
    scale = 1 / math.sqrt(tensors[0].shape[3]) if scale is None else scale
    inputs = (*tensors, mask, lengths, seed, p, scale, *band)
    with poisoned_memory():
        out, lse = triton_kernel.attention(*inputs)
    _compare((out, lse), reference.attention, inputs)
    grads = torch.randn_like(out), torch.randn_like(lse) if grad_lse else None
    wants_mask = mask is not None and mask.dtype != torch.bool
    out, lse = reference.attention(*inputs)
    arguments = (*grads, *tensors, mask, lengths, seed, out, lse, p, scale, *band, wants_mask)
    with poisoned_memory():
        actual = triton_kernel.attention_backward(*arguments)
    _compare(actual, reference.attention_backward, arguments, skip=() if wants_mask else (3,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype):
    check(_tensors(shape, dtype))


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales_that_reverse_the_order(scale):
    check(_tensors((1, 2, 2, 37, 51, 16, 16)), scale=scale)


@pytest.mark.parametrize(
    "band", [(-UNBOUNDED, 0), (-9, 4), (-UNBOUNDED, -40), (5, UNBOUNDED), (200, 300), (-70, -30)]
)
@pytest.mark.parametrize("n, s", [(70, 150), (150, 40)])
def test_bands(n, s, band):
    check(_tensors((1, 1, 1, n, s, 16, 16)), band=band)


@pytest.mark.parametrize("kind", ["bool", "added", "rows", "keys", "one"])
@pytest.mark.parametrize("band", [BAND, (-20, 10)], ids=["", "band"])
def test_masks(kind, band):
    shape = (2, 2, 1, 37, 51, 16, 16)
    check(_tensors(shape), _mask(kind, shape, torch.float32), band=band, grad_lse=True)


@pytest.mark.parametrize("n", [1, 35])
def test_key_lengths(n):
    check(_tensors((4, 2, 2, n, 51, 16, 16)), lengths=torch.tensor([51, 0, 1, 32]))


def test_stacked_heads_with_masks():
    shape = (2, 4, 2, 3, 40, 16, 16)
    check(
        _tensors(shape), _mask("added", shape, torch.float32), torch.tensor([40, 13]), band=(-30, 9)
    )


@pytest.mark.parametrize("n", [2, 37])
def test_dropout(n):
    shape = (2, 4, 2, n, 51, 16, 16)
    seed = torch.tensor([2**45 + 3])
    check(_tensors(shape), _mask("added", shape, torch.float32), seed=seed, p=0.4)


@pytest.mark.parametrize("kind", ["bool", "added"])
@pytest.mark.parametrize("depth", [16, 40, 144])  # in half types the widest is read in chunks
def test_everything_that_takes_registers(kind, depth):
    shape = (2, 2, 1, 37, 51, depth, depth)
    extras = {"lengths": torch.tensor([51, 23]), "seed": torch.tensor([2**45 + 3]), "p": 0.3}
    mask = _mask(kind, shape, torch.float16)
    check(_tensors(shape, torch.float16), mask, band=(-20, 10), grad_lse=True, **extras)


def test_views():
    qkv = torch.randn(2, 33, 3, 4, 16)
    check([t.transpose(1, 2) for t in qkv.unbind(2)], band=(-UNBOUNDED, 0))
    q, k, v = _tensors((2, 2, 2, 20, 40, 16, 16))
    check([q[:, :1].expand(-1, 2, -1, -1), k.mT.contiguous().mT, v[..., :1].expand_as(v)])


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_nothing(sizes):
    check(_tensors((2, 2, 2, *sizes, 16, 16)))


_EVERY = [
    (table, precision, tile)
    for table in (
        triton_forward.FORWARD,
        triton_forward.FORWARD_MASKED,
        triton_forward.DECODE,
        triton_backward.KEY_VALUE,
        triton_backward.KEY_VALUE_MASKED,
        triton_backward.QUERY,
        triton_backward.QUERY_MASKED,
    )
    for precision in ("half", "ieee")
    for tile in table.tiles[precision]
]


@pytest.mark.parametrize(
    "table, precision, tile", _EVERY, ids=[f"{t.name} {p} {tile}" for t, p, tile in _EVERY]
)
def test_every_tile(table, precision, tile):
    dtype = torch.float16 if precision == "half" else torch.float32
    # Log-sum-exps are read by descriptors too, where their rows lie on 16 bytes.
    length = 9 if table is triton_forward.DECODE else 72 if "descriptors" in str(tile) else 70
    shape = (1, 2, 1, length, 150, 16, 16)
    options = {}
    if table.name.endswith("masked"):
        seed = torch.tensor([2**45 + 3])
        options = {"mask": _mask("added", shape, dtype), "seed": seed, "p": 0.4}
    with tiles.force(**{table.name: tile}):
        check(_tensors(shape, dtype), band=(-60, 20), **options)


DESCRIBED = (1, 4, 2, 36, 52, 16, 24)  # rows on 16 bytes


def _described(**options):
    """Tiles that read by tensor descriptors, by table."""
    return {
        name: tiles.tile(BLOCK_M=16, BLOCK_N=32, DESCRIPTORS=True, **options)
        for name in ("attention", "attention_key_value", "attention_query")
    }


@pytest.mark.parametrize("band", [BAND, (-UNBOUNDED, 16), (-20, 5)], ids=str)
@pytest.mark.parametrize("one_loop", [False, True])
def test_tensor_descriptors(one_loop, band):
    lengths = torch.tensor([45])
    with tiles.force(**_described(ONE_LOOP=one_loop)):
        check(_tensors(DESCRIBED, torch.float16), band=band, lengths=lengths)


def test_tensor_descriptors_in_a_plan(monkeypatch):
    force = _described(ONE_LOOP=True)
    monkeypatch.setattr(tiles, "_forced", force)  # unlike tiles.force, plans go on
    planned = plans.planned(triton_kernel.attention)
    for _ in range(4):
        q, k, v = torch.randn(3, 1, 36, 4, 16).half().transpose(2, 3)
        args = (q, k, v, None, None, None, 0.0, 0.3, *BAND)
        mine, _ = planned(*args)
        torch.testing.assert_close(mine, reference.attention(*args)[0], atol=2e-3, rtol=2e-3)


def test_heads_too_deep_are_refused():
    tensors = _tensors((1, 1, 1, 2, 2, 300, 300))
    with pytest.raises(NotImplementedError, match="at most 256"):
        triton_kernel.attention(*tensors, None, None, None, 0.0, 1.0, *BAND)
