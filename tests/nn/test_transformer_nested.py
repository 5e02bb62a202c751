"""Transformer stacks and nested tensors, as which torch.nn's encoder takes padded sequences."""

from __future__ import annotations

import warnings

import pytest
import torch

import nnarch.nn as nn

E, H, FF = 12, 3, 20


def test_nothing_is_said_about_nested_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Transformer(E, H, 1, 1, FF)
        nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, norm_first=True), 1)
    assert model.encoder.enable_nested_tensor and not model.encoder.use_nested_tensor


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_stack_of_nested_sequences():
    stacks = []
    for space in (nn, torch.nn):
        layer = space.TransformerEncoderLayer(E, 2, FF, batch_first=True)
        stacks.append(space.TransformerEncoder(layer, 2).eval())
    ours, theirs = stacks
    theirs.load_state_dict(ours.state_dict())
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad():
        for found, wanted in zip(ours(x).unbind(), theirs(x).unbind(), strict=True):
            torch.testing.assert_close(found, wanted)
