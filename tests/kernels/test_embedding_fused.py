"""embedding_layer_norm against torch in float64: sums, norms, dropout, gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import BACKENDS, DTYPES, compare, name_of, needs_poison, on_fresh_memory
from test_embedding import TOKENS, WEIGHT, problem
from tolerances import assert_as_accurate
from torch import Tensor
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch.kernels.dropout import reference as dropout
from nnarch.kernels.embedding.fused import embedding_sum

SEED = torch.tensor([0x1234_5678_9ABC_DEF0])


def _fused_arguments(seed: Tensor | None, normalize: bool) -> tuple[Any, ...]:
    tokens, weight = problem((9, 21, (3, 7)))
    gamma, beta = (torch.rand(21) + 0.5, torch.randn(21)) if normalize else (None, None)
    tables = (torch.randn(12, 21), torch.randint(12, (3, 7)), torch.randn(2, 21))
    return (
        tokens, weight, *tables, torch.randint(2, (3, 7)), gamma, beta, seed,
        1.5, 0, -1, normalize, 1e-5, 0.25 if seed is not None else 0.0,
    )  # fmt: skip


def _backward_arguments() -> list[tuple[Any, ...]]:
    *tables, gamma, _, seed, scale, offset, _, _, _, p = _fused_arguments(SEED.clone(), True)
    torch.manual_seed(0)
    mean, invstd, grad = torch.randn(21), torch.rand(21) + 0.5, torch.randn(3, 7, 21)
    return [(grad, *tables, gamma, mean, invstd, seed, scale, offset, p)]


SAMPLES = {
    "embedding_sum": lambda: [
        _fused_arguments(seed, normalize)
        for seed in (None, SEED.clone())
        for normalize in (False, True)
    ],
    "embedding_sum_backward": _backward_arguments,
}


def truth(
    tokens: Tensor,
    token_weight: Tensor,
    position_weight: Tensor | None = None,
    segments: Tensor | None = None,
    segment_weight: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    positions: Tensor | None = None,
    offset: int = 0,
    normalize: bool = True,
    scale: float = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    x = TF.embedding(tokens, token_weight, padding_idx) * scale
    if position_weight is not None:
        length = tokens.shape[-1]
        at = torch.arange(offset, offset + length) if positions is None else positions
        x = x + TF.embedding(at, position_weight)
    if segment_weight is not None:
        x = x + TF.embedding(segments, segment_weight)
    return TF.layer_norm(x, x.shape[-1:], norm_weight, norm_bias) if normalize else x


def tables(columns: int, dtype: torch.dtype, *names: str) -> dict[str, Tensor]:
    made = {
        "token_weight": torch.randn(50, columns),
        "position_weight": torch.randn(40, columns),
        "segment_weight": torch.randn(2, columns),
        "norm_weight": torch.rand(columns) + 0.5,
        "norm_bias": torch.randn(columns),
    }
    return {name: t.to(dtype) for name, t in made.items() if not names or name in names}


@pytest.mark.parametrize("columns", [1, 7, 16, 33, 64, 130, 768])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_fused(columns, dtype):
    """All at once, and every subset of the tables, forward and backward."""
    tokens, segments = torch.randint(50, (3, 11)), torch.randint(2, (3, 11))
    grad = torch.randn(3, 11, columns).to(dtype)
    optional = ("position_weight", "segment_weight")
    for count in range(3):
        for names in itertools.combinations(optional, count):
            fixed: dict[str, Any] = {"tokens": tokens}
            if "segment_weight" in names:
                fixed["segments"] = segments
            for norm in ((), ("norm_weight", "norm_bias"), ("norm_weight",)):
                if columns == 1:
                    continue  # the norm of one value is 0, its gradient what rounding left
                named = tables(columns, dtype, "token_weight", *names, *norm)

                def ours(fixed=fixed, **t: Tensor) -> Tensor:
                    return F.embedding_layer_norm(**fixed, **t)

                def theirs(fixed=fixed, **t: Tensor) -> Tensor:
                    return truth(**fixed, **t)

                compare(ours, theirs, named, grad, ulps=64 if dtype == torch.float32 else None)
            named = tables(columns, dtype, "token_weight", *names)
            fixed |= {"normalize": False, "scale": columns**0.5}

            def plain(fixed=fixed, **t: Tensor) -> Tensor:
                return F.embedding_layer_norm(**fixed, **t)

            def plain_truth(fixed=fixed, **t: Tensor) -> Tensor:
                return truth(**fixed, **t)

            compare(plain, plain_truth, named, grad, ulps=8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_positions(backend, normalize):
    tokens = torch.randint(50, (3, 11))
    t = tables(24, torch.float64, "token_weight", "position_weight")
    for leaf in t.values():
        leaf.requires_grad_()
    for options in (
        {"offset": 29},
        {"positions": torch.randint(40, (3, 11))},
        {"positions": torch.randint(40, (11,))},
        {"positions": torch.randint(40, (3, 1)).int()},
        {"padding_idx": int(tokens[0, 0])},
    ):
        with nnarch.use_backend(backend):
            y = F.embedding_layer_norm(tokens, **t, **options, normalize=normalize)
            mine = torch.autograd.grad(y.square().sum(), list(t.values()))
        at = options.get("positions")
        plain = options | ({} if at is None else {"positions": at.expand(3, 11)})
        z = truth(tokens, **t, **plain, normalize=normalize)
        torch.testing.assert_close(y, z)
        theirs = torch.autograd.grad(z.square().sum(), list(t.values()))
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("columns", [5, 64, 130])
def test_dropout_is_the_definition(columns, normalize):
    """As dropout of the result, forward and backward, for the same seed."""
    tokens = torch.randint(50, (4, 9))
    t = tables(columns, torch.float64, "token_weight", "position_weight")
    if normalize:
        t |= tables(columns, torch.float64, "norm_weight", "norm_bias")
    leaves = [leaf.requires_grad_() for leaf in t.values()]
    torch.manual_seed(7)
    y = F.embedding_layer_norm(tokens, **t, normalize=normalize, dropout_p=0.3)
    torch.manual_seed(7)
    seed = torch.randint(2**63 - 1, (1,))
    z = dropout.dropout(truth(tokens, **t, normalize=normalize), seed, 0.3)
    torch.testing.assert_close(y, z)
    mine = torch.autograd.grad(y.square().sum(), leaves)
    torch.testing.assert_close(mine, torch.autograd.grad(z.square().sum(), leaves))
    still = F.embedding_layer_norm(tokens, **t, normalize=normalize, dropout_p=0.3, training=False)
    torch.testing.assert_close(still, truth(tokens, **t, normalize=normalize))


@pytest.mark.parametrize("normalize", [False, True])
def test_large_output_of_the_fused_form(normalize):
    """Past 6 MB it is streamed; many tasks add up the vectors' gradients."""
    t = tables(128, torch.float32)
    if not normalize:
        t = {n: v for n, v in t.items() if "norm" not in n}
    tokens, segments = torch.randint(50, (400, 40)), torch.randint(2, (400, 40))
    grad = torch.randn(400, 40, 128)
    options: dict[str, Any] = {"tokens": tokens, "segments": segments, "normalize": normalize}
    compare(
        lambda **n: F.embedding_layer_norm(**options, **n),
        lambda **n: truth(**options, **n),
        t,
        grad,
        ulps=256,
    )


