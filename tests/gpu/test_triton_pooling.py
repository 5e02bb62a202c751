"""The Triton pooling kernels in the interpreter, forward and backward, against torch in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate
from torch.nn import functional as F

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from triton_cases import DTYPES  # noqa: E402

from nnarch import library  # noqa: E402
from nnarch.kernels.pooling import (  # noqa: E402
    reference,
    triton_avg,
    triton_kernel,
    triton_max,
    triton_taps,
    triton_tile,
)

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}

# kernel, stride, padding, dilation, ceil_mode
WINDOWS = [
    ((3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 3), (2, 1), (1, 0), (1, 2), True),
    ((2, 2), (3, 3), (0, 0), (1, 1), True),
]
SIZES = [(1, 1), (3, 4), (9, 2), (4, 15)]  # adaptive: global, uneven, equal, and more than there is


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty returns NaN (the largest value for integers): what is not written shows."""
    # Torch's own adaptive pools on a GPU have no deterministic gradient; they run here as well.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def image(dtype, memory_format="nchw", size=(2, 5, 9, 7)):
    x = torch.randn(size).to(dtype)
    return x.contiguous(memory_format=FORMATS[memory_format])


def gradient(function, x, grad):
    """The gradient of `function` at x that torch computes, in x's dtype."""
    x = x.detach().to(grad.device).requires_grad_()
    return torch.autograd.grad(function(x), x, grad.to(x.dtype))[0]


