"""Winograd with stride 2, in phases, and for three taps in a row or a column."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from kernel_cases import (
    FORMATS,
    VIEWS,
    check_under_isa,
    compare,
    name_of,
    needs_poison,
    on_fresh_memory,
)
from tolerances import assert_as_accurate
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch import library, nn
from nnarch.kernels.conv2d.geometry import padding_of
from nnarch.kernels.conv2d.op import input_grad, weight_grad

pytestmark = [
    pytest.mark.skipif(library.native is None, reason="only the native kernels have Winograd"),
    pytest.mark.usefixtures("default_precision_after"),
]


@dataclass(frozen=True)
class Case:
    """A convolution of [n, c, h, w] to k channels, dilation 1; the stride is along the taps."""

    kernel: tuple[int, int]
    stride: int
    n: int
    c: int
    h: int
    w: int
    k: int
    padding: object = 0
    groups: int = 1

    @property
    def steps(self):
        return tuple(self.stride if taps > 1 else 1 for taps in self.kernel)

    @property
    def pads(self):
        weight = torch.empty(1, 1, *self.kernel)
        return padding_of(self.padding, weight, self.steps, (1, 1))

    @property
    def geometry(self):
        return self.steps, self.pads, (1, 1), self.groups

    def tensors(self, memory_format=torch.contiguous_format):
        fan_in = self.c // self.groups * self.kernel[0] * self.kernel[1]
        weight = torch.randn(self.k, self.c // self.groups, *self.kernel) * (2 / fan_in) ** 0.5
        x = torch.randn(self.n, self.c, self.h, self.w)
        return x.contiguous(memory_format=memory_format), weight, torch.randn(self.k)

    def ours(self, x, weight, bias=None, **options):
        return F.conv2d(x, weight, bias, *self.geometry, **options)

    def theirs(self, x, weight, bias=None):
        top, left, bottom, right = self.pads
        x = TF.pad(x, (left, right, top, bottom))
        return TF.conv2d(x, weight, bias, self.steps, groups=self.groups)

    def by_tile(self, tile, x, weight, bias=None, **epilogue):
        packed = F.pack_conv2d_weight(weight, self.groups, tile=tile)
        with torch.no_grad(), nnarch.trace() as record:
            y = self.ours(x, weight, bias, packed=packed, **epilogue)
        assert record.entries[0].algorithm == name_of_tile(tile)
        return y


def name_of_tile(tile):
    m = tile % 20
    return f"winograd_{'strided_' if tile > 20 else ''}{m}x{m}"


def tiles_of(case):
    return (22, 23, 24) if case.stride == 2 else (2, 4)


# Tails of channels, panels, tiles and blocks; sums of several parts; pixels that no window reads.
CASES = [
    Case((3, 3), 2, 1, 16, 8, 8, 32, 1),
    Case((3, 3), 2, 2, 48, 9, 13, 40),
    Case((3, 3), 2, 3, 64, 15, 30, 70, (2, 1, 0, 3)),
    Case((3, 3), 2, 2, 96, 12, 11, 24, 2, 2),
    Case((3, 3), 2, 5, 32, 28, 31, 17, 1),
    Case((3, 3), 2, 1, 272, 7, 6, 33, 1),
    Case((3, 3), 2, 1, 16, 1, 2, 20, 1),
    Case((1, 3), 1, 2, 20, 9, 13, 40, (0, 1)),
    Case((1, 3), 1, 3, 33, 1, 30, 35, (0, 2)),
    Case((1, 3), 1, 4, 48, 5, 7, 24, (1, 1), 2),
    Case((1, 3), 1, 2, 300, 1, 70, 17, "same"),
    Case((3, 1), 1, 2, 20, 13, 9, 40, (1, 0)),
    Case((3, 1), 1, 9, 40, 31, 17, 33, (2, 0, 0, 1)),
    Case((1, 3), 2, 2, 48, 5, 23, 40, (0, 1)),
    Case((1, 3), 2, 1, 272, 1, 70, 17, (0, 2, 1, 0)),
    Case((3, 1), 2, 5, 64, 30, 17, 40, (1, 0), 2),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)
FEW = [CASES[i] for i in (2, 3, 7, 12, 13, 15)]
few = pytest.mark.parametrize("case", FEW, ids=str)


@cases
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_forward(case, memory_format):
    tensors = case.tensors(memory_format)
    truth = case.theirs(*(t.double() for t in tensors))
    for tile in tiles_of(case):
        y = case.by_tile(tile, *tensors)
        # As for 3×3 taps: their 2×2 and 4×4 tiles.
        ulps = 16 if tile % 20 == 4 else 4
        assert_as_accurate(y, case.theirs(*tensors), truth, factor=3, ulps=ulps)
        assert y.is_contiguous(memory_format=memory_format)


@few
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
def test_epilogue(case, activation):
    tensors = case.tensors()
    y = case.ours(*tensors)
    epilogue = dict(scale=torch.rand(case.k) + 0.5, shift=torch.randn(case.k))
    epilogue |= dict(residual=torch.randn_like(y), activation=activation)
    ours = [case.by_tile(tile, *tensors, **epilogue) for tile in tiles_of(case)]
    nnarch.set_precision("highest")
    direct = case.ours(*tensors, **epilogue)
    for y in ours:
        torch.testing.assert_close(y, direct, rtol=1e-5, atol=1e-5)


@few
@pytest.mark.parametrize("view", VIEWS)
def test_views(case, view):
    x, weight, bias = case.tensors()
    x, weight = VIEWS[view](x), VIEWS[view](weight)
    for tile in tiles_of(case):
        dense = case.by_tile(tile, x.contiguous(), weight.contiguous(), bias)
        assert torch.equal(case.by_tile(tile, x, weight, bias), dense)


@cases
def test_reads_no_uninitialised_memory(case):
    needs_poison()
    tensors = case.tensors()
    for tile in tiles_of(case):
        y = case.by_tile(tile, *tensors)
        assert torch.equal(on_fresh_memory(lambda tile=tile: case.by_tile(tile, *tensors)), y)


# Large enough for Winograd in all three passes.
TRAINED = [
    Case((3, 3), 2, 4, 64, 37, 30, 64, 1),
    Case((3, 3), 2, 2, 96, 34, 33, 128, (0, 1, 2, 1), 2),
    Case((3, 3), 2, 20, 48, 28, 28, 64, 1),
    Case((1, 3), 1, 8, 64, 1, 300, 96, (0, 1)),
    Case((1, 3), 1, 3, 72, 21, 19, 64, (0, 2), 2),
    Case((3, 1), 1, 2, 64, 31, 30, 100, (1, 0)),
    Case((1, 3), 2, 8, 128, 1, 300, 144, (0, 1)),
    Case((3, 1), 2, 3, 128, 40, 30, 128, (1, 0)),
]


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_gradients(case, memory_format):
    x, weight, bias = case.tensors(memory_format)
    weight = weight.contiguous(memory_format=memory_format)
    with nnarch.trace() as record:
        y = case.ours(x, weight.requires_grad_(), bias)
        y.square().sum().backward()
    names = {entry.op: entry.algorithm for entry in record}
    assert names["conv2d"].startswith("winograd")
    assert names["conv2d_weight_grad"] == "winograd_weight_grad"
    compare(
        case.ours,
        case.theirs,
        {"x": x, "weight": weight.detach(), "bias": bias},
        torch.randn_like(y),
        factor=3,
        ulps=32,  # as for 3×3 with stride 1
    )


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_gradients_read_no_uninitialised_memory(case):
    needs_poison()
    x, weight, _ = case.tensors(torch.channels_last)
    grad = torch.randn_like(case.theirs(x, weight))

    def gradients():
        dx = input_grad(grad, weight, tuple(x.shape), *case.geometry)
        return torch.cat(
            [dx.flatten(), weight_grad(grad, x, tuple(weight.shape), *case.geometry).flatten()]
        )

    assert torch.equal(on_fresh_memory(gradients), gradients())


def test_double_backward():
    case = Case((3, 3), 2, 4, 32, 37, 30, 32, 1)
    x, weight, _ = case.tensors()

    def penalty(convolve, x, weight):
        y = convolve(x.requires_grad_(), weight.requires_grad_()).square().sum()
        dx, dw = torch.autograd.grad(y, (x, weight), create_graph=True)
        return torch.autograd.grad(dx.square().sum() + dw.square().sum(), (x, weight))

    truth = penalty(case.theirs, x.double(), weight.double())
    for mine, exact in zip(penalty(case.ours, x, weight), truth, strict=True):
        torch.testing.assert_close(
            mine.double(), exact, rtol=1e-4, atol=2e-5 * exact.abs().max().item()
        )


@pytest.mark.parametrize("channels", [16, 64, 256, 1024])
@pytest.mark.parametrize("kernel, stride", [((3, 3), 2), ((1, 3), 1)], ids=str)
def test_error_bound(kernel, stride, channels):
    """5e-6 of the largest output, for inputs of unit variance and He-scaled weights."""
    case = Case(kernel, stride, 1, channels, 28, 28, 64, (kernel[0] // 2, 1))
    x, weight, _ = case.tensors(torch.channels_last)
    truth = case.theirs(x.double(), weight.double())
    largest = truth.abs().max()
    theirs = (case.theirs(x, weight) - truth).abs().max()
    for tile in tiles_of(case):
        error = (case.by_tile(tile, x, weight) - truth).abs().max()
        assert error <= 5e-6 * largest
        assert error <= 3 * theirs + 1.5e-6 * largest


@pytest.mark.parametrize("case", TRAINED, ids=str)
def test_one_and_two_threads(case):
    tensors, threads = case.tensors(), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = case.ours(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, torch.cos(y.detach() * 100))])
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


@few
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_storage(case, dtype):
    tensors = [t.to(dtype) for t in case.tensors()]
    truth = case.theirs(*(t.double() for t in tensors))
    for tile in tiles_of(case):
        assert_as_accurate(case.by_tile(tile, *tensors), truth.to(dtype), truth)


def test_when_it_is_chosen():
    weight = torch.randn(64, 64, 3, 3)
    assert F.conv2d_tile(weight, (1, 64, 56, 56), 2, 1) in (23, 24)
    assert F.conv2d_tile(weight, (8, 64, 4, 4), 2, 1) in (0, 22)
    assert F.conv2d_tile(weight, (1, 64, 56, 56), (2, 1), 1) == 0
    assert F.conv2d_tile(weight, (1, 64, 56, 56), 2, 1, 2) == 0
    assert F.conv2d_tile(weight[:, :60], (1, 60, 56, 56), 2, 1) == 0  # a slot is whole vectors
    assert F.conv2d_tile(weight[:, :, :1], (1, 64, 1, 1000), padding=(0, 1)) == 4
    assert F.conv2d_tile(weight[:, :, :1], (1, 64, 1, 1000), (1, 2), (0, 1)) in (23, 24)
    assert F.conv2d_tile(weight[:, :, :1], (1, 64, 1, 1000), 2, padding=(0, 1)) == 0
    assert F.conv2d_tile(weight[:, :, :2], (1, 64, 56, 56)) == 0
    nnarch.set_precision("highest")
    assert F.conv2d_tile(weight, (1, 64, 56, 56), 2, 1) == 0


def test_packed_for_another_convolution():
    case = CASES[0]
    x, weight, _ = case.tensors()
    packed = F.pack_conv2d_weight(weight, tile=24)
    with pytest.raises(ValueError, match="packed does not belong"):
        F.conv2d(x, weight, padding=1, packed=packed)
    with pytest.raises(ValueError, match=r"tile must be one of \(0, 2, 4, 5, 6\)"):
        F.pack_conv2d_weight(torch.randn(32, 24, 3, 3), tile=24)
    with pytest.raises(ValueError, match=r"tile must be one of \(0, 2, 4, 22, 23, 24\)"):
        F.pack_conv2d_weight(torch.randn(32, 32, 1, 3), tile=6)
    with pytest.raises(ValueError, match=r"tile must be one of \(0, 2\)"):
        F.pack_conv2d_weight(torch.randn(32, 32, 5, 5), tile=22)


@pytest.mark.parametrize(
    "conv, size",
    [
        (nn.Conv2d(64, 64, 3, 2, 1), (2, 64, 30, 30)),
        (nn.Conv2d(64, 64, (3, 1), padding=(1, 0), padding_mode="circular"), (2, 64, 30, 30)),
        (nn.Conv1d(64, 96, 3, padding=1), (2, 64, 300)),
        (nn.Conv1d(64, 96, 3, padding="same", padding_mode="reflect"), (64, 300)),
        (nn.Conv1d(128, 144, 3, 2, 1), (2, 128, 300)),
    ],
    ids=str,
)
def test_modules_pack_for_it(conv, size):
    x = torch.randn(size)
    conv.eval()
    y = torch_twin(conv)(x)
    with torch.no_grad(), nnarch.trace() as record:
        torch.testing.assert_close(conv(x), y, rtol=1e-5, atol=2e-5)
    assert record.entries[-1].algorithm.startswith("winograd")
    assert set(conv._packed.packed) <= {4, 22, 23, 24}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_signals_in_parts(dtype):
    """The last part of a batch, one signal, goes the way of the whole."""
    conv, x = nn.Conv1d(128, 128, 3, 2, 1).eval().to(dtype), torch.randn(33, 128, 128).to(dtype)
    truth = torch_twin(conv.double())(x.double())
    with torch.no_grad():
        y = conv.to(dtype)(x)
    assert_as_accurate(y, truth.to(dtype), truth)


def test_bad_input_of_a_signal():
    with torch.no_grad(), pytest.raises(ValueError, match="conv1d: x must be"):
        nn.Conv1d(64, 64, 3).eval()(torch.randn(300))


def torch_twin(conv):
    kind = torch.nn.Conv1d if isinstance(conv, torch.nn.Conv1d) else torch.nn.Conv2d
    options = dict(stride=conv.stride, padding=conv.padding, padding_mode=conv.padding_mode)
    twin = kind(conv.in_channels, conv.out_channels, conv.kernel_size, **options)
    twin = twin.to(conv.weight.dtype)
    twin.load_state_dict(conv.state_dict())
    return twin.requires_grad_(False)


def check_all() -> None:
    """Runs in a process of its own."""
    for case in CASES:
        test_forward(case, torch.channels_last)
    for case in TRAINED:
        test_gradients(case, torch.contiguous_format)


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_other_instruction_sets(isa):
    check_under_isa(isa, check_all)
