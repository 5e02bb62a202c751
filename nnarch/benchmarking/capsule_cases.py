"""Benchmark cases of capsules: routing, and a training step of CapsNet.

The rival is what most implementations run: votes by one einsum, then a loop in plain torch
(nnarch/models/capsnet.py), eager and compiled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nnarch.benchmarking.case import Case, Target

CAPSULE_TARGETS: dict[str, Target] = {
    "capsules": Target(6.0, 9.0),
    "capsules fwd+bwd": Target(4.5, 8.0),
    "capsule training": Target(4.0, 8.0),
}

_INPUTS, _IN, _OUTPUTS, _OUT = 1152, 8, 10, 16
_GOALS = {
    ("", 1): Target(3.5, 5.0),
    ("", 32): Target(6.0, 9.0),
    ("", 128): Target(11.0, 18.0),
    ("_fb", 1): Target(1.0, 4.0),
    ("_fb", 32): Target(4.5, 8.0),
    ("_fb", 128): Target(9.0, 16.0),
}


def _routing(namespace: Any) -> nn.Module:
    from nnarch.models.capsnet import capsule_layers

    return capsule_layers(namespace).DenseCapsules(_INPUTS, _IN, _OUTPUTS, _OUT)


class _TrainingStep(nn.Module):
    """A network with its objective: images in, the loss of every sample out."""

    def __init__(self, namespace: Any, width: float) -> None:
        super().__init__()
        from nnarch.models.capsnet import CapsNet

        self.net = CapsNet(nn=namespace, width=width, detach_routing=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from nnarch.objectives import margin_loss, reconstruction_loss

        target = torch.arange(x.shape[0], device=x.device) % 10
        lengths, images = self.net.reconstruct(x, target)
        return margin_loss(lengths, target, reduction="none") + reconstruction_loss(
            images, x, reduction="none"
        )


def capsules() -> Iterable[Case]:
    """The class capsules of MNIST's CapsNet, three iterations, the gradient through all of them."""
    votes = _INPUTS * _OUTPUTS * _OUT
    for kind, backward in (("", False), ("_fb", True)):
        for n in (1, 32, 128):
            yield Case(
                f"capsules_1152x8_10x16_n{n}{kind}",
                "capsules" + " fwd+bwd" * backward,
                _routing,
                (n, _INPUTS, _IN),
                label=f"capsules 1152×8→10×16 N{n}" + " fwd+bwd" * backward,
                backward=backward,
                flops=n * votes * (2 * _IN + 2 + 2 * 4),
                target=_GOALS[kind, n],
                quick=n == 32,
            )
    for name, width, n in (("capsnet_x0_25", 0.25, 32), ("capsnet", 1.0, 32)):
        yield Case(
            f"{name}_n{n}_train",
            "capsule training",
            lambda nn, width=width: _TrainingStep(nn, width),
            (n, 1, 28, 28),
            label=f"CapsNet ×{width:g} N{n} training step",
            backward=True,
            input_grad=False,
            tolerance=1e-3,
        )
