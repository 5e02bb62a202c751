"""nn.Dropout: torch's module on our mask."""

from __future__ import annotations

import pytest
import torch

from nnarch import nn
from nnarch.kernels.dropout import reference


def test_training_and_eval():
    module = nn.Dropout(0.3)
    assert isinstance(module, torch.nn.Dropout) and repr(module) == repr(torch.nn.Dropout(0.3))
    x = torch.randn(20, 50)
    torch.manual_seed(5)
    y = module(x)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,))
    torch.testing.assert_close(y, reference.dropout(x, seed, 0.3))
    assert module.eval()(x) is x


def test_bad_probability():
    with pytest.raises(ValueError, match="between 0 and 1"):
        nn.Dropout(1.2)
