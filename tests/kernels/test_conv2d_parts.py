"""Planar images too large to be copied whole: conv2d takes them in parts, forward and backward."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tolerances import assert_as_accurate

from nnarch import functional as F

CASES = {  # N, C, H, W, K, kernel, options
    "winograd": (34, 64, 60, 56, 64, 3, {"padding": 1}),
    "rows of one image": (1, 48, 301, 299, 64, 3, {"padding": 1}),
    "pointwise": (40, 64, 56, 60, 64, 1, {}),
    "stride": (2, 64, 281, 283, 64, 3, {"padding": 1, "stride": 2}),
    "dilation and groups": (2, 64, 180, 190, 64, 3, {"padding": 2, "dilation": 2, "groups": 2}),
    "more padding than reach": (3, 48, 150, 160, 64, 1, {"padding": 2}),
    "five taps": (3, 48, 150, 160, 48, 5, {"padding": 2}),
    "narrow groups": (8, 64, 100, 90, 64, 3, {"padding": 1, "groups": 16}),
}
VIEWS = {"dense": lambda t: t, "sliced": lambda t: torch.cat([t, t], 3)[..., : t.shape[3]]}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_accurate_as_torch(case, view):
    n, c, h, w, k, size, options = case
    generator = torch.Generator().manual_seed(0)
    x = view(torch.randn(n, c, h, w, generator=generator))
    weight = torch.randn(k, c // options.get("groups", 1), size, size, generator=generator)
    weight *= (2 / weight[0].numel()) ** 0.5
    bias = torch.randn(k, generator=generator)
    grad = torch.randn(F.conv2d(x, weight, bias, **options).shape, generator=generator)

    def run(convolve, dtype, channels_last=False):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        image, theirs = leaves[0], grad.to(dtype)
        if channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
            theirs = theirs.contiguous(memory_format=torch.channels_last)
        y = convolve(image, *leaves[1:], **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, theirs)]

    got = run(F.conv2d, torch.float32)
    assert got[0].is_contiguous() and got[1].shape == x.shape
    torchs = run(torch.nn.functional.conv2d, torch.float32, channels_last=True)
    truth = run(torch.nn.functional.conv2d, torch.float64)
    for name, a, b, true in zip(("y", "dx", "dw", "db"), got, torchs, truth, strict=True):
        assert_as_accurate(a, b, true, factor=3, what=name)


def test_epilogue_and_double():
    x = torch.randn(1, 24, 260, 240, dtype=torch.float64)
    weight = torch.randn(64, 24, 3, 3, dtype=torch.float64) / 15
    residual = torch.randn(1, 64, 260, 240, dtype=torch.float64)
    expected = (torch.nn.functional.conv2d(x, weight, padding=1) + residual).relu()
    got = F.conv2d(x, weight, padding=1, residual=residual, activation="relu")
    torch.testing.assert_close(got, expected)


PEAK = """
import resource, torch
from nnarch import functional as F

torch.set_num_threads(1)
weight = torch.randn(64, 64, 3, 3) / 24

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

F.conv2d(torch.randn(1, 64, 64, 64), weight, padding=1)
x = torch.randn(1, 64, 1024, 1024)
before = peak()
y = F.conv2d(x, weight, padding=1)
print(peak() - before - y.numel() * 4 / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KB on Linux alone")
def test_no_copy_of_a_large_image():
    """Beside its 256 MB of output, a convolution of 256 MB of planar image takes a few MB."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert float(run.stdout) < 64
