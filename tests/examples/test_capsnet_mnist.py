"""The CapsNet example on random digits: resuming, moving digits, pictures."""

from __future__ import annotations

import capsnet_mnist as example
import pytest
import torch

from nnarch.models.capsnet import CapsNet


def _net() -> CapsNet:
    torch.manual_seed(5)
    return CapsNet(width=1 / 32, detach_routing=False)


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return torch.rand(60, 1, 28, 28, generator=generator), torch.arange(60) % 10


@pytest.mark.parametrize("objective", ["capsule_objective", "pair_objective"])
def test_resumes_bit_for_bit(objective, tmp_path):
    """Two epochs at once, and one, an interruption, and another."""
    nets = []
    for name, stops in (("once", [2]), ("twice", [1, 2])):
        for epochs in stops:
            net = _net()
            torch.manual_seed(epochs)  # what a new process brings does not matter
            example.train(name, net, getattr(example, objective), _data(), epochs, tmp_path)
        nets.append(net)
    states = [net.state_dict() for net in nets]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["conv1.weight"], _net().state_dict()["conv1.weight"])


def test_shifts_and_rotations():
    images, _ = _data()
    moved = example.shifted(images, torch.full((60,), 2), torch.full((60,), -3))
    assert torch.equal(moved[:, :, 2:, :-3], images[:, :, :-2, 3:])
    assert float(moved[:, :, :2].abs().sum() + moved[:, :, :, -3:].abs().sum()) == 0
    torch.testing.assert_close(example.rotated(images, 0.0), images)
    quarter = example.rotated(images, 90.0)
    turned = (images.rot90(1, (2, 3)), images.rot90(-1, (2, 3)))
    assert any(torch.allclose(quarter, t, atol=1e-4) for t in turned)


def test_overlapping_digits_are_two_classes():
    both, a, b, first, second = example.overlapping(*_data())
    assert bool((first != second).all())
    assert torch.equal(both, torch.maximum(a, b))
    assert len(both) > 40


def test_pictures_and_table(tmp_path):
    net, (images, labels) = _net().eval(), _data()
    assert example.perturbed(net, images, labels).shape == (16 * 28, 2 * 12 * 28)
    picture, right = example.separated(net, images, labels)
    assert picture.shape == (5 * 28, 12 * 28)
    assert 0 <= right <= 100
    example.save_picture(tmp_path / "p.png", picture)
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert example.robustness({"a": net}, images, labels).row_count == 7
