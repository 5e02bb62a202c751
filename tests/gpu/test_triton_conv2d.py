"""The Triton convolution kernels in the interpreter, forward and backward, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from triton_cases import ACTIVATIONS, ALPHA, DTYPES, FORMATS, VIEWS, check  # noqa: E402

from nnarch import library  # noqa: E402
from nnarch.kernels.activation import kinds  # noqa: E402
from nnarch.kernels.conv2d import (  # noqa: E402
    reference,
    triton_forward,
    triton_kernel,
    triton_weight_grad,
)
from nnarch.kernels.conv2d.geometry import output_size  # noqa: E402
from nnarch.kernels.conv_transpose2d import triton_phases  # noqa: E402
from nnarch.kernels.gpu import tiles  # noqa: E402
from nnarch.kernels.gpu.matmul import MATMUL, MATMUL_TILES  # noqa: E402


@dataclass(frozen=True)
class Conv:
    """Sizes of one convolution; padding is (top, left, bottom, right)."""

    x: tuple[int, int, int, int]
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self):
        """The arguments of all three operations behind their tensors and sizes."""
        return self.stride, self.padding, self.dilation, self.groups

    @property
    def weight_size(self):
        return (self.k, self.x[1] // self.groups, *self.kernel)

    def image(self, dtype=torch.float32, memory_format="nchw"):
        return torch.randn(self.x).to(dtype).contiguous(memory_format=FORMATS[memory_format])

    def weight(self, dtype=torch.float32):
        size = self.weight_size
        return (torch.randn(size) / max(1, torch.Size(size[1:]).numel()) ** 0.5).to(dtype)

    def grad(self, dtype=torch.float32, memory_format="nchw"):
        size = output_size(self.x, self.weight_size, self.stride, self.padding, self.dilation)
        return torch.randn(size).to(dtype).contiguous(memory_format=FORMATS[memory_format])


CONVS = {
    "1x1": Conv((2, 19, 5, 3), 23, (1, 1)),
    "1x1 s2": Conv((1, 16, 5, 7), 35, (1, 1), (2, 2)),
    "3x3 same": Conv((2, 9, 6, 5), 11, padding=(1, 1, 1, 1)),
    "3x3 s2, padding all different": Conv((1, 17, 8, 7), 5, (3, 3), (2, 2), (0, 1, 2, 3)),
    "5x2 dilated": Conv((1, 5, 13, 6), 7, (5, 2), (2, 1), (3, 1, 1, 2), (2, 3)),
    "dilation and stride share a factor": Conv((1, 10, 9, 11), 4, (3, 3), (2, 4), (1,) * 4, (2, 2)),
    "2x2 s3: pixels that no tap meets": Conv((2, 3, 8, 7), 4, (2, 2), (3, 3)),
    "groups": Conv((2, 12, 5, 5), 18, padding=(1, 1, 1, 1), groups=3),
    "one channel a group": Conv((1, 4, 6, 6), 8, padding=(1, 1, 1, 1), groups=4),
    "stem": Conv((1, 3, 13, 15), 8, (7, 7), (2, 2), (3, 3, 3, 3)),
    "size 1": Conv((1, 1, 1, 1), 1, (1, 1)),
    "kernel of the image's size": Conv((2, 6, 4, 3), 3, (4, 3)),
    "padding wider than the kernel": Conv((1, 2, 2, 2), 3, (1, 2), (1, 1), (2, 3, 1, 3)),
    "more than a tile": Conv((1, 20, 9, 9), 70, (1, 1)),
}


def forward(conv, x, weight, *epilogue, activation=0):
    vectors = list(epilogue) + [None] * (4 - len(epilogue))
    return check(
        triton_kernel.conv2d,
        reference.conv2d,
        [x, weight, *vectors, None],
        *(*conv.geometry, activation, ALPHA),
    )


def input_grad(conv, grad, weight):
    return check(
        triton_kernel.conv2d_input_grad,
        reference.conv2d_input_grad,
        [grad, weight],
        *(conv.x, *conv.geometry),
    )


def weight_grad(conv, grad, x):
    return check(
        triton_kernel.conv2d_weight_grad,
        reference.conv2d_weight_grad,
        [grad, x],
        *(conv.weight_size, *conv.geometry),
    )


def all_three(conv, dtype=torch.float32, memory_format="nchw"):
    x, weight = conv.image(dtype, memory_format), conv.weight(dtype)
    grad = conv.grad(dtype, memory_format)
    y = forward(conv, x, weight)
    assert y.stride() == library.new_output(x, y.shape).stride()
    dx = input_grad(conv, grad, weight)
    assert dx.stride() == library.new_output(grad, dx.shape).stride()
    assert weight_grad(conv, grad, x).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
def test_forward_and_gradients(conv, memory_format, dtype):
    all_three(conv, dtype, memory_format)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation, dtype):
    conv = CONVS["groups"]
    vectors = [torch.randn(conv.k).to(dtype) for _ in range(3)]
    residual = conv.grad(dtype, "channels_last")
    x, weight = conv.image(dtype), conv.weight(dtype)
    forward(conv, x, weight, *vectors, residual, activation=activation)


@pytest.mark.parametrize("which", range(4), ids=["bias", "scale", "shift", "residual"])
def test_one_term_of_the_epilogue(which):
    conv = CONVS["3x3 same"]
    terms = [torch.randn(conv.k), torch.randn(conv.k), torch.randn(conv.k), conv.grad()]
    given = [term if i == which else None for i, term in enumerate(terms)]
    forward(conv, conv.image(), conv.weight(), *given)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    conv = CONVS["3x3 s2, padding all different"]
    x, weight, grad = view(conv.image()), view(conv.weight()), view(conv.grad())
    vectors = [view(torch.randn(conv.k)) for _ in range(3)]
    forward(conv, x, weight, *vectors, grad)
    input_grad(conv, grad, weight)
    weight_grad(conv, grad, x)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", ["3x3 same", "stem", "groups"])
def test_split_reductions(name, memory_format, monkeypatch):
    for module in (triton_forward, triton_phases, triton_weight_grad):
        monkeypatch.setattr(module, "matmul_split", lambda tile, tiles, steps: min(3, steps))
    conv = CONVS[name]
    all_three(conv, torch.float16, memory_format)
    vectors = [torch.randn(conv.k) for _ in range(3)]
    residual = conv.grad(memory_format="channels_last")
    x = conv.image(memory_format=memory_format)
    forward(conv, x, conv.weight(), *vectors, residual, activation=kinds.CODES["gelu"])


TILES = [
    (precision, tile)
    for precision, dtype_tiles in MATMUL_TILES.items()
    if precision in ("half", "ieee")  # the interpreter multiplies float32 in float32
    for tile in dtype_tiles
]


@pytest.mark.parametrize("precision, tile", TILES, ids=str)
def test_every_tile(precision, tile):
    conv = Conv((1, 18, 5, 5), 20, padding=(1, 1, 1, 1))
    with tiles.force(**{MATMUL.name: tile, triton_phases.PHASES.name: tile}):
        all_three(conv, torch.float16 if precision == "half" else torch.float32)


@pytest.mark.parametrize("name", ["stem", "groups", "3x3 s2, padding all different"])
def test_int64_offsets(name, monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    for module in (triton_forward, triton_phases, triton_weight_grad):
        monkeypatch.setattr(module, "needs_int64", lambda *_: True)
    all_three(CONVS[name])


@pytest.mark.parametrize(
    "conv",
    [Conv((0, 3, 5, 5), 4), Conv((2, 3, 5, 5), 0), Conv((2, 0, 5, 5), 4)],
    ids=["no images", "no output channels", "no input channels"],
)
def test_size_0(conv):
    x, weight, grad = conv.image(), conv.weight(), conv.grad()
    y = triton_kernel.conv2d(x, weight, *[None] * 5, *conv.geometry, 0, 0.0)
    assert y.shape == grad.shape
    assert (y == 0).all()  # sums of nothing
    dx = triton_kernel.conv2d_input_grad(grad, weight, conv.x, *conv.geometry)
    dw = triton_kernel.conv2d_weight_grad(grad, x, conv.weight_size, *conv.geometry)
    assert dx.shape == x.shape
    assert dw.shape == weight.shape
    assert (dx == 0).all()
    assert (dw == 0).all()


def test_no_input_channels_still_runs_the_epilogue():
    conv, bias = Conv((2, 0, 5, 5), 4), torch.tensor([-1.0, 0.0, 1.0, 2.0])
    y = triton_kernel.conv2d(
        conv.image(), conv.weight(), bias, *[None] * 4, *conv.geometry, kinds.RELU, 0.0
    )
    assert torch.equal(y, bias.relu().view(1, 4, 1, 1).expand_as(y))


def test_unsupported_dtype_names_operation_and_dtype():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"conv2d for torch\.float64"):
        triton_kernel.conv2d(x, x, *[None] * 5, (1, 1), (0,) * 4, (1, 1), 1, 0, 0.0)