def test_gradcheck_of_the_fused_form():
    tokens, segments = torch.tensor([[1, 3, 1], [0, 2, 3]]), torch.tensor([[0, 0, 1], [1, 1, 0]])
    t = tables(5, torch.float64)
    leaves = [leaf.requires_grad_() for leaf in t.values()]

    def function(*values: Tensor) -> Tensor:
        named = dict(zip(t, values, strict=True))
        return F.embedding_layer_norm(tokens, segments=segments, **named, scale=1.7)

    assert torch.autograd.gradcheck(function, leaves)


def test_second_derivative_raises():
    t = tables(5, torch.float64, "token_weight")
    t["token_weight"].requires_grad_()
    y = F.embedding_layer_norm(torch.tensor([1, 2]), **t)
    (first,) = torch.autograd.grad(y.square().sum(), t["token_weight"], create_graph=True)
    with pytest.raises(NotImplementedError, match="embedding_sum_backward is not differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value):
    weight = torch.randn(6, 40)
    weight[2, 5] = value
    tokens = torch.tensor([0, 2, 5])
    y = F.embedding_layer_norm(tokens, weight)
    assert torch.equal(y.isnan(), torch.tensor([False, True, False])[:, None].expand(3, 40))
    z = F.embedding_layer_norm(tokens, weight, normalize=False)
    torch.testing.assert_close(z, weight[tokens], equal_nan=True)


def test_equal_values_give_zeros():
    """A row without variance: 0 and not infinity."""
    y = F.embedding_layer_norm(torch.tensor([0, 1]), torch.tensor([[3.0] * 20, [0.0] * 20]))
    assert torch.equal(y, torch.zeros(2, 20))


@needs_poison
def test_reads_no_uninitialised_memory():
    arguments = _fused_arguments(SEED, True)
    fresh = on_fresh_memory(lambda: embedding_sum(*arguments))
    for a, b in zip(fresh, embedding_sum(*arguments), strict=True):
        assert torch.equal(a, b)


def test_algorithms():
    tokens, weight = problem((9, 12, (6,)))
    weight.requires_grad_()
    with nnarch.trace() as trace:
        F.embedding(tokens, weight).sum().backward()
        F.embedding_layer_norm(tokens, weight).sum().backward()
        F.embedding_layer_norm(tokens, weight, normalize=False)
    assert [(e.op, e.backend, e.algorithm) for e in trace] == [
        ("embedding", "cpu", "gather"),
        ("embedding_grad", "cpu", "sorted"),
        ("embedding_sum", "cpu", "sum_norm"),
        ("embedding_sum_backward", "cpu", "norm_grad"),
        ("embedding_grad", "cpu", "sorted"),
        ("embedding_sum", "cpu", "sum"),
    ]


@pytest.mark.parametrize("normalize", [False, True])
def test_compile(normalize):
    tokens, t = torch.randint(50, (2, 6)), tables(8, torch.float32, "token_weight")
    weight = t["token_weight"].requires_grad_()
    torch._dynamo.reset()

    def run(tokens: Tensor, weight: Tensor) -> Tensor:
        y = F.embedding_layer_norm(tokens, weight, normalize=normalize)
        return y + F.embedding(tokens, weight, 0)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, weight), run(tokens, weight))
    mine = torch.autograd.grad(compiled(tokens, weight).square().sum(), weight)
    torch.testing.assert_close(
        mine, torch.autograd.grad(run(tokens, weight).square().sum(), weight)
    )


