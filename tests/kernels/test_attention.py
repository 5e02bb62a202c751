"""Attention against a dense definition in float64: masks, bands, lengths, shared heads, layouts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from kernel_cases import DTYPES, check_under_isa, name_of, on_fresh_memory
from tolerances import assert_as_accurate
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as TF

from nnarch import functional as F
from nnarch.kernels.attention.op import UNBOUNDED


def _inputs(b: int, h: int, g: int, n: int, s: int, d: int, dv: int) -> list[Tensor]:
    return [torch.randn(b, h, n, d), torch.randn(b, g, s, d), torch.randn(b, g, s, dv)]


def _sample(seed: bool = False, mask: Tensor | None = None, lengths: bool = False) -> tuple:
    """Arguments of the operation: 2 sequences, 4 heads on 2, 5 queries, 13 keys, 12 and 20 wide."""
    return (
        *_inputs(2, 4, 2, 5, 13, 12, 20),
        mask,
        torch.tensor([13, 6]) if lengths else None,
        torch.tensor([12345]) if seed else None,
        0.3 if seed else 0.0,
        0.3,
        -3 if lengths else -UNBOUNDED,
        4 if lengths else UNBOUNDED,
    )


def _samples() -> list[tuple]:
    return [
        _sample(),
        _sample(seed=True, mask=torch.rand(2, 1, 5, 13) > 0.3),
        _sample(mask=torch.randn(1, 4, 5, 13), lengths=True),
    ]


def _backward_samples() -> list[tuple]:
    samples = []
    for arguments in _samples():
        q, k, v, mask, *rest = arguments
        from nnarch.kernels.attention import reference

        out, lse = reference.attention(*arguments)
        wants_mask = mask is not None and mask.dtype != torch.bool
        grads = torch.randn_like(out), torch.randn_like(lse) if wants_mask else None
        samples.append((*grads, q, k, v, mask, *rest[:2], out, lse, *rest[2:], wants_mask))
    return samples


SAMPLES = {"attention": _samples, "attention_backward": _backward_samples}


ULPS = {torch.float32: 32.0, torch.float64: 64.0, torch.float16: 4.0, torch.bfloat16: 4.0}

# ------------------------------------------------------------------------- the dense definition


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    window: tuple[int, int] | None = None,
    query_offset: int = 0,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Attention in torch's plain functions, with zeros for a query that sees nothing."""
    each = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    n, s = q.shape[2], k.shape[2]
    position, key = torch.arange(n)[:, None] + query_offset, torch.arange(s)
    seen = torch.ones(n, s, dtype=torch.bool)
    if is_causal:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & (key >= position - window[0]) & (key <= position + window[1])
    if key_lengths is not None:
        seen = seen & (key < key_lengths[:, None, None, None])
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        seen = seen & attn_mask
    elif attn_mask is not None:
        scores = scores + attn_mask
    scores = scores.masked_fill(~seen, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0) @ v


def check(tensors: list[Tensor], options: dict[str, Any], gradients: bool = True) -> Tensor:
    """Assert that output and gradients are as accurate as the dense definition in their dtype."""
    floats = {n: o for n, o in options.items() if isinstance(o, Tensor) and o.is_floating_point()}
    rest = {n: o for n, o in options.items() if n not in floats}
    shared = {"enable_gqa": True}
    dtype = tensors[0].dtype
    grad = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3], dtype=dtype)

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        def leaf(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(gradients)

        leaves = [leaf(t) for t in tensors]
        named = {n: leaf(t) for n, t in floats.items()}
        y = function(*leaves, **named, **rest, **shared)
        if not gradients:
            return [y]
        wanted = [*leaves, *named.values()]
        return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(dtype))]

    ours = on_fresh_memory(lambda: run(F.scaled_dot_product_attention, dtype))
    theirs, truth = run(dense, dtype), run(dense, torch.float64)
    for name, mine, their, true in zip(
        ["output", "dq", "dk", "dv", *floats], ours, theirs, truth, strict=False
    ):
        # Gradients of scores are differences: rounding stays where torch's softmax has exact zeros.
        assert_as_accurate(
            mine, their, true, what=name, ulps=None if name == "output" else ULPS[dtype]
        )
    return ours[0]


