"""The modules of losses against their twins."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as TF

import nnarch


def test_cross_entropy_loss():
    loss = nnarch.nn.CrossEntropyLoss(torch.rand(9), label_smoothing=0.1, ignore_index=3)
    twin = torch.nn.CrossEntropyLoss(loss.weight, label_smoothing=0.1, ignore_index=3)
    assert repr(loss) == repr(twin) and loss.state_dict().keys() == twin.state_dict().keys()
    x, target = torch.randn(6, 9), torch.arange(6)
    torch.testing.assert_close(loss(x, target), twin(x, target))


def test_linear_cross_entropy_loss():
    torch.manual_seed(0)
    loss = nnarch.nn.LinearCrossEntropyLoss(8, 19, bias=True, label_smoothing=0.1, reduction="sum")
    assert "num_classes=19" in repr(loss)
    assert "label_smoothing=0.1" in repr(loss)
    head = loss.linear
    x, target = torch.randn(3, 5, 8), torch.randint(0, 19, (3, 5))
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    logits = TF.linear(x, head.weight, head.bias)
    expected = TF.cross_entropy(logits.flatten(0, 1), target.flatten(), **options)
    torch.testing.assert_close(loss(x, target), expected)
    with pytest.raises(ValueError, match="LinearCrossEntropyLoss: reduction"):
        nnarch.nn.LinearCrossEntropyLoss(8, 19, reduction="average")
    with pytest.raises(ValueError, match="LinearCrossEntropyLoss: label_smoothing"):
        nnarch.nn.LinearCrossEntropyLoss(8, 19, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"LinearCrossEntropyLoss: weight must have the shape"):
        nnarch.nn.LinearCrossEntropyLoss(8, 19, weight=torch.ones(3))


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyLoss"), reason="torch.nn has had the class since 2.13"
)
@pytest.mark.parametrize("places", [(), (4, 3)])
@pytest.mark.parametrize("probabilities", [False, True])
def test_linear_cross_entropy_loss_is_a_twin_of_torchs(places, probabilities):
    options = {"out_features": places, "bias": True, "weight": torch.rand(10)}
    ours = nnarch.nn.LinearCrossEntropyLoss(5, 10, **options)
    theirs = torch.nn.LinearCrossEntropyLoss(5, 10, **options)
    ours.load_state_dict(theirs.state_dict())
    x, target = torch.randn(6, 5), torch.randint(0, 10, (6, *places))
    if probabilities:
        target = torch.randn(6, 10, *places).softmax(1)
    torch.testing.assert_close(ours(x, target), theirs(x, target))
