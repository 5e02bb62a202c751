"""The Triton transposed convolution in the interpreter against float64.

Its addresses are those of the convolution's gradient by its input: test_triton_conv2d.py has more
shapes of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from triton_cases import ACTIVATIONS, ALPHA, DTYPES, FORMATS, VIEWS, check  # noqa: E402

from nnarch import library  # noqa: E402
from nnarch.kernels.activation import kinds  # noqa: E402
from nnarch.kernels.conv_transpose2d import reference, triton_kernel, triton_phases  # noqa: E402
from nnarch.kernels.conv_transpose2d.op import output_size  # noqa: E402
from nnarch.kernels.gpu import tiles  # noqa: E402


@dataclass(frozen=True)
class Transposed:
    """Sizes of one transposed convolution."""

    x: tuple[int, int, int, int]
    k: int
    kernel: tuple[int, int] = (4, 4)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int] = (1, 1)
    extra: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self):
        return self.stride, self.padding, self.extra, self.dilation, self.groups

    def image(self, dtype=torch.float32, memory_format="nchw"):
        return torch.randn(self.x).to(dtype).contiguous(memory_format=FORMATS[memory_format])

    def weight(self, dtype=torch.float32):
        weight = torch.randn(self.x[1], self.k // self.groups, *self.kernel)
        return (weight / max(1, self.x[1]) ** 0.5).to(dtype)

    def like_output(self, dtype=torch.float32):
        size = output_size(self.x, self.weight().shape, *self.geometry)
        return torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)


CASES = {
    "4x4 s2": Transposed((2, 19, 4, 3), 23),
    "one pixel": Transposed((3, 17, 1, 1), 20, stride=(1, 1), padding=(0, 0)),
    "2x2 s2": Transposed((2, 18, 5, 3), 20, (2, 2), padding=(0, 0)),
    "output padding": Transposed((1, 17, 5, 4), 9, (3, 3), extra=(1, 1)),
    "more output padding than stride": Transposed(
        (1, 9, 3, 4), 10, (3, 3), (2, 1), (1, 1), (2, 1), (3, 2)
    ),
    "pixels that no tap meets": Transposed((2, 5, 3, 4), 4, (2, 2), (3, 3), (0, 0), (2, 1)),
    "groups": Transposed((2, 12, 4, 4), 18, groups=3),
    "few outputs": Transposed((2, 20, 5, 4), 3),
    "stride 1": Transposed((1, 17, 6, 5), 9, (3, 2), (1, 1), (1, 0)),
    "size 1": Transposed((1, 1, 1, 1), 1, (1, 1), (1, 1), (0, 0)),
}


def run(case, x, weight, *epilogue, activation=0):
    vectors = list(epilogue) + [None] * (4 - len(epilogue))
    return check(
        triton_kernel.conv_transpose2d,
        reference.conv_transpose2d,
        [x, weight, *vectors, None],
        *(*case.geometry, activation, ALPHA),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(case, memory_format, dtype):
    x = case.image(dtype, memory_format)
    y = run(case, x, case.weight(dtype))
    assert y.stride() == library.new_output(x, y.shape).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation, dtype):
    case = CASES["groups"]
    vectors = [torch.randn(case.k).to(dtype) for _ in range(3)]
    x, weight = case.image(dtype), case.weight(dtype)
    run(case, x, weight, *vectors, case.like_output(dtype), activation=activation)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    case = CASES["output padding"]
    vectors = [view(torch.randn(case.k)) for _ in range(3)]
    run(case, view(case.image()), view(case.weight()), *vectors, view(case.like_output()))


@pytest.mark.parametrize("name", ["4x4 s2", "output padding", "groups", "few outputs"])
def test_split_reductions(name, monkeypatch):
    """Parts of every phase, at the places of its pixels."""
    monkeypatch.setattr(triton_phases, "matmul_split", lambda tile, tiles, steps: min(3, steps))
    case = CASES[name]
    vectors = [torch.randn(case.k) for _ in range(3)]
    gelu = kinds.CODES["gelu"]
    run(case, case.image(), case.weight(), *vectors, case.like_output(), activation=gelu)


TILES = [
    (precision, tile)
    for precision, dtype_tiles in triton_phases.PHASES_TILES.items()
    if precision in ("half", "ieee")  # the interpreter multiplies float32 in float32
    for tile in dtype_tiles
]


@pytest.mark.parametrize("precision, tile", TILES, ids=str)
def test_every_tile(precision, tile):
    case = Transposed((1, 18, 4, 4), 20)
    dtype = torch.float16 if precision == "half" else torch.float32
    with tiles.force(**{triton_phases.PHASES.name: tile}):
        run(case, case.image(dtype), case.weight(dtype))


def test_int64_offsets(monkeypatch):
    monkeypatch.setattr(triton_phases, "needs_int64", lambda *_: True)
    case = CASES["groups"]
    vectors = [torch.randn(case.k) for _ in range(3)]
    run(case, case.image(), case.weight(), *vectors, case.like_output(), activation=kinds.RELU)


def test_no_images():
    case = Transposed((0, 5, 3, 3), 4)
    y = triton_kernel.conv_transpose2d(
        case.image(), case.weight(), *[None] * 5, *case.geometry, 0, 0.0
    )
    assert y.shape == (0, 4, 6, 6)


def test_unsupported_dtype_names_operation_and_dtype():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    steps = ((1, 1), (0, 0), (0, 0), (1, 1), 1)
    with pytest.raises(NotImplementedError, match=r"conv_transpose2d for torch\.float64"):
        triton_kernel.conv_transpose2d(x, x, *[None] * 5, *steps, 0, 0.0)
