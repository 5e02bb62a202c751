"""embedding against torch: gathers, gradients, what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_cases import BACKENDS, DTYPES, compare, name_of, on_fresh_memory
from torch import Tensor
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch.kernels.embedding.op import embedding_grad, embedding_op

# Rows and columns of the table, shape of the tokens.
SIZES = [
    (1, 1, (1,)),
    (5, 3, ()),
    (7, 16, (4,)),
    (3, 33, (200,)),  # far more tokens than rows
    (300, 65, (2, 9)),
    (50, 130, (3, 4, 5)),
    (2000, 64, (33, 7)),
    (40, 300, (257,)),
]


def problem(size, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    rows, columns, shape = size
    return torch.randint(rows, shape), torch.randn(rows, columns).to(dtype)


SAMPLES = {
    "embedding": lambda: [
        (*problem(size), padding, False, False) for size in SIZES[4:7] for padding in (-1, 2)
    ],
    "embedding_grad": lambda: [
        (torch.randn(3, 7, 21), torch.randint(9, (3, 7)), 9, 2, 1.5, False),
        (torch.randn(300, 130), torch.randint(40, (300,)), 40, -1, 1.0, True),
    ],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gather(size, dtype, backend):
    tokens, weight = problem(size, dtype)
    with nnarch.use_backend(backend):
        for at in (tokens, tokens.int()):
            y = on_fresh_memory(lambda at=at: F.embedding(at, weight))
            assert torch.equal(y, TF.embedding(tokens, weight)) and y.is_contiguous()


def test_large_output_is_streamed():
    tokens, weight = problem((40, 64, (30000,)))
    assert torch.equal(F.embedding(tokens, weight), weight[tokens])
    odd = torch.randn(40, 61)
    assert torch.equal(F.embedding(tokens, odd), odd[tokens])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_gradient(size, dtype, padding_idx):
    tokens, weight = problem(size, dtype)
    grad = torch.randn(*tokens.shape, weight.shape[1]).to(dtype)

    def ours(weight: Tensor) -> Tensor:
        return F.embedding(tokens, weight, padding_idx)

    def theirs(weight: Tensor) -> Tensor:
        return TF.embedding(tokens, weight, padding_idx)

    compare(ours, theirs, {"weight": weight}, grad, ulps=8 + tokens.numel() / 8)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gradient_by_frequency(size):
    tokens, weight = problem(size, torch.float64)
    weight.requires_grad_()
    grad = torch.randn(*tokens.shape, weight.shape[1], dtype=torch.float64)
    arguments = (tokens, weight, None, None, 2.0, True)
    mine = torch.autograd.grad(F.embedding(*arguments), weight, grad)
    torch.testing.assert_close(mine, torch.autograd.grad(TF.embedding(*arguments), weight, grad))


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_sparse_gradient(padding_idx):
    tokens, weight = problem((20, 5, (4, 6)), torch.float64)
    tokens[0, :3] = 3
    weight.requires_grad_()
    gradients = []
    for function in (F.embedding, TF.embedding):
        y = function(tokens, weight, padding_idx, sparse=True)
        (grad,) = torch.autograd.grad(y.square().sum(), weight)
        assert grad.is_sparse
        gradients.append(grad.coalesce())
    torch.testing.assert_close(*gradients)
    optimizer = torch.optim.SparseAdam([weight])
    F.embedding(tokens, weight, sparse=True).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("padding_idx", [None, 7])
def test_large_table_gradient(columns, padding_idx):
    """Past 6 MB the gradient is streamed; past 8 MB, zeros are memory nobody wrote."""
    weight = torch.randn(30000, columns, requires_grad=True)
    for count in (500, 40000):
        tokens = torch.randint(30000, (count,))
        tokens[:3] = 7
        grad = torch.randn(count, columns)
        (mine,) = torch.autograd.grad(F.embedding(tokens, weight, padding_idx), weight, grad)
        (truth,) = torch.autograd.grad(TF.embedding(tokens, weight, padding_idx), weight, grad)
        torch.testing.assert_close(mine, truth)
        mine += 1  # it may be written, in pages that are not there yet, and outlives its makers
        del tokens, grad
        torch.testing.assert_close(mine, truth + 1)


def test_order_of_sums_is_fixed():
    tokens, _ = problem((3, 40, (5000,)))
    grad = torch.randn(5000, 40)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(embedding_grad(grad, tokens, 3, -1, 1.0, False))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_expanded_and_strided():
    """`.sum()`'s gradient has strides 0; tokens may be views."""
    _, weight = problem((9, 12, (1,)), torch.float64)
    weight.requires_grad_()
    both = torch.randint(9, (6, 10))
    for tokens in (both[:, ::2], both.t(), both[:1].expand(4, 10), both.int()[:, 1:]):
        mine = torch.autograd.grad(F.embedding(tokens, weight).sum(), weight)
        truth = torch.autograd.grad(TF.embedding(tokens, weight).sum(), weight)
        torch.testing.assert_close(mine, truth)
    turned = weight.detach().t().contiguous().t()
    assert torch.equal(F.embedding(both, turned), turned[both])


