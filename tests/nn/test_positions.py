"""Sines and cosines of positions."""

from __future__ import annotations

import math

import pytest
import torch

import nnarch.nn as nn
from nnarch.nn.positions import sinusoids


@pytest.mark.parametrize("d_model", [1, 2, 7, 16])
def test_the_papers_formula(d_model):
    expected = [
        [
            (math.cos if j % 2 else math.sin)(p / 10_000 ** (2 * (j // 2) / d_model))
            for j in range(d_model)
        ]
        for p in range(20)
    ]
    torch.testing.assert_close(sinusoids(20, d_model), torch.tensor(expected, dtype=torch.float64))
    order = [*range(0, d_model, 2), *range(1, d_model, 2)]
    expected = sinusoids(20, d_model)[:, order]
    assert torch.equal(sinusoids(20, d_model, "concatenated"), expected)


@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
def test_positions_are_added(layout):
    module = nn.SinusoidalPositionalEncoding(6, 4, layout=layout)
    table = sinusoids(30, 6, layout).float()
    x = torch.randn(2, 3, 6)
    assert torch.equal(module(x), x + table[:3])
    assert torch.equal(module(x[0], 1), x[0] + table[1:4])
    assert torch.equal(module(x, 20), x + table[20:23])  # further than what was made
    module.batch_first = False
    assert torch.equal(module(x), x + table[:2, None])
    assert module.double().table.dtype == torch.float64
    assert module(x.double(), 28).dtype == torch.float64


def test_it_has_no_state():
    module = nn.SinusoidalPositionalEncoding(6, dtype=torch.bfloat16)
    assert module.state_dict() == {} and list(module.parameters()) == []
    assert module.table.dtype == torch.bfloat16
    assert repr(module) == "SinusoidalPositionalEncoding(6, layout=interleaved)"


def test_it_compiles():
    module = nn.SinusoidalPositionalEncoding(6)
    x = torch.randn(2, 3, 6)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="layout must be one of interleaved, concatenated"):
        nn.SinusoidalPositionalEncoding(6, layout="mixed")
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 512"):
        nn.SinusoidalPositionalEncoding(0)
    module = nn.SinusoidalPositionalEncoding(6)
    with pytest.raises(ValueError, match=r"x must be \[batch, length, 6\]"):
        module(torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match="offset must not be negative, got -1"):
        module(torch.randn(2, 3, 6), -1)
