"""attention_backward on the CPU against its definition: tiles, bands, sums of the mask, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from alone import alone, measures_memory, peak
from kernel_cases import DTYPES, name_of, on_fresh_memory
from tolerances import assert_as_accurate
from torch import Tensor

import nnarch
from nnarch import functional as F
from nnarch.kernels.attention import reference
from nnarch.kernels.attention.op import UNBOUNDED, attention_backward

NAMES = ("dq", "dk", "dv", "d_mask")


def _arguments(
    size: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
    dropout_p: float = 0.0,
    band: tuple[int, int] = (-UNBOUNDED, UNBOUNDED),
    grad_lse: bool = False,
    mask_gradient: bool = False,
) -> list[Any]:
    """Arguments of the operation for (batch, heads, key heads, queries, keys, depth, values')."""
    b, h, g, n, s, d, dv = size
    q, k, v = torch.randn(b, h, n, d), torch.randn(b, g, s, d), torch.randn(b, g, s, dv)
    tensors = [t.to(dtype) for t in (q, k, v)]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    rest = [
        mask,
        None if lengths is None else torch.tensor(lengths),
        torch.tensor([2**41 + 5]) if dropout_p else None,
    ]
    numbers = [dropout_p, 1 / math.sqrt(max(1, d)), *band]
    out, lse = reference.attention(*tensors, *rest, *numbers)
    grad = torch.randn(b, h, n, dv).to(dtype)
    d_lse = torch.randn(b, h, n).to(lse.dtype) if grad_lse else None
    return [grad, d_lse, *tensors, *rest, out, lse, *numbers, mask_gradient]


def _to(arguments: list[Any], dtype: torch.dtype) -> list[Any]:
    return [
        a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments
    ]


def check(arguments: list[Any], ulps: float = 32.0) -> list[Tensor]:
    """Assert that the kernel is as accurate as the definition in the same dtype."""
    ours = on_fresh_memory(lambda: attention_backward(*arguments))
    theirs = reference.attention_backward(*arguments)
    truth = reference.attention_backward(*_to(arguments, torch.float64))
    for name, mine, their, true in zip(NAMES, ours, theirs, truth, strict=True):
        assert mine.stride() == their.stride(), name
        assert_as_accurate(mine, their, true, what=name, ulps=ulps)
    return ours


# ------------------------------------------------------------------------------------ what is seen

BANDS = [(0, 0), (-5, 3), (-64, -1), (1, 64), (-63, 63), (-200, -70), (70, 300), (-UNBOUNDED, 10)]


@pytest.mark.parametrize("band", [*BANDS, (-10, UNBOUNDED), (500, 600), (5, -5)], ids=str)
@pytest.mark.parametrize("size", [(1, 2, 1, 130, 197, 16, 16), (2, 1, 1, 61, 64, 20, 12)], ids=str)
def test_bands(size: tuple[int, ...], band: tuple[int, int]) -> None:
    # With the log-sum-exp's gradient, because a query of one key has no other.
    check(_arguments(size, band=band, grad_lse=True))
    check(_arguments(size, torch.float32, band=band, grad_lse=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("depth", [(1, 3), (16, 16), (17, 33), (96, 96), (256, 64), (300, 270)])
def test_depths(depth: tuple[int, int], dtype: torch.dtype) -> None:
    ulps = 4.0 if dtype.itemsize == 2 else 32.0
    check(_arguments((1, 2, 2, 35, 70, *depth), dtype, band=(-UNBOUNDED, 20)), ulps)


@pytest.mark.parametrize("size", [(2, 3, 3, 1, 130, 16, 24), (1, 2, 1, 1, 70, 20, 12)], ids=str)
def test_few_queries(size: tuple[int, ...]) -> None:
    for p in (0.0, 0.4):
        check(_arguments(size, torch.float32, dropout_p=p, grad_lse=True, band=(-3, 100)))
        check(_arguments(size, lengths=[50] * size[0], dropout_p=p, grad_lse=True))


def test_depth_of_nothing() -> None:
    check(_arguments((1, 2, 2, 5, 7, 0, 4)))
    check(_arguments((1, 2, 2, 5, 7, 4, 0)))


@pytest.mark.parametrize("lengths", [[0, 1], [64, 65], [200, 1], [5000, -3]], ids=str)
def test_lengths(lengths: list[int]) -> None:
    _, dk, dv, _ = check(_arguments((2, 2, 1, 70, 200, 16, 16), lengths=lengths, grad_lse=True))
    for b, n in enumerate(lengths):
        assert not dk[b, :, max(0, n) :].any() and not dv[b, :, max(0, n) :].any()


def test_keys_past_the_length_are_not_read() -> None:
    arguments = _arguments((1, 2, 2, 70, 200, 16, 16), torch.float32, lengths=[100])
    expected = attention_backward(*arguments)
    for t in arguments[3:5]:
        t[:, :, 100:] = math.nan
    for mine, true in zip(attention_backward(*arguments), expected, strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("shape", ["all", "keys", "queries", "one"])
def test_boolean_masks(shape: str) -> None:
    size = {"all": (2, 3, 70, 150), "keys": (2, 1, 1, 150), "queries": (1, 3, 70, 1)}.get(
        shape, (1, 1, 1, 1)
    )
    mask = torch.rand(size) > 0.3
    if shape == "keys":
        mask[..., 64:128] = False  # a tile that nothing sees
    arguments = _arguments((2, 3, 3, 70, 150, 16, 16), mask=mask)
    dq, *_ = check(arguments)
    unseen = ~mask.expand(2, 3, 70, 150).any(-1)
    assert not dq[unseen].any()


def test_queries_that_see_nothing_have_no_gradient() -> None:
    mask = torch.rand(1, 1, 80, 80) > 0.2
    mask[:, :, 3:50] = False
    arguments = _arguments((1, 2, 2, 80, 80, 16, 16), torch.float32, mask, grad_lse=True)
    dq, dk, dv, _ = check(arguments)
    assert not dq[:, :, 3:50].any() and dk.isfinite().all() and dv.isfinite().all()


# ----------------------------------------------------------------------------- gradients that sum

MASKS = [
    (2, 4, 70, 90),
    (1, 4, 70, 90),
    (2, 1, 70, 90),
    (1, 1, 70, 90),
    (2, 4, 1, 90),
    (1, 1, 1, 90),
    (2, 4, 70, 1),
    (1, 4, 1, 1),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_mask_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    arguments = _arguments(
        (2, 4, 2, 70, 90, 16, 16),
        dtype,
        torch.randn(shape),
        band=(-60, 30),
        grad_lse=True,
        mask_gradient=True,
    )
    check(arguments, 4.0 if dtype == torch.bfloat16 else 64.0)


@pytest.mark.parametrize("shape", [(1, 1, 20, 1100), (1, 1, 1, 1100), (1, 1, 20, 1)], ids=str)
def test_mask_gradient_of_many_keys(shape: tuple[int, ...]) -> None:
    """The keys are cut into chunks, or must not be."""
    check(
        _arguments(
            (2, 2, 2, 20, 1100, 8, 8),
            mask=torch.randn(shape),
            grad_lse=True,
            mask_gradient=True,
        ),
        ulps=256.0,
    )


@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
@pytest.mark.parametrize("size", [(1, 2, 2, 19, 30, 16, 16), (2, 4, 2, 70, 1100, 8, 8)], ids=str)
def test_dropout_is_replayed(size: tuple[int, ...], dropout_p: float) -> None:
    for dtype in (torch.float64, torch.float32):
        check(_arguments(size, dtype, dropout_p=dropout_p, grad_lse=True, band=(-UNBOUNDED, 900)))


# ------------------------------------------------------------------------------- layouts, threads


def _packed(t: Tensor) -> Tensor:
    """The same numbers as a view of a wider tensor with positions before heads."""
    b, h, n, d = t.shape
    wide = torch.full((b, n, 3, h, d), math.nan, dtype=t.dtype)
    view = wide[:, :, 1].transpose(1, 2)
    view.copy_(t)
    return view


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_strides(dtype: torch.dtype) -> None:
    arguments = _arguments((2, 4, 2, 70, 90, 32, 48), dtype, band=(-UNBOUNDED, 30))
    expected = attention_backward(*arguments)
    for arrange in (_packed, lambda t: t.mT.contiguous().mT):
        strided = [arrange(a) if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments]
        for mine, true in zip(attention_backward(*strided), expected, strict=True):
            assert torch.equal(mine, true)


def test_expanded_gradients() -> None:
    arguments = _arguments((2, 4, 2, 70, 90, 32, 48), torch.float32, grad_lse=True)
    arguments[0] = torch.ones(()).expand(arguments[0].shape)
    arguments[1] = torch.full((), 0.5).expand(arguments[1].shape)
    ours = attention_backward(*arguments)
    arguments[:2] = [t.contiguous() for t in arguments[:2]]
    for mine, true in zip(ours, attention_backward(*arguments), strict=True):
        assert torch.equal(mine, true)


@pytest.mark.parametrize("size", [(1, 2, 1, 100, 1100, 16, 16), (2, 6, 3, 70, 90, 20, 20)], ids=str)
def test_equal_for_any_number_of_threads(size: tuple[int, ...]) -> None:
    mask = torch.randn(1, 1, *size[3:5])
    arguments = _arguments(size, torch.float32, mask, dropout_p=0.2, mask_gradient=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attention_backward(*arguments))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def _growth_backward() -> int:
    n, d = 32768, 16
    q, k, v, grad = (torch.randn(1, 1, n, d) for _ in range(4))
    out, lse = torch.zeros(1, 1, n, d), torch.full((1, 1, n), math.log(n))
    before = peak()
    numbers = (0.0, 0.25, -UNBOUNDED, 0, False)
    attention_backward(grad, None, q, k, v, None, None, None, out, lse, *numbers)
    return peak() - before


@measures_memory
def test_memory_is_linear_in_the_length() -> None:
    """The scores of 32,768 positions would be 4 GB."""
    assert alone(_growth_backward) < 200e6


def _growth_both(n: int) -> int:
    for length in (64, n):  # the first call loads what is loaded once
        q, k, v, grad = (torch.randn(1, 1, length, 64) for _ in range(4))
        leaves = [t.requires_grad_() for t in (q, k, v)]
        before = peak()
        F.scaled_dot_product_attention(*leaves, is_causal=True).backward(grad)
    return peak() - before - q.grad.nbytes - k.grad.nbytes - v.grad.nbytes


@pytest.mark.slow
@measures_memory
def test_forward_and_backward_of_32768_positions_take_less_than_a_gigabyte() -> None:
    """Beyond inputs and gradients; the scores alone would be 4.3 GB."""
    assert alone(_growth_both, 32768) < 1e9


@pytest.mark.parametrize("size", [30.0, 1e4, 1e9])
def test_large_scores(size):
    """Gradients stay finite and weights below one where rounding exceeds what exp can take."""
    q, k, v = (torch.randn(1, 2, 37, 16) for _ in range(3))
    q, k = (t.mul(size**0.5).requires_grad_() for t in (q, k))
    v.requires_grad_()
    out = F.scaled_dot_product_attention(q, k, v)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)
    assert (grads[2].sum(2) <= 37 * 1.05).all()  # of weights that sum to at most one a query


def test_the_reference_of_a_row_that_a_number_masks():
    """A mask of -1e9 leaves the mean of the values, not their number times it."""
    q, k, v = (torch.randn(1, 1, 30, 8) for _ in range(3))
    mask = torch.full((30, 30), -1e9)
    truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    for backend in ("reference", "cpu"):
        with nnarch.use_backend(backend):
            torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, mask), truth)
