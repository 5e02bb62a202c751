"""What comes back from an accelerated model: views, memory formats, kinds of dicts."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from accelerate_helpers import Model, X, assert_same, convolution
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

import nnarch


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.c(x).view_as(x.flatten(1)),
        lambda self, x: torch.view_as_real(torch.view_as_complex(self.c(x)[..., :2])),
        lambda self, x: self.c(x).view(size=(2, -1)),
        lambda self, x: self.c(x).flatten(2).view(-1),
        lambda self, x: self.c(x)[0].view(-1),
    ],
)
def test_views(forward):
    assert_same(Model(forward, c=convolution()), X)


def test_views_of_bits():
    """Of small integers, whose sums are exact in any order: other bits are not told apart."""
    layer = convolution()
    with torch.no_grad():
        layer.weight.copy_(torch.arange(81).view(3, 3, 3, 3) % 5 - 2)
        layer.bias.copy_(torch.tensor([1.0, -2.0, 3.0]))
    assert_same(Model(lambda self, x: self.c(x).view(torch.int16), c=layer), (4 * X).round())


@pytest.mark.parametrize(
    ("layers", "x"),
    [
        ([convolution(), nn.Flatten(2)], X),
        ([nn.Unflatten(1, (3, 4, 4)), convolution()], X.flatten(1)),
    ],
)
def test_outputs_lie_as_the_originals(layers, x):
    assert nnarch.accelerate(nn.Sequential(*layers).eval())(x).is_contiguous()


def outputs_of(forward):
    """Outputs of the accelerated model and its copies, compared with the model's."""
    model = Model(forward, c=convolution()).eval()
    accelerated = nnarch.accelerate(model)
    for run in (accelerated, copy.deepcopy(accelerated), pickle.loads(pickle.dumps(accelerated))):
        for _ in range(3):
            with torch.no_grad():
                actual, expected = run(X), model(X)
            assert type(actual) is type(expected) and list(actual) == list(expected)
            torch.testing.assert_close(dict(actual), dict(expected))
            yield actual


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_kinds_of_dicts(kind):
    def forward(self, x):
        return kind([("b", self.c(x)), ("a", kind(d=x + 1))])

    for output in outputs_of(forward):
        assert type(output["a"]) is kind


def test_outputs_of_transformers():
    def forward(self, x):
        y = self.c(x)
        return ImageClassifierOutput(logits=y, hidden_states=(x, y))

    for output in outputs_of(forward):
        assert output.loss is None and len(output.hidden_states) == 2
