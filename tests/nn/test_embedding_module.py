"""nn.Embedding: torch's module on our gather."""

from __future__ import annotations

import copy

import pytest
import torch

import nnarch
from nnarch import nn


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 2}, {"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}],
    ids=str,
)
def test_against_torch(options):
    mine, theirs = nn.Embedding(9, 6, **options), torch.nn.Embedding(9, 6, **options)
    assert isinstance(mine, torch.nn.Embedding) and repr(mine) == repr(theirs)
    theirs.load_state_dict(mine.state_dict())
    tokens = torch.tensor([[1, 2, 8], [2, 2, 0]])
    for module in (mine, theirs):
        module(tokens).square().sum().backward()
    torch.testing.assert_close(mine(tokens), theirs(tokens))
    grads = [m.weight.grad.to_dense() if m.sparse else m.weight.grad for m in (mine, theirs)]
    torch.testing.assert_close(*grads)
    torch.testing.assert_close(copy.deepcopy(mine)(tokens), mine(tokens))


def test_runs_our_kernel():
    with nnarch.trace() as trace:
        nn.Embedding(4, 3)(torch.tensor([1]))
    assert [e.op for e in trace] == ["embedding"]


def test_bad_construction():
    with pytest.raises(ValueError, match="dtype must be one of"):
        nn.Embedding(4, 3, _weight=torch.zeros(4, 3, dtype=torch.complex64))
    with pytest.raises(ValueError, match="sparse cannot be combined"):
        nn.Embedding(4, 3, scale_grad_by_freq=True, sparse=True)


def test_accelerated():
    """Swapped in a model whose input is tokens; as a function too."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = torch.nn.Embedding(30, 16), torch.nn.Linear(16, 5)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            position = torch.nn.functional.embedding(tokens % 7, self.table.weight)
            return self.head(self.table(tokens) + position)

    model, tokens = Model().eval(), torch.randint(30, (3, 9))
    with torch.no_grad():
        expected = model(tokens)
        fast = nnarch.accelerate(model)
        for _ in range(3):
            torch.testing.assert_close(fast(tokens), expected)
        with nnarch.trace() as trace:
            fast(tokens)
    assert [e.op for e in trace].count("embedding") == 2
