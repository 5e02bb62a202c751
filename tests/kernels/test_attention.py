"""Attention against a dense definition in float64: masks, bands, lengths, shared heads, layouts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import SHAPES, check, conditions, dense, inputs
from kernel_cases import DTYPES, check_under_isa, name_of
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as TF

from nnarch import functional as F
from nnarch.kernels.attention import reference
from nnarch.kernels.attention.op import UNBOUNDED, attention_op


def _sample(seed: bool = False, mask: Tensor | None = None, lengths: bool = False) -> tuple:
    """Arguments of the operation: 2 sequences, 4 heads on 2, 5 queries, 13 keys, 12 and 20 wide."""
    return (
        *inputs(2, 4, 2, 5, 13, 12, 20),
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
        out, lse = reference.attention(*arguments)
        wants_mask = mask is not None and mask.dtype != torch.bool
        grads = torch.randn_like(out), torch.randn_like(lse) if wants_mask else None
        samples.append((*grads, q, k, v, mask, *rest[:2], out, lse, *rest[2:], wants_mask))
    return samples


SAMPLES = {"attention": _samples, "attention_backward": _backward_samples}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check([t.to(dtype) for t in inputs(*shape)], {})


@pytest.mark.parametrize("size", [(3, 2, 37, 53), (2, 2, 64, 192), (2, 3, 2, 130)], ids=str)
@pytest.mark.parametrize("name", conditions(1, 1, 1, 1))
def test_conditions(name: str, size: tuple[int, int, int, int]) -> None:
    b, h, n, s = size
    check(inputs(b, h, h, n, s, 32, 32), conditions(*size)[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("name", ["causal", "additive mask with -inf", "all"])
def test_conditions_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    options = {
        n: o.to(dtype) if isinstance(o, Tensor) and o.is_floating_point() else o
        for n, o in conditions(2, 2, 37, 53)[name].items()
    }
    check([t.to(dtype) for t in inputs(2, 2, 2, 37, 53, 24, 24)], options)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", conditions(1, 1, 1, 1))
def test_every_condition_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    for b, h, n, s in ((2, 2, 37, 141), (2, 4, 1, 67)):
        options = {
            n_: o.to(dtype) if isinstance(o, Tensor) and o.is_floating_point() else o
            for n_, o in conditions(b, h, n, s)[name].items()
        }
        check([t.to(dtype) for t in inputs(b, h, h, n, s, 20, 28)], options, gradients=False)


@pytest.mark.parametrize("scale", [0.0, -0.7, 1.3, 0.25, 1e-30], ids=str)
@pytest.mark.parametrize("n", [2, 20])
def test_scales(n: int, scale: float) -> None:
    """Split between queries and scores, or whole in queries where a mask is added."""
    for mask in (None, torch.randn(n, 50)):
        tensors = inputs(2, 2, 2, n, 50, 24, 16)
        check(tensors, {"scale": scale, "attn_mask": mask})
        _, lse = F.scaled_dot_product_attention(*tensors, mask, scale=scale, return_lse=True)
        q, k, _ = (t.double() for t in tensors)
        scores = scale * (q @ k.mT) + (0.0 if mask is None else mask.double())
        torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=2e-6, atol=2e-6)


def run_everything_forward() -> None:
    """All shapes and conditions, in a process with an instruction set of its own."""
    for shape in (*SHAPES.values(), (1, 1, 1, 300, 277, 64, 64), (1, 2, 1, 3, 1100, 48, 33)):
        for dtype in DTYPES:
            check([t.to(dtype) for t in inputs(*shape)], {}, gradients=False)
    for size in ((2, 2, 40, 150), (2, 3, 2, 130)):
        for options in conditions(*size).values():
            check(inputs(size[0], size[1], size[1], *size[2:], 32, 32), options, gradients=False)
    test_dropout_drops_what_the_definition_drops()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_instruction_sets(isa: str) -> None:
    check_under_isa(isa, run_everything_forward)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 3001), (1, 2, 1, 40, 1500), (2, 3, 3, 130, 70)])
def test_threads(shape: tuple[int, ...]) -> None:
    """Cut into ranges of keys, and into blocks of queries: the same bits for any number."""
    tensors, before = inputs(*shape, 32, 32), torch.get_num_threads()
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
        check(inputs(1, 2, 2, n, s, 13, 7), {"is_causal": causal}, gradients=False)


@pytest.mark.parametrize("n, s", [(0, 5), (5, 0), (0, 0)])
def test_nothing(n: int, s: int) -> None:
    q, k, v = (t.requires_grad_() for t in inputs(2, 3, 3, n, s, 8, 6))
    y = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(y, torch.zeros(2, 3, n, 6))
    for gradient, t in zip(torch.autograd.grad(y.sum(), (q, k, v)), (q, k, v), strict=True):
        assert torch.equal(gradient, torch.zeros_like(t))


def test_a_query_that_sees_nothing_gives_zeros_and_no_gradient() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(1, 2, 2, 9, 20, 16, 16))
    mask = torch.ones(9, 20, dtype=torch.bool)
    mask[4] = False
    y, lse = F.scaled_dot_product_attention(q, k, v, mask, return_lse=True)
    assert not y[:, :, 4].any() and (lse[:, :, 4] == -math.inf).all()
    dq, dk, dv = torch.autograd.grad(y.sum(), (q, k, v))
    assert not dq[:, :, 4].any()
    assert all(t.isfinite().all() for t in (dq, dk, dv))


@pytest.mark.parametrize("scores", [1e4, 1e-40, 3e38])
def test_extreme_scores(scores: float) -> None:
    q, k, v = inputs(1, 2, 2, 20, 40, 8, 8)
    ours = F.scaled_dot_product_attention(q, k, v, scale=scores)
    truth = dense(q.double(), k.double(), v.double(), scale=scores)
    big = (q @ k.mT).abs().max() * scores > 3e38  # infinite in float32: one key wins, or NaN
    if big:
        assert torch.equal(ours.isnan(), dense(q, k, v, scale=scores).isnan())
    else:
        assert torch.allclose(ours.double(), truth, rtol=1e-3, atol=1e-3)


def test_log_sum_exp_and_its_gradient() -> None:
    q, k, v = (t.double().requires_grad_() for t in inputs(1, 2, 2, 9, 20, 8, 8))
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
    tensors = [t.double().requires_grad_() for t in inputs(1, 4, 2, 6, 9, 5, 7)]
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
    q, k, v = inputs(2, 3, 3, 19, 29, 16, 16)
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


@pytest.mark.parametrize(
    "query, key, value",
    [
        ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 6)),
        ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
        ((1, 1, 5, 8), (2, 3, 7, 8), (2, 1, 7, 8)),
        ((3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
        ((2, 2, 3, 5, 8), (2, 1, 3, 7, 8), (1, 2, 3, 7, 8)),
    ],
    ids=str,
)
def test_leading_dimensions_broadcast(query: Any, key: Any, value: Any) -> None:
    tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in
               (query, key, value)]  # fmt: skip
    mine = F.scaled_dot_product_attention(*tensors, is_causal=True)
    truth = TF.scaled_dot_product_attention(*tensors, is_causal=True)
    grad = torch.randn_like(truth)
    torch.testing.assert_close(mine, truth)
    torch.testing.assert_close(
        torch.autograd.grad(mine, tensors, grad), torch.autograd.grad(truth, tensors, grad)
    )


def test_a_shared_batch_of_grouped_heads_broadcasts() -> None:
    q, k = torch.randn(3, 4, 5, 8), torch.randn(1, 2, 7, 8)
    mine = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    torch.testing.assert_close(mine, TF.scaled_dot_product_attention(q, k, k, enable_gqa=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=name_of)
def test_a_float32_mask_beside_other_dtypes(dtype: torch.dtype) -> None:
    """Finite numbers stay finite: a query that they mask altogether sees all keys alike."""
    q, k = torch.randn(2, 2, 4, 8, dtype=dtype), torch.randn(2, 2, 6, 8, dtype=dtype)
    mask = torch.randn(4, 6)
    mask[0, 2], mask[1, :3], mask[2] = -math.inf, torch.finfo(torch.float32).min, -1e6
    mine = F.scaled_dot_product_attention(q, k, k, attn_mask=mask)
    wide = [t.double() for t in (q, k, k)]
    truth = TF.scaled_dot_product_attention(*wide, attn_mask=mask.double())
    assert mine.dtype == dtype
    torch.testing.assert_close(mine.double(), truth, rtol=2e-2, atol=2e-2)


def test_dropout_drops_what_the_definition_drops() -> None:
    for shape in ((2, 2, 2, 19, 30, 16, 16), (1, 2, 2, 1, 200, 32, 32), (1, 4, 2, 64, 96, 64, 64)):
        tensors = inputs(*shape)
        rest = (None, None, torch.tensor([2**40 + 17]), 0.4, 0.25, -UNBOUNDED, 3)
        ours, _ = attention_op(*tensors, *rest)
        theirs, _ = reference.attention(*tensors, *rest)
        torch.testing.assert_close(ours, theirs)


def test_dropout_is_drawn_by_torch_and_kept_for_the_gradient() -> None:
    q, k, v = (t.double().requires_grad_() for t in inputs(1, 2, 2, 12, 20, 8, 8))

    def run(*t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return F.scaled_dot_product_attention(*t, dropout_p=0.5)

    assert torch.equal(run(q, k, v), run(q, k, v))
    assert not torch.equal(run(q, k, v), F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))
    assert gradcheck(run, (q, k, v))
    assert not F.scaled_dot_product_attention(q, k, v, dropout_p=1.0).any()


def test_second_derivatives_are_refused() -> None:
    q = torch.randn(1, 1, 3, 4, requires_grad=True)
    (dq,) = torch.autograd.grad(F.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_backward is not differentiable"):
        torch.autograd.grad(dq.sum(), q)
