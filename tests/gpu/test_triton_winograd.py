"""Winograd's convolution as Triton kernels in the interpreter, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as TF

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from tolerances import assert_as_accurate  # noqa: E402
from triton_cases import ACTIVATIONS, ALPHA, FORMATS, VIEWS, poisoned_memory  # noqa: E402

import nnarch  # noqa: E402
from nnarch import functional as F  # noqa: E402
from nnarch import library  # noqa: E402
from nnarch.kernels.conv2d import reference, triton_kernel  # noqa: E402
from nnarch.kernels.conv2d import triton_winograd_choice as choice  # noqa: E402
from nnarch.kernels.conv2d import triton_winograd_fused as fused  # noqa: E402
from nnarch.kernels.conv2d import triton_winograd_products as products  # noqa: E402
from nnarch.kernels.conv2d import triton_winograd_transforms as transforms  # noqa: E402
from nnarch.kernels.conv2d.triton_winograd_choice import Work  # noqa: E402
from nnarch.kernels.conv2d.triton_winograd_points import winograd  # noqa: E402
from nnarch.kernels.gpu import targets, tiles  # noqa: E402
from nnarch.kernels.gpu.targets import TARGETS  # noqa: E402

TILES = (2, 4)
# As on the CPU (tests/kernels/test_winograd.py): beside torch's direct kernel, which on small sums
# is nearly exact, some units in the last place of the largest output.
TOLERANCE = {2: dict(factor=2, ulps=4), 4: dict(factor=3, ulps=16)}

# (n, c, h, w, k), padding (top, left, bottom, right), groups: tails of all blocks and tiles.
SHAPES = {
    "one tile": ((1, 16, 4, 4, 16), (1, 1, 1, 1), 1),
    "odd": ((2, 9, 7, 5, 11), (1, 1, 1, 1), 1),
    "valid": ((2, 20, 9, 13, 40), (0, 0, 0, 0), 1),
    "groups": ((2, 24, 6, 11, 18), (1, 1, 1, 1), 2),
    "padding all different": ((1, 5, 6, 7, 35), (2, 1, 0, 3), 1),
    "padding wider than the filter": ((1, 4, 3, 5, 6), (4, 4, 4, 4), 1),
    "one row": ((1, 17, 1, 2, 3), (1, 1, 1, 1), 1),
    "a sum in two parts": ((1, 150, 4, 5, 17), (1, 1, 1, 1), 1),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
by_tile = pytest.mark.parametrize("tile", TILES)


@pytest.fixture(autouse=True)
def precision():
    """Give the process back as it was."""
    yield
    nnarch.set_precision("high")


@pytest.fixture
def force(monkeypatch):
    """Let a tile (or, with 0, the direct product) run whatever the shape."""

    def run_with(tile):
        monkeypatch.setattr(triton_kernel, "choose_tile", lambda _: tile)
        monkeypatch.setattr(triton_kernel, "choose_weight_grad", lambda _: tile > 0)

    return run_with


def tensors(shape, dtype=torch.float32, memory_format="nchw"):
    """An image of unit variance, a He-scaled weight, and a gradient of the output."""
    (n, c, h, w, k), (top, left, bottom, right), groups = shape
    x = torch.randn(n, c, h, w).to(dtype)
    weight = (torch.randn(k, c // groups, 3, 3) * (2 * groups / (9 * c)) ** 0.5).to(dtype)
    grad = torch.randn(n, k, h + top + bottom - 2, w + left + right - 2).to(dtype)
    x, grad = (t.contiguous(memory_format=FORMATS[memory_format]) for t in (x, grad))
    return x, weight, grad


def geometry(shape):
    return (1, 1), shape[1], (1, 1), shape[2]


def compare(tile, kernel, definition, operands, *arguments):
    """Run a launcher in poisoned memory and hold it against float64 and torch."""
    with poisoned_memory():
        actual = kernel(*operands, *arguments)
    torchs = definition(*operands, *arguments)
    exact = definition(*(t if t is None else t.double() for t in operands), *arguments)
    assert_as_accurate(actual, torchs, exact, **TOLERANCE[tile])
    return actual


def forward(tile, shape, x, weight, *terms, activation=0):
    terms = [*terms, *[None] * (4 - len(terms))]
    y = compare(
        tile,
        triton_kernel.conv2d,
        reference.conv2d,
        [x, weight, *terms, None],
        *(*geometry(shape), activation, ALPHA),
    )
    assert library.ran.algorithm == f"winograd_{tile}x{tile}"
    return y


def gradients(tile, shape, x, weight, grad):
    dx = compare(
        tile,
        triton_kernel.conv2d_input_grad,
        reference.conv2d_input_grad,
        [grad, weight],
        *(x.shape, *geometry(shape)),
    )
    assert library.ran.algorithm == f"winograd_{tile}x{tile}"
    dw = compare(
        4,
        triton_kernel.conv2d_weight_grad,
        reference.conv2d_weight_grad,
        [grad, x],
        *(weight.shape, *geometry(shape)),
    )
    assert library.ran.algorithm == "winograd_weight_grad"
    return dx, dw


@by_tile
@shapes
def test_forward_and_gradients(shape, tile, force):
    force(tile)
    x, weight, grad = tensors(shape, memory_format="channels_last")
    y = forward(tile, shape, x, weight)
    assert y.stride() == library.new_output(x, y.shape).stride()
    dx, dw = gradients(tile, shape, x, weight, grad)
    assert dx.stride() == library.new_output(grad, dx.shape).stride()
    assert dw.is_contiguous()


@by_tile
@pytest.mark.parametrize("name", ["one tile", "odd"])  # 16 channels are copied, 9 are not
def test_nchw(name, tile, force):
    force(tile)
    x, weight, grad = tensors(SHAPES[name])
    assert forward(tile, SHAPES[name], x, weight).is_contiguous()
    assert gradients(tile, SHAPES[name], x, weight, grad)[0].is_contiguous()


@by_tile
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation, tile, force):
    force(tile)
    shape = SHAPES["groups"]
    x, weight, residual = tensors(shape)
    vectors = [torch.randn(weight.shape[0]) for _ in range(3)]
    forward(tile, shape, x, weight, *vectors, residual, activation=activation)


@by_tile
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view, tile, force):
    force(tile)
    shape = SHAPES["odd"]
    x, weight, grad = map(view, tensors(shape))
    forward(tile, shape, x, weight, view(torch.randn(weight.shape[0])), None, None, grad)
    gradients(tile, shape, x, weight, grad)


def test_weight_grad_in_the_format_of_its_weight(force):
    force(4)
    shape = SHAPES["odd"]
    x, weight, grad = tensors(shape)
    arguments = (grad, x, weight.shape, *geometry(shape))
    dw = triton_kernel.conv2d_weight_grad(*arguments, True)
    assert dw.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(dw, triton_kernel.conv2d_weight_grad(*arguments))  # other tiles


def test_split_weight_grad(force, monkeypatch):
    force(4)
    monkeypatch.setattr(products, "matmul_split", lambda tile, programs, steps: min(3, steps))
    shape = ((2, 5, 23, 21, 6), (1, 1, 1, 1), 1)  # 72 tiles: 5 steps
    gradients(4, shape, *tensors(shape))


@pytest.mark.parametrize("chosen", products.PRODUCTS.tiles["ieee"], ids=str)
def test_every_tile_of_the_products(chosen, force):
    force(4)
    shape = SHAPES["odd"]
    x, weight, grad = tensors(shape)
    with tiles.force(winograd_products=chosen):
        forward(4, shape, x, weight)
        gradients(4, shape, x, weight, grad)


@pytest.mark.parametrize("chosen", fused.FUSED.tiles["ieee"], ids=str)
def test_every_tile_of_the_fused_kernel(chosen, force):
    force(2)
    shape = SHAPES["valid"]
    x, weight, _ = tensors(shape)
    with tiles.force(winograd_fused=chosen):
        forward(2, shape, x, weight)


@by_tile
def test_int64_offsets(tile, force, monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    force(tile)
    for module in (fused, products, transforms):
        monkeypatch.setattr(module, "needs_int64", lambda *_: True)
    shape = SHAPES["groups"]
    x, weight, grad = tensors(shape)
    forward(tile, shape, x, weight, None, None, None, grad)
    gradients(tile, shape, x, weight, grad)


def test_size_0():
    """Without images, channels or outputs the direct product answers."""
    for shape in ((0, 3, 5, 5, 4), (2, 0, 5, 5, 4), (2, 3, 5, 5, 0)):
        x, weight, grad = tensors((shape, (1, 1, 1, 1), 1)) if shape[1] else zero_channels(shape)
        rest = geometry((shape, (1, 1, 1, 1), 1))
        y = triton_kernel.conv2d(x, weight, *[None] * 5, *rest, 0, 0.0)
        assert y.shape == grad.shape
        assert (y == 0).all()
        assert (triton_kernel.conv2d_input_grad(grad, weight, x.shape, *rest) == 0).all()
        assert (triton_kernel.conv2d_weight_grad(grad, x, weight.shape, *rest) == 0).all()


def zero_channels(shape):
    n, c, h, w, k = shape
    return torch.randn(n, c, h, w), torch.randn(k, c, 3, 3), torch.randn(n, k, h, w)


@by_tile
def test_not_a_number_and_infinity_stay_in_their_tiles(tile, force):
    """They reach every output of the tiles that read them, and no other."""
    force(tile)
    shape = ((1, 3, 12, 12, 4), (1, 1, 1, 1), 1)
    x, weight, _ = tensors(shape)
    x[0, 1, 5, 5] = float("nan")
    y = triton_kernel.conv2d(x, weight, *[None] * 5, *geometry(shape), 0, 0.0)
    outside = torch.ones(12, 12, dtype=torch.bool)
    outside[4:8, 4:8] = False  # pixel 5 is read by the tiles of outputs 4 to 7, whichever tile
    assert y[0, :, ~outside].isnan().all()
    assert y[0, :, outside].isfinite().all()


# ------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("channels", [64, 256, 1024])
@by_tile
def test_error_bound(channels, tile, force):
    """5e-6 of the largest output, for inputs of unit variance and He-scaled weights (ADR 7)."""
    force(tile)
    shape = ((1, channels, 8, 8, 16), (1, 1, 1, 1), 1)
    x, weight, _ = tensors(shape)
    y = triton_kernel.conv2d(x, weight, *[None] * 5, *geometry(shape), 0, 0.0)
    truth = TF.conv2d(x.double(), weight.double(), padding=1)
    assert (y - truth).abs().max() <= 5e-6 * truth.abs().max()


def test_error_bound_of_the_weight_grad(force):
    force(4)
    shape = ((1, 16, 40, 40, 16), (1, 1, 1, 1), 1)
    x, weight, grad = tensors(shape)
    dw = triton_kernel.conv2d_weight_grad(grad, x, weight.shape, *geometry(shape))
    truth = torch.nn.grad.conv2d_weight(x.double(), weight.shape, grad.double(), padding=1)
    assert (dw - truth).abs().max() <= 5e-6 * truth.abs().max()


def test_float16_is_storage(force, monkeypatch):
    """The kernels take it, in exact float32 between; nothing chooses them for it."""
    force(2)
    shape = SHAPES["odd"]
    x, weight, _ = tensors(shape, torch.float16)
    triton_kernel.conv2d(x, weight, *[None] * 5, *geometry(shape), 0, 0.0)
    assert library.ran.algorithm == "implicit_gemm"
    monkeypatch.setattr(triton_kernel, "may_transform", lambda *_: True)
    for tile in TILES:
        force(tile)
        forward(tile, shape, x, weight)


def test_points_are_those_of_the_cpu():
    """The matrices satisfy the identity that defines them, at the points of winograd_points.h."""
    header = (Path(triton_kernel.__file__).parent / "winograd_points.h").read_text()
    assert "at[] = {0, 1, -1};" in header
    assert "at[] = {0, 0.625, -0.625, 1.5, -1.5};" in header
    for tile in TILES:
        wino = winograd(tile)
        matrices = (wino.output, wino.weight, wino.input, wino.weight_grad, wino.grad)
        at, g, bt, at3, gm = (torch.tensor(m, dtype=torch.float64) for m in matrices)
        d = torch.randn(wino.size, dtype=torch.float64)
        for output, filtered in ((at, g), (at3, gm)):
            taps = torch.randn(filtered.shape[1], dtype=torch.float64)
            short = output @ ((filtered @ taps) * (bt @ d))
            plain = d.unfold(0, len(taps), 1) @ taps
            torch.testing.assert_close(short, plain, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------- choice


def test_highest_forbids_it():
    conv = ((3, 3), (1, 1), (1, 1))
    assert choice.may_transform(torch.float32, (8, 8, *conv[0]), *conv[1:])
    nnarch.set_precision("highest")
    assert not choice.may_transform(torch.float32, (8, 8, *conv[0]), *conv[1:])


@pytest.mark.parametrize(
    "dtype, kernel, stride, dilation",
    [
        (torch.float16, (3, 3), (1, 1), (1, 1)),
        (torch.float32, (3, 1), (1, 1), (1, 1)),
        (torch.float32, (3, 3), (2, 2), (1, 1)),
        (torch.float32, (3, 3), (1, 1), (1, 2)),
    ],
)
def test_what_it_cannot_do(dtype, kernel, stride, dilation):
    assert not choice.may_transform(dtype, (8, 8, *kernel), stride, dilation)


def test_tf32_goes_direct(monkeypatch):
    monkeypatch.setattr(choice, "dot_precision", lambda _: "tf32")
    assert not choice.may_transform(torch.float32, (8, 8, 3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize(
    "target, work, tile",
    [
        ("sm_90", Work(32, 14, 14, 256, 256), 0),  # 132 µs directly, 360 by 2×2 tiles: measured
        ("sm_90", Work(32, 56, 56, 64, 64), 0),
        ("sm_90", Work(32, 56, 56, 256, 256), 4),
        ("sm_100", Work(32, 56, 56, 256, 256), 0),
        ("gfx942", Work(32, 56, 56, 64, 64), 2),
        ("gfx942", Work(32, 56, 56, 256, 256), 4),
        ("gfx942", Work(32, 28, 28, 512, 512), 4),
        ("gfx942", Work(1, 7, 7, 512, 512), 0),  # four tiles
        ("gfx942", Work(64, 56, 56, 8, 64), 0),  # few channels
        ("gfx942", Work(256, 224, 224, 64, 64), 2),  # 15 GB of transformed images and products
        ("gfx942", Work(32, 56, 56, 8192, 8192), 0),  # 4.3 GB of transformed weights
    ],
    ids=str,
)
def test_choice(target, work, tile):
    with targets.pretend(TARGETS[target]):
        assert choice.choose_tile(work) == tile


def test_the_trace_names_the_algorithm(force):
    force(4)
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    weight = torch.randn(5, 4, 3, 3, requires_grad=True)
    with nnarch.use_backend("triton"), nnarch.trace() as record:
        F.conv2d(x, weight, padding=1).sum().backward()
    algorithms = [entry.algorithm for entry in record if entry.op.startswith("conv2d")]
    assert sorted(algorithms) == ["winograd_4x4", "winograd_4x4", "winograd_weight_grad"]


def test_the_trace_names_the_direct_product():
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(5, 4, 3, 3)
    with nnarch.use_backend("triton"), nnarch.trace() as record:
        F.activation(F.conv2d(x, weight, padding=1), "relu")
    assert [entry.algorithm for entry in record] == ["implicit_gemm", ""]
