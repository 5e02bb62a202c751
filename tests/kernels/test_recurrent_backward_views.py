"""The backward of recurrent layers: views as gradients, and what is absent or not wanted."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_recurrent_backward import NAMES, OPTIONS, each_case, make, output_grads
from torch import Tensor

from nnarch.kernels.recurrent import kinds, reference
from nnarch.kernels.recurrent.op import scan_backward


def _strange_views(grad: Tensor) -> dict[str, Tensor]:
    """The same values with other strides."""
    wide = torch.empty(*grad.shape[:-1], grad.shape[-1] * 2, dtype=grad.dtype)
    wide[..., ::2] = grad
    return {
        "batch first": grad.transpose(0, 1).contiguous().transpose(0, 1),
        "every second": wide[..., ::2],
        "sequence last": grad.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "slice": torch.cat([grad, grad], -1)[..., grad.shape[-1] :],
    }


@each_case
def test_views(kind, option):
    """Gradients, and x, of any strides."""
    if "packed" in option or option == "everything":
        pytest.skip("rows of packed sequences are not [T, B, …]")
    layer = make(kind, 4, 3, 6, 9, **OPTIONS[option])
    grads, arguments = output_grads(layer), layer.arguments()
    expected = scan_backward(*grads, *arguments)
    for dy, x in itertools.product(
        _strange_views(grads[0]).values(), _strange_views(arguments[0]).values()
    ):
        actual = scan_backward(dy, *grads[1:], x, *arguments[1:])
        assert all(map(torch.equal, actual, expected))


def test_views_of_packed_rows_and_weights():
    layer = make(kinds.LSTM, 5, 4, 6, 9, packed=True)
    grads, arguments = output_grads(layer), layer.arguments()
    expected = scan_backward(*grads, *arguments)
    turned = [
        t.t().contiguous().t() if isinstance(t, Tensor) and t.dim() == 2 else t for t in arguments
    ]
    mine = scan_backward(*[g.t().contiguous().t() for g in grads], *turned)
    assert all(map(torch.equal, mine, expected))


@pytest.mark.parametrize("kind", range(4), ids=kinds.NAMES)
def test_missing_gradients_are_zeros(kind):
    layer = make(kind, 4, 3, 5, 9)
    grads, arguments = output_grads(layer), layer.arguments()
    for given_grads in itertools.product([False, True], repeat=3):
        some = [g if keep else None for g, keep in zip(grads, given_grads, strict=True)]
        zeros = [
            g if keep or g is None else torch.zeros_like(g)
            for g, keep in zip(grads, given_grads, strict=True)
        ]
        mine, expected = scan_backward(*some, *arguments), scan_backward(*zeros, *arguments)
        assert all(map(torch.equal, mine, expected))


@each_case
def test_gradients_that_are_not_wanted(kind, option):
    """Each alone is the same as among all; what is not wanted is empty."""
    layer = make(kind, 4, 5, 6, 9, **OPTIONS[option])
    grads = output_grads(layer)
    everything = scan_backward(*grads, *layer.arguments())
    for bit, tensor in enumerate(layer.tensors):
        alone = scan_backward(*grads, *layer.arguments(1 << bit))
        assert all(g.numel() == 0 for i, g in enumerate(alone) if i != bit)
        assert torch.equal(alone[bit], everything[bit])
        assert alone[bit].shape == (torch.Size([0]) if tensor is None else tensor.shape)


@each_case
def test_no_steps_and_no_sequences(kind, option):
    if "packed" in option or option == "everything":
        pytest.skip("a packed sequence has a step")
    for time, batch in ((0, 3), (3, 0), (1, 2)):
        layer = make(kind, time, batch, 5, 6, **OPTIONS[option])
        grads, arguments = output_grads(layer), layer.arguments()
        mine = scan_backward(*grads, *arguments)
        truth = reference.recurrent_scan_backward(*grads, *arguments)
        torch.testing.assert_close(mine, truth)


@pytest.mark.parametrize("kind", range(4), ids=kinds.NAMES)
def test_one_step_of_two_dimensions(kind):
    layer = make(kind, 1, 5, 6, 7)
    grads, (x, *rest) = output_grads(layer), layer.arguments()
    expected = scan_backward(*grads, x, *rest)
    y = rest[len(NAMES)]
    rest[len(NAMES)] = y[0]
    mine = scan_backward(grads[0][0], *grads[1:], x[0], *rest)
    assert torch.equal(mine[0], expected[0][0])
    assert all(map(torch.equal, mine[1:], expected[1:]))
