"""Upsampling in Triton's interpreter, forward and backward, against the definition."""

from __future__ import annotations

import pytest
import torch
from triton_cases import DTYPES, FORMATS, VIEWS, check

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from nnarch import library  # noqa: E402
from nnarch.kernels.upsample import reference  # noqa: E402
from nnarch.kernels.upsample import triton_kernel as kernel  # noqa: E402

# output size, scales
SIZES = [
    ((10, 14), (2.0, 2.0)),
    ((8, 23), (1.7, 3.3)),
    ((3, 1), (0.6, 0.21)),
    ((13, 29), (0.0, 0.0)),
    ((5, 7), (0.0, 0.0)),
    ((1, 50), (0.0, 0.0)),
    ((5, 14), (1.19, 2.1)),  # the same and twice the size
]
MODES = {"nearest": (False, False), "bilinear": (True, False), "corners": (True, True)}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@each_mode
def test_forward_and_backward(mode, size, memory_format, dtype):
    (out, scales), format = size, FORMATS[memory_format]
    x = torch.randn(2, 5, 5, 7).to(dtype).contiguous(memory_format=format)
    # Positions are float32: a weight is right to the last bits of the largest position.
    options = (*mode, *scales)
    y = check(kernel.upsample2d, reference.upsample2d, [x], out, *options, ulps=32)
    assert y.stride() == library.new_output(x, y.shape).stride()
    grad = torch.randn_like(y)
    ours, theirs = kernel.upsample2d_input_grad, reference.upsample2d_input_grad
    dx = check(ours, theirs, [grad], x.shape, *options, ulps=64)
    assert dx.stride() == library.new_output(grad, dx.shape).stride()


@pytest.mark.parametrize("inputs", [(1, 1), (1, 30), (31, 2)])
@pytest.mark.parametrize("outputs", [(1, 1), (40, 3), (7, 64)])
@each_mode
def test_every_output_is_found_again(mode, inputs, outputs):
    """Gradients of ones sum to the number of outputs, whatever the sizes."""
    grad = torch.ones(1, 1, *outputs)
    dx = kernel.upsample2d_input_grad(grad, (1, 1, *inputs), *mode, 0.0, 0.0)
    truth = reference.upsample2d_input_grad(grad.double(), (1, 1, *inputs), *mode, 0.0, 0.0)
    torch.testing.assert_close(dx.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@each_mode
def test_any_strides(mode, view):
    x, grad = view(torch.randn(2, 6, 5, 7)), view(torch.randn(2, 6, 10, 14))
    check(kernel.upsample2d, reference.upsample2d, [x], (10, 14), *mode, 2.0, 2.0, ulps=32)
    ours, theirs = kernel.upsample2d_input_grad, reference.upsample2d_input_grad
    check(ours, theirs, [grad], (2, 6, 5, 7), *mode, 2.0, 2.0, ulps=32)


def test_int64_offsets_and_empty_batches(monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    monkeypatch.setattr(kernel, "index_64", lambda *_: True)
    x = torch.randn(2, 5, 5, 7)
    for mode in MODES.values():
        check(kernel.upsample2d, reference.upsample2d, [x], (9, 9), *mode, 0.0, 0.0, ulps=32)
        ours, theirs = kernel.upsample2d_input_grad, reference.upsample2d_input_grad
        check(ours, theirs, [x], (2, 5, 3, 3), *mode, 0.0, 0.0, ulps=32)
        assert kernel.upsample2d(x[:0], (9, 9), *mode, 0.0, 0.0).shape == (0, 5, 9, 9)


def test_unsupported_dtype_names_operation_and_dtype():
    with pytest.raises(NotImplementedError, match=r"upsample2d for torch\.float64"):
        kernel.upsample2d(torch.zeros(1, 1, 4, 4).double(), (2, 2), False, False, 0.0, 0.0)
