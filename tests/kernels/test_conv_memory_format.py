"""Convolutions of images that are dense both ways, of one channel or one pixel: as torch's, the
weight says whether a network is channels_last."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses import FakeTensorMode

import nnarch.nn

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CASES = {
    "stem": (lambda nn: nn.Conv2d(1, 40, 9), (2, 1, 28, 28)),
    "few outputs": (lambda nn: nn.Conv2d(1, 3, 3, padding=1), (2, 1, 6, 5)),
    "large": (lambda nn: nn.Conv2d(1, 64, 3, padding=1), (9, 1, 128, 128)),
    "dilated": (lambda nn: nn.Conv2d(1, 8, 3, dilation=2), (1, 1, 9, 9)),
    "pixel to pixel": (lambda nn: nn.Conv2d(16, 24, 1), (3, 16, 1, 1)),
    "pixel to pixels": (lambda nn: nn.Conv2d(16, 24, 1, padding=1), (3, 16, 1, 1)),
    "grouped pixel": (lambda nn: nn.Conv2d(16, 8, 3, padding=2, groups=2), (3, 16, 1, 1)),
    "generator": (lambda nn: nn.ConvTranspose2d(100, 64, 4), (2, 100, 1, 1)),
    "one channel back": (lambda nn: nn.ConvTranspose2d(1, 6, 4, 2, 1), (2, 1, 5, 7)),
}


def _steps(t: torch.Tensor) -> list[int]:
    """Strides that lead anywhere."""
    return [step for step, count in zip(t.stride(), t.shape, strict=True) if count > 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_the_weight_decides(case, format, training, dtype):
    make, size = CASES[case]
    torch.manual_seed(0)
    theirs = make(torch.nn).to(dtype=dtype, memory_format=FORMATS[format]).train(training)
    ours = make(nnarch.nn).to(dtype=dtype, memory_format=FORMATS[format]).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(size, dtype=dtype)
    outputs = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_(training)
        with torch.set_grad_enabled(training):
            y = module(leaf)
        grads = (
            torch.autograd.grad(y.square().sum(), (leaf, *module.parameters())) if training else ()
        )
        outputs.append((y.detach(), *grads))
    assert _steps(outputs[1][0]) == _steps(outputs[0][0])
    for mine, other in zip(*outputs[::-1], strict=True):
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
        assert float((mine - other).abs().max()) <= tolerance * float(other.abs().max())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_shapes_without_values_say_the_same(case, format):
    make, size = CASES[case]
    module = make(nnarch.nn).to(memory_format=FORMATS[format]).train()
    x = torch.randn(size)
    real = module(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.copy(module)(mode.from_tensor(x))
    assert _steps(fake) == _steps(real)
