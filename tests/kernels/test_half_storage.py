"""Half types are storage: blocks of them become float in cache, and no tensor has a float copy.

The shapes here are cut into several parts, of images and of rows; the families' own tests see
small ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from alone import alone, measures_memory, peak
from kernel_cases import FORMATS, check_under_isa, name_of
from tolerances import assert_as_accurate
from torch import Tensor
from torch.nn import functional as TF

from nnarch import functional as F

HALVES = (torch.bfloat16, torch.float16)
Call = Callable[..., Tensor]


def _residual(f: Call, *args: int | None, **options: int | tuple[int, int]) -> Call:
    """A convolution of ours with bias, residual and relu."""
    return lambda x, w, b, r: f(x, w, b, *args, residual=r, activation="relu", **options)


def _relu(f: Call, *args: int | None, **options: int | tuple[int, int]) -> Call:
    return lambda x, w, b, r: (f(x, w, b, *args, **options) + r).relu()


# Sizes of input and weight, ours, torch's.
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Call, Call]] = {
    name: (x, w, _residual(getattr(F, ours), **options), _relu(getattr(TF, theirs), **options))
    for name, ours, theirs, x, w, options in (
        ("1x1", "conv2d", "conv2d", (5, 64, 53, 47), (40, 64, 1, 1), {}),
        ("3x3", "conv2d", "conv2d", (2, 33, 90, 91), (65, 33, 3, 3), {"padding": 1}),
        ("3x3, stride 2", "conv2d", "conv2d", (3, 32, 113, 97), (48, 32, 3, 3),
         {"padding": 1, "stride": 2}),
        ("stem", "conv2d", "conv2d", (2, 3, 211, 190), (32, 3, 7, 7), {"padding": 3, "stride": 2}),
        ("5x5, dilated", "conv2d", "conv2d", (1, 24, 131, 120), (40, 24, 5, 5),
         {"padding": 4, "dilation": 2}),
        ("more padding than kernel", "conv2d", "conv2d", (3, 40, 61, 60), (40, 40, 3, 3),
         {"padding": 5}),
        ("narrow groups", "conv2d", "conv2d", (2, 64, 93, 92), (64, 4, 3, 3),
         {"padding": 1, "groups": 16}),
        ("wide groups", "conv2d", "conv2d", (2, 96, 70, 71), (64, 48, 3, 3),
         {"padding": 1, "groups": 2}),
        ("depthwise", "conv2d", "conv2d", (2, 72, 75, 75), (72, 1, 3, 3),
         {"padding": 1, "groups": 72}),
        ("depthwise, stride 2", "conv2d", "conv2d", (2, 48, 75, 94), (48, 1, 5, 5),
         {"padding": 2, "stride": 2, "groups": 48}),
        ("transposed", "conv_transpose2d", "conv_transpose2d", (2, 48, 61, 60), (48, 40, 4, 4),
         {"padding": 1, "stride": 2}),
        ("transposed, gaps", "conv_transpose2d", "conv_transpose2d", (2, 48, 45, 60),
         (48, 40, 2, 2), {"stride": 3, "output_padding": 2}),
        ("transposed to few", "conv_transpose2d", "conv_transpose2d", (2, 64, 130, 131),
         (64, 3, 4, 4), {"padding": 1, "stride": 2}),
    )
}  # fmt: skip


def _convolution_case(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x_size, w_size, ours, theirs = CONVOLUTIONS[name]
    fan_in = w_size[2] * w_size[3] * (w_size[0] if name.startswith("transposed") else w_size[1])
    x, w = torch.randn(x_size), torch.randn(w_size) / fan_in**0.5
    channels = w_size[1] if name.startswith("transposed") else w_size[0]
    x, w, b = (t.to(dtype) for t in (x, w, torch.randn(channels)))
    truth = theirs(x.double(), w.double(), b.double(), torch.zeros(()))
    r = torch.randn(truth.shape).to(dtype)
    truth = theirs(x.double(), w.double(), b.double(), r.double())
    x, r = (t.contiguous(memory_format=layout) for t in (x, r))
    y = ours(x, w, b, r)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    # Winograd's own error is far below a unit in the last place of a half type.
    assert_as_accurate(y, truth.to(dtype), truth)


@pytest.mark.parametrize("layout", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_in_parts(name, dtype, layout):
    _convolution_case(name, dtype, layout)


def test_parts_of_a_view():
    """Neither dense order: rows are widened one by one."""
    wide = torch.randn(2, 67, 95, 97).bfloat16()
    x, w = wide[:, 1:65, ::2, 1:], torch.randn(32, 64, 3, 3).bfloat16()
    assert torch.equal(F.conv2d(x, w, padding=1), F.conv2d(x.contiguous(), w, padding=1))


@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 65, 530, 1100])
def test_linear(rows, transposed, dtype):
    x, w, b = torch.randn(rows, 1030), torch.randn(70, 1030) / 32, torch.randn(70)
    r = torch.randn(rows, 70)
    x, w, b, r = (t.to(dtype) for t in (x, w, b, r))
    if transposed:
        w = w.t().contiguous().t()
    truth = (TF.linear(x.double(), w.double(), b.double()) + r.double()).relu()
    assert_as_accurate(F.linear(x, w, b, residual=r, activation="relu"), truth.to(dtype), truth)
    packed = torch.ops.nnarch.linear_pack(w)
    y = torch.ops.nnarch.linear(x, w, b, None, None, r, packed, 1, 0.0)
    assert_as_accurate(y, truth.to(dtype), truth)


@pytest.mark.parametrize("layout", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
def test_pooling_is_that_of_floats(dtype, layout):
    """The same kernel on the same values, rounded once: equal bit for bit."""
    x = torch.randn(2, 37, 61, 67).to(dtype).contiguous(memory_format=layout)
    for pool in (
        lambda t: F.max_pool2d(t, 3, 2, 1),
        lambda t: F.max_pool2d(t, 3, 1, 1, 2),
        lambda t: F.max_pool2d(t, 4, 3),
        lambda t: F.avg_pool2d(t, 3, 2, 1),
        lambda t: F.avg_pool2d(t, (5, 4), 3),
        lambda t: F.adaptive_avg_pool2d(t, (7, 5)),
        lambda t: F.adaptive_avg_pool2d(t, 1),
        lambda t: F.adaptive_max_pool2d(t, (7, 5)),
        lambda t: F.local_response_norm(t, 5),
    ):
        y = pool(x)
        assert y.dtype == dtype
        assert torch.equal(y, pool(x.float()).to(dtype))


@pytest.mark.parametrize("layout", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", HALVES, ids=name_of)
@pytest.mark.parametrize("size", [(2, 3, 401, 403), (1, 300, 29, 31), (9, 70, 41, 53)], ids=str)
def test_global_average_in_parts(size, dtype, layout):
    x = torch.randn(size).to(dtype).contiguous(memory_format=layout)
    truth = x.double().mean((2, 3), keepdim=True)
    assert_as_accurate(F.adaptive_avg_pool2d(x, 1), truth.to(dtype), truth)


@pytest.mark.parametrize("layout", FORMATS, ids=name_of)
def test_gradients_in_parts(layout):
    x = torch.randn(9, 40, 60, 61).bfloat16().contiguous(memory_format=layout)
    w, g = torch.randn(48, 40, 3, 3).bfloat16() / 20, torch.randn(9, 48, 60, 61).bfloat16()
    truth, mine = (
        torch.autograd.grad(f(*leaves, padding=1), leaves, g.to(leaves[0].dtype))
        for f, leaves in (
            (TF.conv2d, [x.double().requires_grad_(), w.double().requires_grad_()]),
            (F.conv2d, [x.clone().requires_grad_(), w.clone().requires_grad_()]),
        )
    )
    for a, b in zip(mine, truth, strict=True):
        assert_as_accurate(a, b.bfloat16(), b)


def check_isa() -> None:
    for name in CONVOLUTIONS:
        _convolution_case(name, torch.bfloat16, torch.channels_last)
    for dtype in HALVES:
        test_linear(3, False, dtype)
        test_linear(65, True, dtype)
        test_pooling_is_that_of_floats(dtype, torch.contiguous_format)
        for layout in FORMATS:
            test_global_average_in_parts((2, 3, 401, 403), dtype, layout)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_instruction_sets(isa):
    check_under_isa(isa, check_isa)


# ----------------------------------------------------------------------------------------- memory


def _zeros(*size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.bfloat16)


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "1x1": lambda x: F.conv2d(x, _zeros(32, 32, 1, 1)),
    "3x3": lambda x: F.conv2d(x, _zeros(32, 32, 3, 3), padding=1),
    "narrow groups": lambda x: F.conv2d(x, _zeros(32, 4, 3, 3), padding=1, groups=8),
    "depthwise": lambda x: F.conv2d(x, _zeros(32, 1, 3, 3), padding=1, groups=32),
    "transposed": lambda x: F.conv_transpose2d(x, _zeros(32, 16, 2, 2), stride=2),
    "maximum": lambda x: F.max_pool2d(x, 3, 2, 1),
    "average": lambda x: F.avg_pool2d(x, 2),
    "global average": lambda x: F.adaptive_avg_pool2d(x, 1),
    "batch norm": lambda x: F.batch_norm(x, None, None, training=True),
    "response norm": lambda x: F.local_response_norm(x, 5),
    "gelu": lambda x: F.activation(x, "gelu"),
    "linear": lambda x: (
        F.linear(x.permute(0, 2, 3, 1), _zeros(48, 32))
        if x.stride(1) == 1
        else F.linear(x, _zeros(48, 1024))
    ),
}


def _growth(name: str, layout: torch.memory_format) -> int:
    """Bytes by which the peak of memory grows in one call, beside its output."""
    call = MEMORY[name]
    call(_zeros(1, 32, 512, 1024)[:, :, :24].contiguous(memory_format=layout))  # loads code
    x = torch.empty((2, 32, 512, 1024), dtype=torch.bfloat16, memory_format=layout).fill_(0.5)
    before = peak()
    y = call(x)
    return peak() - before - y.nbytes


@measures_memory
@pytest.mark.parametrize("layout", FORMATS, ids=name_of)
@pytest.mark.parametrize("name", MEMORY)
def test_no_float_copy_in_memory(name, layout):
    """Beside its output, an operation takes a few MB: a float copy of x would have 134."""
    assert alone(_growth, name, layout) < 16 << 20
