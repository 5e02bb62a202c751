"""The Triton dropout in the interpreter: the mask is the definition's."""

from __future__ import annotations

import pytest
import torch

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from triton_cases import DTYPES, VIEWS, poisoned_memory  # noqa: E402

from nnarch.kernels.dropout import reference, triton_kernel  # noqa: E402


def _seed_tensor():
    return torch.tensor([0x1234_5678_9ABC_DEF0])


@pytest.mark.parametrize(
    "shape", [(), (0,), (5,), (70, 3), (130, 16), (9, 100), (2, 3, 130), (2, 1030)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_is_the_definition(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for p in (0.1, 0.5, 1.0):
        with poisoned_memory():
            y = triton_kernel.dropout(x, _seed_tensor(), p)
        truth = reference.dropout(x.double(), _seed_tensor(), p).to(dtype)
        assert torch.equal(y == 0, truth == 0)
        torch.testing.assert_close(y, truth)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    x = VIEWS[view](torch.randn(6, 9))
    dense = x.clone().contiguous()
    assert torch.equal(
        triton_kernel.dropout(x, _seed_tensor(), 0.5),
        triton_kernel.dropout(dense, _seed_tensor(), 0.5),
    )