def test_max_norm_leaves_a_read_only_array():
    table = np.random.rand(5, 3).astype(np.float32)
    table.flags.writeable = False
    with pytest.raises(ValueError, match="must not be read-only"):
        F.embedding(np.array([1, 2]), table, max_norm=0.1)


def test_max_norm():
    tokens, weight = problem((9, 12, (6,)))
    mine, theirs = weight.clone(), weight.clone()
    for norm_type in (2.0, 1.0):
        y = F.embedding(tokens, mine, None, 1.5, norm_type)
        torch.testing.assert_close(y, TF.embedding(tokens, theirs, None, 1.5, norm_type))
        torch.testing.assert_close(mine, theirs)


def test_gradcheck():
    tokens = torch.tensor([[1, 3, 1], [0, 2, 3]])
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for padding_idx in (None, 3):

        def function(w: Tensor, padding_idx=padding_idx) -> Tensor:
            return F.embedding(tokens, w, padding_idx)

        assert torch.autograd.gradgradcheck(function, weight)
    assert torch.autograd.gradcheck(lambda w: F.embedding(tokens, w), weight)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)])
def test_no_tokens(shape):
    weight = torch.randn(5, 4, requires_grad=True)
    y = F.embedding(torch.zeros(shape, dtype=torch.int64), weight)
    assert y.shape == (*shape, 4)
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(grad, torch.zeros(5, 4))


TOKENS, WEIGHT = torch.tensor([1, 4]), torch.randn(5, 6)
BAD = [
    (lambda: F.embedding(torch.tensor([5]), WEIGHT), IndexError, "input must be from 0 to 4"),
    (lambda: F.embedding(torch.tensor([-1]), WEIGHT), IndexError, "got -1"),
    (lambda: F.embedding(torch.tensor([5]), WEIGHT), ValueError, "the table has 5 rows"),
    (lambda: F.embedding(torch.tensor([0]), WEIGHT[:0]), IndexError, "the table has 0 rows"),
    (lambda: F.embedding(TOKENS.float(), WEIGHT), TypeError, "input must be int64 or int32"),
    (lambda: F.embedding(TOKENS, WEIGHT[0]), ValueError, "weight must be"),
    (lambda: F.embedding(TOKENS, WEIGHT.long()), TypeError, "weight must be floating point"),
    (lambda: F.embedding(TOKENS, WEIGHT, 5), ValueError, "padding_idx must be a row"),
    (
        lambda: F.embedding(TOKENS, WEIGHT, None, None, 2.0, True, True),
        ValueError,
        "sparse gradients cannot",
    ),
    (
        lambda: embedding_grad(torch.randn(3, 6), TOKENS, 5, -1, 1.0, False),
        ValueError,
        "grad must be",
    ),
    (
        lambda: embedding_grad(torch.randn(2, 6), TOKENS, 4, -1, 1.0, False),
        IndexError,
        "tokens must be from 0 to 3",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[b[2] for b in BAD])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(call, error, message, backend):
    with nnarch.use_backend(backend), pytest.raises(error, match=f"embedding.*: .*{message}"):
        call()


def test_directly_called_operation_checks_ids():
    with pytest.raises(IndexError, match="input must be from 0 to 4"):
        embedding_op(torch.tensor([[5]]), WEIGHT, -1, False, False)
