"""Max unpooling in Triton's interpreter: the last of equal indices counts."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DTYPES, FORMATS, VIEWS, poisoned_memory

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from nnarch import library  # noqa: E402
from nnarch.kernels.pooling import reference, triton_unpool  # noqa: E402


def check(x, indices, size):
    with poisoned_memory():
        y = triton_unpool.max_unpool2d(x, indices, size)
    assert torch.equal(y, reference.max_unpool2d(x, indices, size))
    assert y.stride() == library.new_output(x, y.shape).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_any_indices(memory_format, dtype):
    for size in ((2, 5, 3, 4), (1, 70, 5, 5), (0, 3, 4, 4)):
        x = torch.randn(size).to(dtype).contiguous(memory_format=FORMATS[memory_format])
        for indices in (torch.randint(63, size), torch.zeros(size, dtype=torch.int64)):
            check(x, indices, (9, 7))


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    x, indices = view(torch.randn(2, 6, 3, 5)), torch.randint(60, (2, 6, 6, 5))
    check(x, indices[:, :, ::2], (6, 10))
    check(x, indices[:1, :, :1].expand(x.shape), (6, 10))


def test_int64_offsets_and_indices_outside(monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    x, indices = torch.randn(2, 5, 3, 4), torch.randint(63, (2, 5, 3, 4))
    expected = triton_unpool.max_unpool2d(x, indices, (9, 7))
    x_more, wrong = torch.cat([x, x], 2), torch.tensor([-1, 63, 2**32])
    more = torch.cat([indices, wrong[torch.randint(3, indices.shape)]], 2)
    for _ in range(2):
        assert torch.equal(triton_unpool.max_unpool2d(x_more, more, (9, 7)), expected)
        monkeypatch.setattr(triton_unpool, "index_64", lambda *_: True)


def test_unsupported_dtype_names_operation_and_dtype():
    x, indices = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match=r"max_unpool2d for torch\.float64"):
        triton_unpool.max_unpool2d(x.double(), indices, (4, 4))
