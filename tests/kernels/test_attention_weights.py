"""attention_weights against its definition in float64: masks, bands, lengths, heads, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, check_under_isa, name_of, on_fresh_memory
from tolerances import assert_as_accurate
from torch import Tensor
from torch.autograd import gradcheck

from nnarch import functional as F
from nnarch.kernels.attention import reference
from nnarch.kernels.attention.op import UNBOUNDED
from nnarch.kernels.attention.weights import attention_weights_backward, attention_weights_op

BAND = (-UNBOUNDED, UNBOUNDED)


def _arguments(
    size: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    mask: Tensor | None = None,
    lengths: list[int] | None = None,
    dropout_p: float = 0.0,
    band: tuple[int, int] = BAND,
    averaged: bool = False,
) -> list[Any]:
    """Arguments of the operation for (batch, heads, key heads, queries, keys, depth)."""
    b, h, g, n, s, d = size
    q, k = torch.randn(b, h, n, d).to(dtype), torch.randn(b, g, s, d).to(dtype)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(dtype)
    rest = [
        mask,
        None if lengths is None else torch.tensor(lengths),
        torch.tensor([2**41 + 5]) if dropout_p else None,
    ]
    numbers = [dropout_p, 1 / math.sqrt(d), *band]
    _, lse = reference.attention(q, k, k, *rest, *numbers)
    return [q, k, *rest, lse, *numbers, averaged]


def _samples() -> list[tuple]:
    size = (2, 4, 2, 5, 13, 12)
    seen = torch.rand(2, 1, 5, 13) > 0.3
    return [
        tuple(_arguments(size)),
        tuple(_arguments(size, mask=seen, dropout_p=0.3, averaged=True)),
        tuple(_arguments(size, mask=torch.randn(1, 4, 5, 13), lengths=[13, 6], band=(-3, 4))),
    ]


def _grad(arguments: Any) -> Tensor:
    q, k = arguments[:2]
    heads = 1 if arguments[-1] else q.shape[1]
    return torch.randn(q.shape[0], heads, q.shape[2], k.shape[2]).to(q.dtype)


def _wants_mask(arguments: Any) -> bool:
    return arguments[2] is not None and arguments[2].dtype != torch.bool


def _backward_samples() -> list[tuple]:
    return [(_grad(a), *a, _wants_mask(a)) for a in _samples()]


SAMPLES = {"attention_weights": _samples, "attention_weights_backward": _backward_samples}


def _wide(arguments: list[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def check(arguments: list[Any]) -> Tensor:
    """Assert that weights and their gradients are as accurate as the definition in their dtype."""
    weights = on_fresh_memory(lambda: attention_weights_op(*arguments))
    theirs = reference.attention_weights(*arguments)
    assert_as_accurate(
        weights, theirs, reference.attention_weights(*_wide(arguments)), ulps=32, what="weights"
    )
    backward = [_grad(arguments), *arguments, _wants_mask(arguments)]
    ours = on_fresh_memory(lambda: attention_weights_backward(*backward))
    expected = reference.attention_weights_backward(*backward)
    truth = reference.attention_weights_backward(*_wide(backward))
    for name, mine, their, true in zip(
        ("dq", "dk", "d_lse", "d_mask"), ours, expected, truth, strict=True
    ):
        assert mine.stride() == their.stride(), name
        assert_as_accurate(mine, their, true.double(), ulps=64, what=name)
    return weights


SHAPES = {  # batch, heads, key heads, queries, keys, depth
    "one": (1, 1, 1, 1, 1, 1),
    "tiles": (2, 2, 2, 64, 128, 64),
    "primes": (1, 3, 3, 67, 101, 61),
    "grouped": (2, 6, 2, 19, 35, 32),
    "one query": (2, 4, 4, 1, 300, 64),
    "three queries": (1, 8, 2, 3, 515, 128),
    "deep": (1, 1, 1, 18, 50, 300),
    "many queries": (1, 2, 1, 523, 70, 40),
    "keys in ranges": (1, 1, 1, 40, 1100, 16),
}


@pytest.mark.parametrize("averaged", [False, True], ids=["each", "averaged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype, averaged: bool) -> None:
    check(_arguments(shape, dtype, averaged=averaged))


_MASKS = {
    "bool": lambda b, h, n, s: torch.rand(b, 1, n, s) > 0.4,
    "padding": lambda b, h, n, s: torch.arange(s) < torch.tensor([s, s // 3])[:b, None, None, None],
    "added": lambda b, h, n, s: torch.randn(1, h, n, s),
    "rows": lambda b, h, n, s: torch.randn(b, 1, n, 1),
    "keys": lambda b, h, n, s: torch.randn(b, 1, 1, s),
    "one": lambda b, h, n, s: torch.randn(1, 1, 1, 1),
}


@pytest.mark.parametrize("averaged", [False, True], ids=["each", "averaged"])
@pytest.mark.parametrize("band", [BAND, (-20, 10), (-UNBOUNDED, 0), (300, 400)], ids=str)
@pytest.mark.parametrize("kind", _MASKS)
def test_masks(kind: str, band: tuple[int, int], averaged: bool) -> None:
    b, h, g, n, s, d = 2, 4, 2, 130, 77, 20
    mask = _MASKS[kind](b, h, n, s)
    if kind == "bool":
        mask[0, 0, n // 2] = False
    for dtype in (torch.float32, torch.float64):
        weights = check(
            _arguments((b, h, g, n, s, d), dtype, mask, [77, 13], band=band, averaged=averaged)
        )
        assert torch.isfinite(weights).all()
        assert not weights[1, :, :, 13:].any()
    check(_arguments((b, h, g, n, s, d), mask=mask, dropout_p=0.4, band=band, averaged=averaged))


def test_values_are_what_attention_multiplies() -> None:
    q, k, v = (torch.randn(2, 4, 33, 16) for _ in range(3))
    y, lse = F.scaled_dot_product_attention(q, k, v, is_causal=True, return_lse=True)
    weights = F.attention_weights(q, k, lse, is_causal=True)
    torch.testing.assert_close(weights @ v, y)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 33))
    mean = F.attention_weights(q, k, lse, is_causal=True, average_heads=True)
    torch.testing.assert_close(mean, weights.mean(1))


def test_views() -> None:
    qkv = torch.randn(2, 70, 3, 4, 16)
    q, k, _ = (t.transpose(1, 2) for t in qkv.unbind(2))
    arguments = _arguments((2, 4, 4, 70, 70, 16))
    arguments[:2] = q, k
    arguments[5] = reference.attention(q, k, k, *arguments[2:5], *arguments[6:10])[1]
    check(arguments)
    expected = attention_weights_backward(_grad(arguments), *arguments, False)
    assert (
        expected[0].stride() == q.contiguous().transpose(1, 2).contiguous().transpose(1, 2).stride()
    )
    grad = torch.randn(2, 4, 1, 1).expand(2, 4, 70, 70)
    found = attention_weights_backward(grad, *arguments, False)
    for mine, other in zip(
        found, attention_weights_backward(grad.contiguous(), *arguments, False), strict=True
    ):
        assert torch.equal(mine, other)
    turned = torch.randn(2, 4, 70, 70).mT
    for mine, other in zip(
        attention_weights_backward(turned, *arguments, False),
        attention_weights_backward(turned.contiguous(), *arguments, False),
        strict=True,
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("size", [(2, 2, 2, 0, 5, 4), (2, 2, 2, 5, 0, 4), (0, 2, 1, 3, 3, 4)])
@pytest.mark.parametrize("averaged", [False, True])
def test_nothing(size: tuple[int, ...], averaged: bool) -> None:
    check(_arguments(size, averaged=averaged))


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (3, 2)}], ids=str)
def test_gradcheck_through_the_log_sum_exp(options: dict[str, Any], averaged: bool) -> None:
    """As torch would differentiate softmax: through the scores and their sum."""
    q = torch.randn(1, 4, 6, 5, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 9, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 1, 6, 9, dtype=torch.float64, requires_grad=True)

    def run(q: Tensor, k: Tensor, bias: Tensor) -> Any:
        y, lse = F.scaled_dot_product_attention(
            q, k, k, bias, enable_gqa=True, return_lse=True, **options
        )
        return y, F.attention_weights(q, k, lse, bias, average_heads=averaged, **options)

    assert gradcheck(run, (q, k, bias))


def test_threads_do_not_matter() -> None:
    arguments = _arguments((2, 3, 3, 90, 1500, 16), averaged=True)
    grad = _grad(arguments)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(
                (
                    attention_weights_op(*arguments),
                    *attention_weights_backward(grad, *arguments, False),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_scores_of_all_heads_in_memory() -> None:
    """The weights of 16 heads are never together in memory where their mean is asked for."""
    q, k = torch.randn(1, 16, 512, 16), torch.randn(1, 16, 512, 16)
    lse = F.scaled_dot_product_attention(q, k, k, return_lse=True)[1]
    with torch.profiler.profile(profile_memory=True) as profile:
        mean = F.attention_weights(q, k, lse, average_heads=True)
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    assert allocated < 4 * mean.nbytes


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa: str) -> None:
    check_under_isa(isa, check_few)


def check_few() -> None:
    """What is run under another instruction set."""
    for dtype in DTYPES:
        for averaged in (False, True):
            check(_arguments((2, 4, 2, 67, 101, 40), dtype, averaged=averaged))
    mask = torch.randn(1, 4, 67, 101)
    check(_arguments((2, 4, 2, 67, 101, 20), torch.float32, mask, [101, 50], 0.3, (-60, 30)))
    check(_arguments((2, 4, 2, 2, 101, 20), torch.float32))


_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "lse": ({"lse": torch.zeros(1, 2, 4)}, "lse must have shape"),
    "lse dtype": ({"lse": torch.zeros(1, 2, 3).double()}, "lse must be torch.float32"),
    "heads": ({"key": torch.ones(1, 3, 5, 4)}, "must be a multiple"),
    "depth": ({"key": torch.ones(1, 2, 5, 3)}, "key must have shape"),
    "mask": ({"attn_mask": torch.ones(3, 5, dtype=torch.bool)}, "mask must broadcast"),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_input(name: str) -> None:
    wrong, message = _BAD[name]
    good = {
        "query": torch.ones(1, 2, 3, 4),
        "key": torch.ones(1, 2, 5, 4),
        "lse": torch.zeros(1, 2, 3),
    }
    with pytest.raises((ValueError, TypeError), match=f"attention_weights: .*{message}"):
        F.attention_weights(**(good | wrong))