SHAPES = {  # batch, heads, key heads, queries, keys, depth, value depth
    "one": (1, 1, 1, 1, 1, 1, 1),
    "small": (2, 3, 3, 7, 11, 8, 8),
    "tiles": (2, 2, 2, 64, 96, 64, 64),
    "primes": (1, 2, 2, 67, 101, 61, 61),
    "grouped": (2, 6, 2, 19, 35, 32, 32),
    "one key head": (1, 8, 1, 33, 47, 16, 16),
    "values wider": (1, 2, 2, 21, 40, 24, 80),
    "values narrower": (1, 2, 1, 21, 40, 72, 5),
    "decode": (2, 4, 4, 1, 300, 64, 64),
    "few queries": (1, 8, 2, 3, 515, 128, 128),
    "deep": (1, 1, 1, 18, 50, 256, 256),
    "deeper than tiles": (1, 1, 1, 5, 9, 300, 270),
    "long": (1, 1, 1, 259, 523, 40, 40),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check([t.to(dtype) for t in _inputs(*shape)], {})


def _conditions(b: int, h: int, n: int, s: int) -> dict[str, dict[str, Any]]:
    lengths = torch.tensor([s, s // 3, 0, 1][:b])
    rows = torch.rand(b, 1, n, s) > 0.4
    rows[0, 0, n // 2] = False  # a query that sees nothing
    return {
        "causal": {"is_causal": True},
        "causal with a cache": {"is_causal": True, "query_offset": s - n},
        "window": {"window": (9, 4)},
        "causal window": {"is_causal": True, "window": (5, 0), "query_offset": s - n},
        "band past the keys": {"window": (3, 0), "query_offset": s + 1},
        "bool mask": {"attn_mask": rows},
        "bool mask of keys": {"attn_mask": torch.rand(b, 1, 1, s) > 0.3},
        "additive mask": {"attn_mask": torch.randn(1, h, n, s)},
        "additive mask of keys": {"attn_mask": torch.randn(b, h, 1, s)},
        "additive mask with -inf": {
            "attn_mask": torch.randn(1, 1, n, s).masked_fill(torch.rand(n, s) > 0.6, -math.inf)
        },
        "lengths": {"key_lengths": lengths},
        "all": {"is_causal": True, "attn_mask": rows, "key_lengths": lengths, "window": (30, 0)},
    }


@pytest.mark.parametrize("size", [(3, 2, 37, 53), (2, 2, 64, 192), (2, 3, 2, 130)], ids=str)
@pytest.mark.parametrize("name", _conditions(1, 1, 1, 1))
def test_conditions(name: str, size: tuple[int, int, int, int]) -> None:
    b, h, n, s = size
    check(_inputs(b, h, h, n, s, 32, 32), _conditions(*size)[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("name", ["causal", "additive mask with -inf", "all"])
def test_conditions_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    options = {
        n: o.to(dtype) if isinstance(o, Tensor) and o.is_floating_point() else o
        for n, o in _conditions(2, 2, 37, 53)[name].items()
    }
    check([t.to(dtype) for t in _inputs(2, 2, 2, 37, 53, 24, 24)], options)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", _conditions(1, 1, 1, 1))
def test_every_condition_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    for b, h, n, s in ((2, 2, 37, 141), (2, 4, 1, 67)):
        options = {
            n_: o.to(dtype) if isinstance(o, Tensor) and o.is_floating_point() else o
            for n_, o in _conditions(b, h, n, s)[name].items()
        }
        check([t.to(dtype) for t in _inputs(b, h, h, n, s, 20, 28)], options, gradients=False)


def run_everything_forward() -> None:
    """All shapes and conditions, in a process with an instruction set of its own."""
    for shape in (*SHAPES.values(), (1, 1, 1, 300, 277, 64, 64), (1, 2, 1, 3, 1100, 48, 33)):
        for dtype in DTYPES:
            check([t.to(dtype) for t in _inputs(*shape)], {}, gradients=False)
    for size in ((2, 2, 40, 150), (2, 3, 2, 130)):
        for options in _conditions(*size).values():
            check(_inputs(size[0], size[1], size[1], *size[2:], 32, 32), options, gradients=False)
    test_dropout_drops_what_the_definition_drops()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_instruction_sets(isa: str) -> None:
    check_under_isa(isa, "test_attention", "run_everything_forward")


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 3001), (1, 2, 1, 40, 1500), (2, 3, 3, 130, 70)])
def test_threads(shape: tuple[int, ...]) -> None:
    """Cut into ranges of keys, and into blocks of queries: the same bits for any number."""
    tensors, before = _inputs(*shape, 32, 32), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(F.scaled_dot_product_attention(*tensors, enable_gqa=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)
    check(tensors, {}, gradients=False)


def test_strides_past_32_bits() -> None:
    """Heads more than 2**32 bytes apart; only the pages that are written take memory."""
    far = 2**30 + 64
    memory = torch.empty(far + 4096)
    k = memory.as_strided((1, 2, 20, 16), (0, far, 16, 1)).copy_(torch.randn(1, 2, 20, 16))
    q, dense_k = torch.randn(1, 2, 9, 16), k.contiguous()
    ours = F.scaled_dot_product_attention(q, k, k)
    assert torch.equal(ours, F.scaled_dot_product_attention(q, dense_k, dense_k))


@pytest.mark.parametrize("n, s", [(2, 3), (5, 131), (131, 5), (37, 257), (257, 1), (1, 1)], ids=str)
def test_primes(n: int, s: int) -> None:
    for causal in (False, True):
        check(_inputs(1, 2, 2, n, s, 13, 7), {"is_causal": causal}, gradients=False)


@pytest.mark.parametrize("n, s", [(0, 5), (5, 0), (0, 0)])
def test_nothing(n: int, s: int) -> None:
    q, k, v = (t.requires_grad_() for t in _inputs(2, 3, 3, n, s, 8, 6))
    y = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(y, torch.zeros(2, 3, n, 6))
    for gradient, t in zip(torch.autograd.grad(y.sum(), (q, k, v)), (q, k, v), strict=True):
        assert torch.equal(gradient, torch.zeros_like(t))


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient() -> None:
    q, k, v = (t.requires_grad_() for t in _inputs(1, 2, 2, 9, 20, 16, 16))
    mask = torch.ones(9, 20, dtype=torch.bool)
    mask[4] = False
    y, lse = F.scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    assert not y[:, :, 4].any() and (lse[:, :, 4] == -math.inf).all()
    dq, dk, dv = torch.autograd.grad(y.sum(), (q, k, v))
    assert not dq[:, :, 4].any()
    assert all(t.isfinite().all() for t in (dq, dk, dv))


@pytest.mark.parametrize("scores", [1e4, 1e-40, 3e38])
def test_extreme_scores(scores: float) -> None:
    q, k, v = _inputs(1, 2, 2, 20, 40, 8, 8)
    ours = F.scaled_dot_product_attention(q, k, v, scale=scores)
    truth = dense(q.double(), k.double(), v.double(), scale=scores)
    big = (q @ k.mT).abs().max() * scores > 3e38  # infinite in float32: one key wins, or NaN
    if big:
        assert torch.equal(ours.isnan(), dense(q, k, v, scale=scores).isnan())
    else:
        assert torch.allclose(ours.double(), truth, rtol=1e-3, atol=1e-3)


def test_log_sum_exp_and_its_gradient() -> None:
    q, k, v = (t.double().requires_grad_() for t in _inputs(1, 2, 2, 9, 20, 8, 8))
    _, lse = F.scaled_dot_product_attention(q, k, v, is_causal=True, return_lse=True)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~torch.ones(9, 20).tril().bool(), -math.inf)
    assert torch.allclose(lse, scores.logsumexp(-1), rtol=1e-12)
    grad = torch.randn_like(lse)
    ours = torch.autograd.grad(lse, (q, k), grad)
    for mine, true in zip(
        ours, torch.autograd.grad(scores.logsumexp(-1), (q, k), grad), strict=True
    ):
        assert torch.allclose(mine, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (3, 2)}], ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    tensors = [t.double().requires_grad_() for t in _inputs(1, 4, 2, 6, 9, 5, 7)]
    bias = torch.randn(1, 1, 6, 9, dtype=torch.float64, requires_grad=True)

    def run(*t: Tensor) -> Any:
        return F.scaled_dot_product_attention(*t, enable_gqa=True, return_lse=True, **options)

    assert gradcheck(run, (*tensors, bias))


# ------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("packed", ["positions first", "heads first"])
def test_views_of_packed_projections(packed: str) -> None:
    if packed == "positions first":
        qkv = torch.randn(2, 33, 3, 4, 16)
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    else:
        q, k, v = torch.randn(3, 2, 4, 33, 16).unbind(0)
    y = check([q, k, v], {"is_causal": True})
    plain = F.scaled_dot_product_attention(q.clone(), k.clone(), v.clone(), is_causal=True)
    assert torch.equal(y, plain)
    assert y.transpose(1, 2).is_contiguous() == (packed == "positions first")


@pytest.mark.parametrize("stride", ["last dimension", "expanded", "reversed order"])
def test_other_strides(stride: str) -> None:
    q, k, v = _inputs(2, 3, 3, 19, 29, 16, 16)
    if stride == "last dimension":
        q, k, v = (t.mT.contiguous().mT for t in (q, k, v))
    elif stride == "expanded":
        q, k, v = (
            q[:, :1].expand(-1, 3, -1, -1),
            k[:1].expand(2, -1, -1, -1),
            v[..., :1].expand_as(v),
        )
    else:
        q, k, v = (t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for t in (q, k, v))
    check([q, k, v], {"attn_mask": (torch.rand(19, 29) > 0.3).expand(2, 1, 19, 29)})


@pytest.mark.parametrize("lead", [(), (5,), (2, 3, 4)], ids=str)
def test_other_numbers_of_dimensions(lead: tuple[int, ...]) -> None:
    q, k, v = torch.randn(*lead, 7, 8), torch.randn(*lead, 9, 8), torch.randn(*lead, 9, 6)
    mask = torch.rand(7, 9) > 0.2
    ours = F.scaled_dot_product_attention(q, k, v, mask)
    assert ours.shape == (*lead, 7, 6)
    torch.testing.assert_close(ours, TF.scaled_dot_product_attention(q, k, v, mask))


# ------------------------------------------------------------------------------------- dropout


def test_dropout_drops_what_the_definition_drops() -> None:
    from nnarch.kernels.attention import reference
    from nnarch.kernels.attention.op import attention_op

    for shape in ((2, 2, 2, 19, 30, 16, 16), (1, 2, 2, 1, 200, 32, 32), (1, 4, 2, 64, 96, 64, 64)):
        tensors = _inputs(*shape)
        rest = (None, None, torch.tensor([2**40 + 17]), 0.4, 0.25, -UNBOUNDED, 3)
        ours, _ = attention_op(*tensors, *rest)
        theirs, _ = reference.attention(*tensors, *rest)
        torch.testing.assert_close(ours, theirs)


def test_dropout_is_drawn_by_torch_and_kept_for_the_gradient() -> None:
    q, k, v = (t.double().requires_grad_() for t in _inputs(1, 2, 2, 12, 20, 8, 8))

    def run(*t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return F.scaled_dot_product_attention(*t, dropout_p=0.5)

    assert torch.equal(run(q, k, v), run(q, k, v))
    assert not torch.equal(run(q, k, v), F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert gradcheck(run, (q, k, v))
    assert not F.scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()


# ------------------------------------------------------------------------------------ bad input


_BAD: dict[str, tuple[dict[str, Any], str]] = {
    "integers": ({"query": torch.ones(1, 2, 3, 4, dtype=torch.int64)}, "query must be floating"),
    "dtypes": ({"key": torch.ones(1, 2, 5, 4).double()}, "key must be torch.float32"),
    "depth": ({"key": torch.ones(1, 2, 5, 3)}, r"key must have shape \(1, 2, 5, 4\)"),
    "length": ({"value": torch.ones(1, 2, 6, 4)}, r"value must have shape \(1, 2, 5, 4\)"),
    "batch": ({"key": torch.ones(2, 2, 5, 4)}, "key must have shape"),
    "heads": ({"query": torch.ones(1, 4, 3, 4)}, "enable_gqa=True"),
    "sharing": ({"query": torch.ones(1, 3, 3, 4), "enable_gqa": True}, "must be a multiple"),
    "dimensions": ({"key": torch.ones(2, 5, 4)}, "as many dimensions"),
    "mask shape": ({"attn_mask": torch.ones(3, 4)}, "mask must broadcast"),
    "mask dtype": ({"attn_mask": torch.ones(3, 5).long()}, "mask must be bool"),
    "lengths": ({"key_lengths": torch.ones(2).long()}, r"key_lengths must have shape \(1,\)"),
    "lengths dtype": ({"key_lengths": torch.ones(1)}, "must be whole numbers"),
    "dropout": ({"dropout_p": 1.5}, "between 0 and 1"),
    "window": ({"window": 0}, "window must be"),
}


@pytest.mark.parametrize("name", _BAD)
def test_bad_input(name: str) -> None:
    change, message = _BAD[name]
    good = {"query": torch.ones(1, 2, 3, 4)} | dict.fromkeys(
        ("key", "value"), torch.ones(1, 2, 5, 4)
    )
    with pytest.raises((ValueError, TypeError), match=message):
        F.scaled_dot_product_attention(**good | change)


def test_second_derivatives_are_refused() -> None:
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    (dq,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_backward is not differentiable"):
        torch.autograd.grad(dq.sum(), q)
