"""The Triton linear kernels in the interpreter, forward and as gradients, against float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from triton_cases import ACTIVATIONS, ALPHA, DTYPES, VIEWS, check  # noqa: E402

import nnarch  # noqa: E402
from nnarch import functional as F  # noqa: E402
from nnarch.kernels.activation import kinds  # noqa: E402
from nnarch.kernels.gpu import tiles  # noqa: E402
from nnarch.kernels.gpu.matmul import MATMUL  # noqa: E402
from nnarch.kernels.linear import (  # noqa: E402
    reference,
    triton_kernel,
    triton_product,
    triton_row,
)

# Rows, input features, output features: one row, the swapped product (up to 32 rows), the product.
SIZES = [
    (1, 1, 1),
    (1, 33, 5),
    (1, 530, 19),
    (2, 17, 70),
    (7, 64, 48),
    (32, 29, 3),
    (33, 19, 67),
    (70, 130, 21),
    (129, 1, 16),
]


def inputs(m, c, k, dtype=torch.float32):
    weight = torch.randn(k, c) / max(1, c) ** 0.5
    return torch.randn(m, c).to(dtype), weight.to(dtype)


def forward(x, weight, *epilogue, activation=0):
    vectors = list(epilogue) + [None] * (4 - len(epilogue))
    arguments = (activation, ALPHA)
    return check(triton_kernel.linear, reference.linear, [x, weight, *vectors, None], *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward(size, dtype):
    x, weight = inputs(*size, dtype)
    assert forward(x, weight).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 37])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(activation, rows, dtype):
    x, weight = inputs(rows, 21, 35, dtype)
    vectors = [torch.randn(35).to(dtype) for _ in range(3)]
    forward(x, weight, *vectors, torch.randn(rows, 35).to(dtype), activation=activation)


@pytest.mark.parametrize("rows", [1, 5, 37])
@pytest.mark.parametrize("which", range(4), ids=["bias", "scale", "shift", "residual"])
def test_one_term_of_the_epilogue(which, rows):
    terms = [torch.randn(35), torch.randn(35), torch.randn(35), torch.randn(rows, 35)]
    forward(*inputs(rows, 21, 35), *(t if i == which else None for i, t in enumerate(terms)))


@pytest.mark.parametrize("rows", [1, 5, 37])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view, rows):
    x, weight = inputs(rows, 21, 35)
    vectors = [view(torch.randn(35)) for _ in range(3)]
    forward(view(x), view(weight), *vectors, view(torch.randn(rows, 35)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_gradients(rows, dtype):
    """The gradients are products of transposed views, as autograd makes them."""
    x, weight = inputs(rows, 23, 18, dtype)
    bias, grad = torch.randn(18).to(dtype), torch.randn(rows, 18).to(dtype)
    with nnarch.use_backend("triton"):
        actual = gradients(F.linear, grad, x, weight, bias)
    torchs = gradients(torch.nn.functional.linear, grad, x, weight, bias)
    wide = (t.double() for t in (grad, x, weight, bias))
    truth = gradients(torch.nn.functional.linear, *wide)
    for name, *three in zip(("x", "weight", "bias"), actual, torchs, truth, strict=True):
        assert_as_accurate(*three, what=f"gradient of {name}")


def gradients(function, grad, *tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves), leaves, grad)


@pytest.mark.parametrize("shape", [(21,), (2, 3, 21), (1, 1, 21)], ids=str)
def test_any_number_of_dimensions(shape):
    _, weight = inputs(1, 21, 10)
    y = forward(torch.randn(shape), weight, torch.randn(10))
    assert y.shape == (*shape[:-1], 10)


@pytest.mark.parametrize("rows", [4, 40])
def test_split_reduction(rows, monkeypatch):
    monkeypatch.setattr(triton_product, "matmul_split", lambda tile, tiles, steps: min(3, steps))
    x, weight = inputs(rows, 150, 20)
    vectors = [torch.randn(20) for _ in range(3)]
    forward(x, weight, *vectors, torch.randn(20, rows).t(), activation=kinds.CODES["gelu"])


TILES = [
    (table, precision, tile)
    for table in (MATMUL, triton_product.FEW_ROWS, triton_row.ONE_ROW)
    for precision in ("half", "ieee")
    for tile in table.tiles[precision]
]


@pytest.mark.parametrize(
    "table, precision, tile", TILES, ids=[f"{t.name} {p} {tile}" for t, p, tile in TILES]
)
def test_every_tile(table, precision, tile):
    rows = {"matmul": 35, "linear_few_rows": 9, "linear_one_row": 1}[table.name]
    x, weight = inputs(rows, 70, 41, torch.float16 if precision == "half" else torch.float32)
    with tiles.force(**{table.name: tile}):
        forward(x, weight, torch.randn(41).to(x.dtype))


@pytest.mark.parametrize("rows", [1, 5, 37])
def test_int64_offsets(rows, monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    for module in (triton_product, triton_row):
        monkeypatch.setattr(module, "needs_int64", lambda *_: True)
    forward(*inputs(rows, 40, 35), torch.randn(35), None, None, torch.randn(rows, 35))


@pytest.mark.parametrize("size", [(0, 5, 4), (3, 5, 0), (0, 0, 0)], ids=str)
def test_no_rows_or_outputs(size):
    assert forward(*inputs(*size)).shape == (size[0], size[2])


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_no_input_features_still_runs_the_epilogue(rows):
    forward(*inputs(rows, 0, 4), torch.randn(4), activation=kinds.RELU)


def test_unsupported_dtype_names_operation_and_dtype():
    x = torch.zeros(2, 2, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=r"linear for torch\.float64"):
        triton_kernel.linear(x, x, *[None] * 5, 0, 0.0)
