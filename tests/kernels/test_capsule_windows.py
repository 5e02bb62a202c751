"""Windows of convolutional capsules: copies, their gradient, what they refuse."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DTYPES, VIEWS, name_of, needs_poison, on_fresh_memory
from tolerances import assert_as_accurate
from torch.autograd import gradcheck, gradgradcheck

from nnarch.kernels.capsule_routing import reference
from nnarch.kernels.capsule_routing.windows import windows_grad, windows_op

SAMPLES = {
    "capsule_windows": lambda: [
        (torch.randn(2, 7, 9, 3, 8), [3, 2], [2, 1], [1, 0]),
        (torch.randn(1, 4, 5, 2, 3), [1, 3], [1, 3], [0, 2]),
    ],
    "capsule_windows_grad": lambda: [
        (torch.randn(2 * 4 * 8, 3 * 6, 8), [2, 7, 9, 3, 8], [3, 2], [2, 1], [1, 0]),
        (torch.randn(4 * 3, 2 * 3, 3), [1, 4, 5, 2, 3], [1, 3], [1, 3], [0, 2]),
    ],
}

# x [N, H, W, C, D], kernel, stride, padding: gaps between windows, pixels that none reads.
WINDOWS = [
    ((2, 7, 9, 3, 8), (3, 2), (2, 1), (1, 0)),
    ((1, 4, 5, 2, 3), (1, 3), (1, 3), (0, 2)),
    ((3, 6, 6, 4, 16), (2, 2), (3, 3), (0, 0)),
    ((1, 3, 3, 5, 4), (3, 3), (1, 1), (2, 2)),
]


@pytest.mark.parametrize("case", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_windows_are_copies(case, dtype):
    """Exactly torch's, forward; backward as accurate, from views of any strides."""
    size, *geometry = case
    x = torch.randn(size).to(dtype)
    rows = windows_op(x, *geometry)
    assert torch.equal(rows, reference.capsule_windows(x, *geometry))
    for view in VIEWS.values():
        assert torch.equal(
            windows_op(view(x), *geometry), windows_op(view(x).contiguous(), *geometry)
        )
    grad = torch.randn(rows.shape).to(dtype)
    assert_as_accurate(
        windows_grad(grad, size, *geometry),
        reference.capsule_windows_grad(grad, size, *geometry),
        reference.capsule_windows_grad(grad.double(), size, *geometry),
    )


def test_windows_gradcheck():
    size, *geometry = WINDOWS[0]
    x = torch.randn(size[:4] + (3,), dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: windows_op(x, *geometry), x)
    assert gradgradcheck(lambda x: windows_op(x, *geometry).square(), x)


@needs_poison
def test_windows_read_no_uninitialised_memory():
    for size, *geometry in WINDOWS:
        rows = windows_op(torch.randn(size), *geometry)
        fresh = on_fresh_memory(
            lambda r=rows, s=size, g=geometry: windows_op(windows_grad(r, s, *g), *g)
        )
        assert bool(fresh.isfinite().all())


X = torch.randn(2, 9, 5)
X5, G3 = torch.randn(1, 4, 4, 2, 3), torch.randn(9, 8, 3)
BAD = [
    (lambda: windows_op(X, (2, 2), (1, 1), (0, 0)), ValueError, r"x must be \[N, H, W, C, D_in\]"),
    (lambda: windows_op(X5.long(), (2, 2), (1, 1), (0, 0)), TypeError, "x must be floating.*int64"),
    (lambda: windows_op(X5, (5, 2), (1, 1), (0, 0)), ValueError, "window .5, 2. is larger.*4, 4"),
    (lambda: windows_op(X5, (2, 2), (0, 1), (0, 0)), ValueError, "stride must be at least 1"),
    (lambda: windows_op(X5, (2, 2), (1, 1), (0, -1)), ValueError, "padding must be at least 0"),
    (lambda: windows_grad(G3, (1, 4, 4, 2, 4), (2, 2), (1, 1), (0, 0)), ValueError,
     r"grad must have the shape \(9, 8, 4\), got \(9, 8, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