BAD_FUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"tokens": torch.tensor([7])}, IndexError, "tokens must be from 0 to 4"),
    ({"position_weight": torch.randn(1, 6)}, IndexError, "position_weight must have a row"),
    ({"position_weight": WEIGHT, "offset": -1}, IndexError, "position_weight must have a row"),
    ({"position_weight": torch.randn(3, 4)}, ValueError, "position_weight must have the 6"),
    ({"position_weight": WEIGHT.double()}, TypeError, "position_weight must be torch.float32"),
    (
        {"position_weight": WEIGHT, "positions": torch.tensor([9, 0])},
        IndexError,
        "positions must be from 0 to 4",
    ),
    (
        {"position_weight": WEIGHT, "positions": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        "positions must broadcast",
    ),
    ({"positions": TOKENS}, ValueError, "position_weight must be given"),
    ({"segments": TOKENS}, ValueError, "segment_weight must be given"),
    ({"segment_weight": WEIGHT}, ValueError, "segments must be given"),
    (
        {"segment_weight": WEIGHT[:2], "segments": TOKENS},
        IndexError,
        "segments must be from 0 to 1",
    ),
    ({"norm_weight": torch.randn(5)}, ValueError, "norm_weight must have shape"),
    ({"norm_bias": torch.randn(6), "normalize": False}, ValueError, "must be None where"),
    ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1"),
    ({"padding_idx": 5}, ValueError, "padding_idx must be a row"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_FUSED, ids=[b[2] for b in BAD_FUSED])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_of_the_fused_form(change, error, message, backend):
    arguments = {"tokens": TOKENS, "token_weight": WEIGHT} | change
    with nnarch.use_backend(backend), pytest.raises(error, match=f"embedding_.*: .*{message}"):
        F.embedding_layer_norm(**arguments)


def test_accuracy_of_the_norm():
    """Rows far from zero: the mean is taken off before squares are added."""
    weight = torch.randn(20, 512) + 100
    tokens = torch.arange(20)
    wide = TF.layer_norm(weight.double(), (512,))
    assert_as_accurate(F.embedding_layer_norm(tokens, weight), TF.layer_norm(weight, (512,)), wide)
