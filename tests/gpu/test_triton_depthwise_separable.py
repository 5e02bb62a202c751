"""The fused Triton kernel of depthwise-separable convolutions in the interpreter, by float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from triton_cases import ACTIVATIONS, ALPHA, DTYPES, FORMATS, VIEWS, check  # noqa: E402

from nnarch.kernels.conv2d.geometry import output_size  # noqa: E402
from nnarch.kernels.depthwise_separable import reference, triton_kernel  # noqa: E402
from nnarch.kernels.gpu import tiles  # noqa: E402


@dataclass(frozen=True)
class Separable:
    """Sizes of one problem; padding is (top, left, bottom, right)."""

    x: tuple[int, int, int, int]
    out: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    multiplier: int = 1

    @property
    def geometry(self):
        return self.stride, self.padding, self.dilation

    @property
    def channels(self):
        return self.x[1] * self.multiplier

    def tensors(self, dtype=torch.float32, memory_format="nchw"):
        """x, both weights, and a tensor of the output's size; small enough for float16."""
        c = self.channels
        dw = torch.randn(c, 1, *self.kernel) / 3
        size = output_size(self.x, dw.shape, *self.geometry)
        made = (
            torch.randn(self.x),
            dw,
            torch.randn(self.out, c, 1, 1) / c**0.5,
            torch.randn(size[0], self.out, *size[2:]),
        )
        x, dw, pw, residual = (t.to(dtype) for t in made)
        return x.contiguous(memory_format=FORMATS[memory_format]), dw, pw, residual


CASES = {
    "3x3 same": Separable((2, 9, 7, 5), 11, padding=(1, 1, 1, 1)),
    "3x3 s2, padding all different": Separable((1, 6, 8, 7), 5, (3, 3), (2, 2), (0, 1, 2, 3)),
    "5x2 dilated": Separable((1, 5, 13, 6), 33, (5, 2), (2, 1), (3, 1, 1, 2), (2, 3)),
    "multiplier": Separable((2, 5, 6, 5), 4, padding=(1, 1, 1, 1), multiplier=3),
    "size 1": Separable((1, 1, 1, 1), 1, (1, 1)),
    "more than a tile": Separable((1, 37, 9, 9), 70, padding=(1, 1, 1, 1)),
    "too many taps to unroll": Separable((1, 3, 9, 9), 4, (7, 7), padding=(3, 3, 3, 3)),
}


def forward(case, x, dw, pw, *, vectors=(None,) * 4, residual=None, inner=0, outer=0):
    return check(
        triton_kernel.depthwise_separable_conv2d,
        reference.depthwise_separable_conv2d,
        [x, dw, pw, *vectors, residual, None, None],
        *(*case.geometry, inner, ALPHA, outer, ALPHA),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward(case, memory_format, dtype):
    x, dw, pw, _ = case.tensors(dtype, memory_format)
    y = forward(case, x, dw, pw)
    assert y.is_contiguous(memory_format=FORMATS[memory_format])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(activation, dtype):
    """Sigmoid of a channel that does not exist is 0.5, which no weight may meet."""
    case = CASES["3x3 same"]
    x, dw, pw, residual = case.tensors(dtype, "channels_last")
    inner = [torch.randn(9).to(dtype) for _ in range(2)]
    outer = [torch.randn(11).to(dtype) for _ in range(2)]
    forward(
        case, x, dw, pw, vectors=(*inner, *outer), residual=residual, inner=activation,
        outer=activation,
    )  # fmt: skip


@pytest.mark.parametrize("which", range(4))
def test_one_vector(which):
    case = CASES["multiplier"]
    vectors = [None] * 4
    vectors[which] = torch.randn(15 if which < 2 else 4)
    forward(case, *case.tensors()[:3], vectors=vectors)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    case = CASES["3x3 s2, padding all different"]
    x, dw, pw, residual = (view(t) for t in case.tensors())
    vectors = [view(torch.randn(n)) for n in (6, 6, 5, 5)]
    forward(case, x, dw, pw, vectors=vectors, residual=residual)


@pytest.mark.parametrize("tile", triton_kernel.SEPARABLE.tiles["ieee"], ids=str)
def test_every_tile(tile):
    case = CASES["more than a tile"]
    with tiles.force(depthwise_separable=tile):
        forward(case, *case.tensors(memory_format="channels_last")[:3])


def test_int64_offsets(monkeypatch):
    monkeypatch.setattr(triton_kernel, "needs_int64", lambda *_: True)
    case = CASES["multiplier"]
    forward(case, *case.tensors()[:3])


def test_no_images():
    case = Separable((0, 3, 5, 5), 4, padding=(1, 1, 1, 1))
    assert forward(case, *case.tensors()[:3]).shape == (0, 4, 5, 5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inverted_residual(dtype):
    x, expand = torch.randn(2, 5, 7, 6).to(dtype), torch.randn(12, 5, 1, 1).to(dtype)
    dw, project = torch.randn(12, 1, 3, 3).to(dtype) / 3, torch.randn(5, 12, 1, 1).to(dtype) / 3
    biases = [torch.randn(n).to(dtype) for n in (12, 12, 5)]
    check(
        triton_kernel.inverted_residual,
        reference.inverted_residual,
        [x, expand, dw, project, *biases, x, None, None, None],
        *((1, 1), (1, 1, 1, 1), (1, 1), 2, 0.0, 2, 0.0, 0, 0.0),
        ulps=16 if dtype == torch.float16 else None,  # one rounding more, of the expanded tensor
    )


def test_unsupported_dtype_names_operation_and_dtype():
    x = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"separable_conv2d for torch\.float64"):
        triton_kernel.depthwise_separable_conv2d(
            x, x, x, *[None] * 7, (1, 1), (0,) * 4, (1, 1), 0, 0.0, 0, 0.0
        )
