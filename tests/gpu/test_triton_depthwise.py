"""The Triton depthwise kernels in the interpreter, forward and backward, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from triton_cases import ACTIVATIONS, ALPHA, DTYPES, FORMATS, VIEWS, check  # noqa: E402

from nnarch import library  # noqa: E402
from nnarch.kernels.conv2d.geometry import output_size  # noqa: E402
from nnarch.kernels.depthwise import (  # noqa: E402
    reference,
    triton_backward,
    triton_forward,
    triton_kernel,
)
from nnarch.kernels.gpu import tiles  # noqa: E402


@dataclass(frozen=True)
class Depthwise:
    """Sizes of one depthwise convolution; padding is (top, left, bottom, right)."""

    x: tuple[int, int, int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1

    @property
    def geometry(self):
        """The arguments of all three operations behind their tensors and sizes."""
        return self.stride, self.padding, self.dilation

    @property
    def weight_size(self):
        return (self.x[1] * self.multiplier, 1, *self.kernel)

    def image(self, dtype=torch.float32, memory_format="nchw"):
        return torch.randn(self.x).to(dtype).contiguous(memory_format=FORMATS[memory_format])

    def weight(self, dtype=torch.float32):
        return torch.randn(self.weight_size).to(dtype)

    def grad(self, dtype=torch.float32, memory_format="nchw"):
        size = output_size(self.x, self.weight_size, self.stride, self.padding, self.dilation)
        return torch.randn(size).to(dtype).contiguous(memory_format=FORMATS[memory_format])


CASES = {
    "3x3 same": Depthwise((2, 9, 7, 5), padding=(1, 1, 1, 1)),
    "3x3 s2, padding all different": Depthwise((1, 6, 8, 7), (3, 3), (2, 2), (0, 1, 2, 3)),
    "5x2 dilated": Depthwise((1, 5, 13, 6), (5, 2), (2, 1), (3, 1, 1, 2), (2, 3)),
    "dilation and stride share a factor": Depthwise(
        (1, 5, 9, 11), (3, 3), (2, 4), (1, 1, 1, 1), (2, 2)
    ),
    "2x2 s3: pixels that no tap meets": Depthwise((2, 3, 8, 7), (2, 2), (3, 3)),
    "7x7": Depthwise((1, 3, 7, 7), (7, 7), padding=(3, 3, 3, 3)),
    "multiplier": Depthwise((2, 5, 6, 5), padding=(1, 1, 1, 1), multiplier=3),
    "size 1": Depthwise((1, 1, 1, 1), (1, 1)),
    "one channel, multiplier": Depthwise((1, 1, 5, 4), (2, 2), multiplier=2),
    "padding wider than the kernel": Depthwise((1, 2, 2, 2), (1, 2), (1, 1), (2, 3, 1, 3)),
    "more than a tile": Depthwise((1, 130, 9, 9), (1, 1)),
}


def forward(case, x, weight, *epilogue, activation=0):
    vectors = list(epilogue) + [None] * (4 - len(epilogue))
    return check(
        triton_kernel.depthwise_conv2d,
        reference.depthwise_conv2d,
        [x, weight, *vectors, None],
        *(*case.geometry, activation, ALPHA),
    )


def input_grad(case, grad, weight):
    return check(
        triton_kernel.depthwise_conv2d_input_grad,
        reference.depthwise_conv2d_input_grad,
        [grad, weight],
        *(case.x, *case.geometry),
    )


def weight_grad(case, grad, x):
    return check(
        triton_kernel.depthwise_conv2d_weight_grad,
        reference.depthwise_conv2d_weight_grad,
        [grad, x],
        *(case.weight_size, *case.geometry),
    )


def all_three(case, dtype=torch.float32, memory_format="nchw"):
    x, weight = case.image(dtype, memory_format), case.weight(dtype)
    grad = case.grad(dtype, memory_format)
    y = forward(case, x, weight)
    assert y.stride() == library.new_output(x, y.shape).stride()
    dx = input_grad(case, grad, weight)
    assert dx.stride() == library.new_output(grad, dx.shape).stride()
    assert weight_grad(case, grad, x).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients(case, memory_format, dtype):
    all_three(case, dtype, memory_format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation, dtype):
    case = CASES["multiplier"]
    vectors = [torch.randn(15).to(dtype) for _ in range(3)]
    residual = case.grad(dtype, "channels_last")
    x, weight = case.image(dtype), case.weight(dtype)
    forward(case, x, weight, *vectors, residual, activation=activation)


@pytest.mark.parametrize("which", range(4), ids=["bias", "scale", "shift", "residual"])
def test_one_term_of_the_epilogue(which):
    case = CASES["3x3 same"]
    terms = [torch.randn(9), torch.randn(9), torch.randn(9), case.grad()]
    given = [term if i == which else None for i, term in enumerate(terms)]
    forward(case, case.image(), case.weight(), *given)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    case = CASES["3x3 s2, padding all different"]
    x, weight, grad = view(case.image()), view(case.weight()), view(case.grad())
    vectors = [view(torch.randn(6)) for _ in range(3)]
    forward(case, x, weight, *vectors, grad)
    input_grad(case, grad, weight)
    weight_grad(case, grad, x)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_the_weight_gradient(dtype, parts, monkeypatch):
    monkeypatch.setattr(triton_backward, "split_count", lambda tiles, steps: min(parts, steps))
    case = Depthwise((2, 5, 17, 13), padding=(1, 1, 1, 1), multiplier=2)
    weight_grad(case, case.grad(dtype, "channels_last"), case.image(dtype, "channels_last"))


@pytest.mark.parametrize("tile", triton_forward.PIXELS_BY_CHANNELS.tiles["ieee"], ids=str)
def test_every_tile(tile):
    with tiles.force(**{triton_forward.PIXELS_BY_CHANNELS.name: tile}):
        all_three(Depthwise((1, 6, 9, 7), padding=(1, 1, 1, 1)), memory_format="channels_last")


@pytest.mark.parametrize("name", ["multiplier", "3x3 s2, padding all different"])
def test_int64_offsets(name, monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "needs_int64", lambda *_: True)
    all_three(CASES[name])


def test_no_images():
    case = Depthwise((0, 3, 5, 5), padding=(1, 1, 1, 1))
    x, weight, grad = case.image(), case.weight(), case.grad()
    assert forward(case, x, weight).shape == (0, 3, 5, 5)
    assert input_grad(case, grad, weight).shape == (0, 3, 5, 5)
    assert (weight_grad(case, grad, x) == 0).all()


def test_unsupported_dtype_names_operation_and_dtype():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"depthwise_conv2d for torch\.float64"):
        triton_kernel.depthwise_conv2d(x, x, *[None] * 5, (1, 1), (0,) * 4, (1, 1), 0, 0.0)