def check(actual, function, *tensors):
    """`actual` against torch in its dtype and in float64; it has the first tensor's format.

    Torch runs on the CPU, whatever the tensors are on, and `function` takes care of what it closes
    over: on a GPU, torch 2.11's gradient of padded average pooling is wrong in channels_last
    (pytorch issue 188344).
    """
    there = [t.cpu() for t in tensors]
    torchs, truth = function(*there), function(*(t.double() for t in there))
    assert_as_accurate(actual.cpu(), torchs, truth)
    assert actual.stride() == library.new_output(tensors[0], actual.shape).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_max_pool(window, memory_format, dtype):
    x = image(dtype, memory_format)
    x[0, 1, 2, 3] = float("nan")
    x[1, 2, :4, :4] = float("-inf")
    x[1, 3] = 1.0  # ties: the first position counts

    y, indices = triton_kernel.max_pool2d(x, *window, True)
    # On the CPU: on a GPU, in channels_last, torch's index is 0 where all of a window is -inf.
    expected, expected_indices = (
        t.to(x.device) for t in F.max_pool2d(x.cpu(), *window, return_indices=True)
    )
    assert torch.equal(y.nan_to_num(99.0), expected.nan_to_num(99.0))
    assert torch.equal(indices, expected_indices)
    assert y.stride() == indices.stride() == library.new_output(x, y.shape).stride()

    grad = torch.randn_like(y)
    dx = triton_kernel.max_pool2d_input_grad(grad, indices, x.shape)
    check(dx, lambda g: gradient(lambda x: F.max_pool2d(x, *window), x.to(g.dtype), g), grad)
    y, taps = triton_kernel.max_pool2d_taps(x, *window)
    assert torch.equal(y.nan_to_num(99.0), expected.nan_to_num(99.0))
    positions = reference.max_pool2d_positions(taps, x.shape, *window[:4])
    assert torch.equal(positions, expected_indices)
    dx = triton_kernel.max_pool2d_taps_grad(grad, taps, x.shape, *window)
    check(dx, lambda g: gradient(lambda x: F.max_pool2d(x, *window), x.to(g.dtype), g), grad)
    gathered = triton_kernel.max_pool2d_gather(x, indices)
    assert torch.equal(gathered.nan_to_num(99.0), expected.nan_to_num(99.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_adaptive_max_pool(size, memory_format, dtype):
    x = image(dtype, memory_format)
    y, indices = triton_kernel.adaptive_max_pool2d(x, size, True)
    expected, expected_indices = F.adaptive_max_pool2d(x, size, return_indices=True)
    assert torch.equal(y, expected)
    assert torch.equal(indices, expected_indices)
    grad = torch.randn_like(y)
    dx = triton_kernel.max_pool2d_input_grad(grad, indices, x.shape)
    check(dx, lambda g: gradient(lambda x: F.adaptive_max_pool2d(x, size), x.to(g.dtype), g), grad)


def test_max_pool_without_indices():
    x = image(torch.float32)
    y, indices = triton_kernel.max_pool2d(x, (2, 2), (2, 2), (0, 0), (1, 1), False, False)
    assert torch.equal(y, F.max_pool2d(x, 2))
    assert indices.shape == (0,)
    assert indices.dtype == torch.int64


def test_max_pool_window_of_padding_alone():
    x = image(torch.float32, size=(1, 2, 1, 1))
    y, indices = triton_kernel.max_pool2d(x, (2, 2), (5, 5), (1, 1), (3, 3), True, True)
    assert y.isneginf().all()
    assert (indices == -1).all()
    assert (triton_kernel.max_pool2d_input_grad(y, indices, x.shape) == 0).all()
    assert (triton_kernel.max_pool2d_gather(x, indices) == 0).all()


def test_max_pool_gradient_of_any_indices():
    indices = torch.randint(-1, 63, (2, 5, 3, 4))
    grad = torch.randn(2, 5, 3, 4)
    expected = reference.max_pool2d_input_grad(grad.double(), indices, (2, 5, 9, 7))
    dx = triton_kernel.max_pool2d_input_grad(grad, indices, (2, 5, 9, 7))
    torch.testing.assert_close(dx.double(), expected, rtol=1e-6, atol=1e-6)
    x = image(torch.float32)
    gathered = triton_kernel.max_pool2d_gather(x, indices)
    assert torch.equal(gathered, reference.max_pool2d_gather(x, indices))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("include_pad, divisor", [(True, None), (False, None), (True, 3)])
@pytest.mark.parametrize(
    "window", [((3, 3), (2, 2), (1, 1), False), ((3, 2), (3, 1), (1, 1), True)], ids=str
)
def test_avg_pool(window, include_pad, divisor, memory_format, dtype):
    x = image(dtype, memory_format)
    arguments = (*window, include_pad, divisor)
    y = triton_kernel.avg_pool2d(x, *arguments)
    check(y, lambda x: F.avg_pool2d(x, *arguments), x)
    grad = torch.randn_like(y)
    dx = triton_kernel.avg_pool2d_input_grad(grad, x.shape, *arguments)
    check(dx, lambda g: gradient(lambda x: F.avg_pool2d(x, *arguments), x.to(g.dtype), g), grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", SIZES)
def test_adaptive_avg_pool(size, memory_format, dtype):
    x = image(dtype, memory_format)
    y = triton_kernel.adaptive_avg_pool2d(x, size)
    check(y, lambda x: F.adaptive_avg_pool2d(x, size), x)
    grad = torch.randn_like(y)
    dx = triton_kernel.adaptive_avg_pool2d_input_grad(grad, x.shape)
    check(dx, lambda g: gradient(lambda x: F.adaptive_avg_pool2d(x, size), x.to(g.dtype), g), grad)


STRIDED = {
    "slice": lambda x: x[:, 1:6:2, 1:, 2:],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1, :1, :1, :1].expand(2, 5, 9, 7),
    "expanded planes": lambda x: x[:, :, :1, :1].expand(2, 6, 9, 7),
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_any_strides(view):
    x = view(torch.randn(2, 6, 9, 8))
    window = ((3, 3), (2, 2), (1, 1), (1, 1), False)
    y, indices = triton_kernel.max_pool2d(x, *window, True)
    expected, expected_indices = F.max_pool2d(x, *window, return_indices=True)
    assert torch.equal(y, expected)
    assert torch.equal(indices, expected_indices)
    assert y.is_contiguous()
    check(triton_kernel.adaptive_avg_pool2d(x, (1, 1)), lambda x: F.adaptive_avg_pool2d(x, 1), x)
    check(
        triton_kernel.adaptive_avg_pool2d(x, (2, 3)), lambda x: F.adaptive_avg_pool2d(x, (2, 3)), x
    )


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_gradients_of_any_strides(view):
    grad = view(torch.randn(2, 6, 9, 8))
    n, c, h, w = grad.shape
    x = torch.randn(n, c, 2 * h, 2 * w)
    _, indices = F.max_pool2d(x, 2, return_indices=True)
    dx = triton_kernel.max_pool2d_input_grad(grad, indices, x.shape)
    check(dx, lambda g: gradient(lambda x: F.max_pool2d(x, 2), x.to(g.dtype), g), grad)
    arguments = ((2, 2), (2, 2), (0, 0), False, True, None)
    dx = triton_kernel.avg_pool2d_input_grad(grad, x.shape, *arguments)
    check(dx, lambda g: gradient(lambda x: F.avg_pool2d(x, 2), x.to(g.dtype), g), grad)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_more_than_one_program(memory_format):
    x = image(torch.float32, memory_format, (2, 70, 5, 5))
    y, indices = triton_kernel.max_pool2d(x, (2, 2), (2, 2), (0, 0), (1, 1), False, True)
    expected, expected_indices = F.max_pool2d(x, 2, return_indices=True)
    assert torch.equal(y, expected)
    assert torch.equal(indices, expected_indices)
    dx = triton_kernel.max_pool2d_input_grad(y, indices, x.shape)
    assert torch.equal(dx, reference.max_pool2d_input_grad(y, indices, x.shape))
    check(triton_kernel.adaptive_avg_pool2d(x, (1, 1)), lambda x: F.adaptive_avg_pool2d(x, 1), x)


def test_int64_offsets(monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    for module in (triton_max, triton_taps, triton_avg):
        monkeypatch.setattr(module, "index_64", lambda *_: True)
    x = image(torch.float32, "channels_last")
    y, indices = triton_kernel.max_pool2d(x, (3, 3), (2, 2), (1, 1), (1, 1), False, True)
    assert torch.equal(y, F.max_pool2d(x, 3, 2, 1))
    dx = triton_kernel.max_pool2d_input_grad(y, indices, x.shape)
    torch.testing.assert_close(dx, reference.max_pool2d_input_grad(y, indices, x.shape))
    assert torch.equal(triton_kernel.max_pool2d_gather(x, indices), y)
    arguments = ((3, 3), (2, 2), (1, 1), False, False, None)
    check(triton_kernel.avg_pool2d(x, *arguments), lambda x: F.avg_pool2d(x, *arguments), x)
    dx = triton_kernel.avg_pool2d_input_grad(y, x.shape, *arguments)
    check(dx, lambda g: reference.avg_pool2d_input_grad(g, x.shape, *arguments), y)


def test_index_64_covers_offsets_and_scaled_positions():
    def sized(*size):
        return torch.empty(size, device="meta")

    assert not triton_tile.index_64(sized(8, 64, 112, 112), sized(8, 64, 56, 56))
    assert triton_tile.index_64(sized(3000, 64, 112, 112), sized(3000, 64, 56, 56))
    assert triton_tile.index_64(sized(1, 1, 40000, 1).expand(1, 1, 40000, 40000), sized(1, 1, 1, 1))


def test_empty_batch_and_empty_output():
    x = torch.randn(0, 3, 8, 8)
    y, indices = triton_kernel.max_pool2d(x, (2, 2), (2, 2), (0, 0), (1, 1), False, True)
    assert y.shape == indices.shape == (0, 3, 4, 4)
    assert triton_kernel.max_pool2d_input_grad(y, indices, x.shape).shape == x.shape
    assert triton_kernel.adaptive_avg_pool2d(x, (1, 1)).shape == (0, 3, 1, 1)
    nothing = triton_kernel.adaptive_avg_pool2d(torch.randn(2, 3, 8, 8), (0, 2))
    assert nothing.shape == (2, 3, 0, 2)
    dx = triton_kernel.adaptive_avg_pool2d_input_grad(nothing, (2, 3, 8, 8))
    assert (dx == 0).all()


def test_unsupported_dtype_names_operation_and_dtype():
    with pytest.raises(NotImplementedError, match=r"max_pool2d for torch\.float64"):
        triton_kernel.max_pool2d(
            torch.zeros(1, 1, 4, 4, dtype=torch.float64), *WINDOWS[0][:4], False, False
        )
