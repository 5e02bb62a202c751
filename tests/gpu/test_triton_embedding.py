"""The Triton embeddings in the interpreter, against the definitions in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from triton_cases import DTYPES, poisoned_memory  # noqa: E402

import nnarch  # noqa: E402
from nnarch import functional as F  # noqa: E402
from nnarch.kernels.embedding import reference, triton_fused, triton_kernel  # noqa: E402

SEED = 0x1234_5678_9ABC_DEF0
SIZES = [(5, 3, (2,)), (9, 16, (3, 7)), (3, 70, (40,)), (40, 300, (2, 9))]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_and_gradient(size, dtype):
    rows, columns, shape = size
    tokens, weight = torch.randint(rows, shape), torch.randn(rows, columns).to(dtype)
    with poisoned_memory():
        y = triton_kernel.embedding(tokens, weight, -1, False, False)
    assert torch.equal(y, weight[tokens])
    grad = torch.randn(*shape, columns).to(dtype)
    for rest in ((-1, 1.0, False), (1, 1.5, False), (-1, 1.0, True)):
        mine = triton_kernel.embedding_grad(grad, tokens, rows, *rest)
        theirs = reference.embedding_grad(grad, tokens, rows, *rest)
        truth = reference.embedding_grad(grad.double(), tokens, rows, *rest)
        assert_as_accurate(mine, theirs, truth)


def test_strided_ids_and_tables():
    tokens = torch.randint(9, (7, 6))[:, ::2].int()
    weight = torch.randn(20, 9).t()
    assert torch.equal(
        triton_kernel.embedding(tokens, weight, -1, False, False), weight[tokens.long()]
    )


def test_unknown_rows_are_nan():
    """On a GPU nobody looks at the indices before; what is not there must not look like a value."""
    y = triton_kernel.embedding(torch.tensor([0, 5, -1]), torch.ones(5, 4), -1, False, False)
    assert y[0].eq(1).all() and y[1:].isnan().all()


def fused_arguments(columns, dtype, seed, normalize, positions):
    tables = [torch.randn(n, columns).to(dtype) for n in (9, 12, 2)]
    tokens, segments = torch.randint(9, (3, 7)), torch.randint(2, (3, 7))
    at = torch.randint(12, (3, 7)) if positions else None
    vectors = [torch.rand(columns).to(dtype) for _ in range(2)] if normalize else [None, None]
    p = 0.25 if seed is not None else 0.0
    return (
        tokens, tables[0], tables[1], at, tables[2], segments, *vectors, seed,
        1.5, 0 if positions else 4, -1, normalize, 1e-5, p,
    )  # fmt: skip


def wide(arguments):
    return [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    ]


@pytest.mark.parametrize("columns", [5, 16, 130])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, SEED], ids=["", "dropout"])
@pytest.mark.parametrize("normalize", [False, True])
def test_fused(columns, dtype, seed, normalize):
    seed = None if seed is None else torch.tensor([seed])
    for positions in (False, True):
        arguments = fused_arguments(columns, dtype, seed, normalize, positions)
        with poisoned_memory():
            mine = triton_fused.embedding_sum(*arguments)
        theirs = reference.embedding_sum(*arguments)
        truth = reference.embedding_sum(*wide(arguments))
        for a, b, c in zip(mine, theirs, truth, strict=True):
            assert_as_accurate(a, b, c, ulps=16)


@pytest.mark.parametrize("columns", [5, 130])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, SEED], ids=["", "dropout"])
def test_fused_backward(columns, dtype, seed, monkeypatch):
    monkeypatch.setattr(triton_fused, "_PARTS", 4)  # several rows a program
    seed = None if seed is None else torch.tensor([seed])
    forward = fused_arguments(columns, dtype, seed, True, False)
    _, mean, invstd = reference.embedding_sum(*forward)
    *tables, gamma, _, _, scale, offset, _, _, _, p = forward
    grad = torch.randn(3, 7, columns).to(dtype)
    arguments = (grad, *tables, gamma, mean, invstd, seed, scale, offset, p)
    with poisoned_memory():
        mine = triton_fused.embedding_sum_backward(*arguments)
    theirs = reference.embedding_sum_backward(*arguments)
    truth = reference.embedding_sum_backward(*wide(arguments))
    for a, b, c in zip(mine, theirs, truth, strict=True):
        assert_as_accurate(a, b, c, ulps=16)


def test_gradients_through_the_public_function():
    tokens, segments = torch.randint(9, (2, 5)), torch.randint(2, (2, 5))
    leaves = [torch.randn(n, 12, requires_grad=True) for n in (9, 5, 2)]
    results = []
    for backend in ("triton", "reference"):
        with nnarch.use_backend(backend):
            torch.manual_seed(4)
            token, position, segment = leaves
            y = F.embedding_layer_norm(
                tokens, token, position, segments, segment, dropout_p=0.2, padding_idx=1
            )
            results.append(torch.autograd.grad(y.square().sum(), leaves))
    torch.testing.assert_close(*results)
