"""Layer and RMS normalization against torch and float64, forward and backward; dropout."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import DTYPES, VIEWS, compare, name_of
from layer_norm_cases import EPS, dropped, operands, ours, stats_of, theirs
from tolerances import assert_as_accurate
from torch.nn import functional as TF

from nnarch import functional as F
from nnarch.kernels.layer_norm import op as ops


def _samples(name: str) -> list[tuple]:
    x, other, grad = (torch.randn(5, 3, 37) for _ in range(3))
    weight, bias, seed = torch.rand(37) + 0.5, torch.randn(37), torch.tensor([7])
    return {
        "layer_norm": [
            (x, weight, bias, other, 37, EPS, False),
            (x, weight, None, None, 37, EPS, True),
            (x, None, None, None, 111, EPS, False),
        ],
        "layer_norm_train": [
            (x, weight, bias, other, seed, 37, EPS, 0.3, False),
            (x, weight, bias, None, None, 37, EPS, 0.0, False),
            (x, None, None, other, None, 37, EPS, 0.0, True),
        ],
        "layer_norm_backward": [
            (grad, other, x, weight, stats_of(x, False), 37, 7),
            (grad, None, x, None, stats_of(x, True), 37, 1),
        ],
        "layer_norm_backward_backward": [
            (other, bias, weight, grad, x, weight, stats_of(x, rms), 37) for rms in (False, True)
        ],
        "row_dropout": [(x, seed, 37, 0.4)],
    }[name]


SAMPLES = {
    name: lambda name=name: _samples(name)
    for name in (
        "layer_norm", "layer_norm_train", "layer_norm_backward", "layer_norm_backward_backward",
        "row_dropout",
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------ accuracy

ROWS_AND_COLUMNS = [
    (0, 5), (1, 1), (3, 2), (1, 3), (5, 7), (4, 15), (7, 16), (2, 17), (9, 31), (3, 33), (131, 64),
    (1, 65), (67, 100), (5, 768), (133, 769), (3, 4099), (2, 65536), (3, 0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("size", ROWS_AND_COLUMNS, ids=str)
def test_forward_and_backward(size, rms, dtype):
    columns = size[1:]
    if dtype == torch.float64 and 0 < size[1] < 4:
        pytest.skip("the truth has lost its digits: test_gradcheck has rows as short")
    ulps = 64.0 if dtype == torch.float64 else 8.0
    for residual, both in ((False, False), (True, False), (True, True)):
        tensors = operands(rms, size, columns, dtype, residual)
        grad = torch.randn((1 + both) * size[0], *columns)
        y = compare(ours(rms, columns, both), theirs(rms, columns, both), tensors, grad, ulps=ulps)
        assert y.is_contiguous()


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("affine", ["", "weight", "bias"])
def test_parameters_that_are_not_there(affine, rms):
    size = (6, 50)
    tensors = operands(rms, size, (50,), torch.float32)
    kept = {n: t for n, t in tensors.items() if n in ("x", "residual") or n == affine}
    compare(ours(rms, (50,)), theirs(rms, (50,)), kept, torch.randn(size), ulps=8)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(
    "shape, dims", [((2, 3, 4, 5), 2), ((4, 1, 6), 3), ((3, 5, 1), 1), ((7,), 1)]
)
def test_normalized_shapes(shape, dims, rms):
    size = shape[len(shape) - dims :]
    tensors = operands(rms, shape, size, torch.float32)
    compare(ours(rms, size), theirs(rms, size), tensors, torch.randn(shape), ulps=8)


def test_a_small_variance_far_from_zero():
    """Two passes: one over x and x² would lose all digits."""
    for mean in (1e3, 1e6):
        tensors = operands(False, (5, 777), (777,), torch.float32, residual=False, mean=mean)
        compare(ours(False, (777,)), theirs(False, (777,)), tensors, torch.randn(5, 777), ulps=16)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_half_types_beside_parameters_in_float32(rms):
    """Against the definition: torch's fused kernels take no such RMS normalization."""
    for dtype in (torch.float16, torch.bfloat16):
        tensors = operands(rms, (9, 130), (130,), torch.float32)
        x, residual = tensors["x"].to(dtype), tensors["residual"].to(dtype)
        vectors = {"weight": tensors["weight"], "bias": tensors["bias"]}
        y = ours(rms, (130,))(x, residual=residual, **vectors)
        truth = theirs(rms, (130,))(
            x.double(), residual=residual.double(),
            **{n: v if v is None else v.double() for n, v in vectors.items()},
        )  # fmt: skip
        assert_as_accurate(y, truth.to(dtype), truth)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_views(rms, view):
    """Input, residual and gradient with any strides, stride 0 among them."""
    tensors = operands(rms, (3, 4, 5, 24), (24,), torch.float32)
    make = VIEWS[view]
    tensors |= {"x": make(tensors["x"]), "residual": make(tensors["residual"])}
    grad = make(torch.randn(3, 4, 5, 24))
    compare(ours(rms, (24,)), theirs(rms, (24,)), tensors, grad, ulps=16)


def test_rows_of_two_strides_are_read_in_place():
    packed = torch.randn(2, 9, 3, 4, 16)  # batch, time, query-key-value, heads, channels
    for x in (packed[:, :, 0], packed[:, 1:, 2], packed[1, :, :, 3], packed[..., 1, :]):
        torch.testing.assert_close(F.layer_norm(x, (16,)), TF.layer_norm(x, (16,)))
        torch.testing.assert_close(F.rms_norm(x, [16]), TF.rms_norm(x, (16,)))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_outputs_that_leave_the_caches(rms):
    """6 MB and more are written past the caches, where rows are whole lines."""
    for columns in (768, 1000):
        size = (2100, columns)
        tensors = operands(rms, size, (columns,), torch.float32)
        compare(ours(rms, (columns,), True), theirs(rms, (columns,), True), tensors,
                torch.randn(4200, columns), ulps=16)  # fmt: skip


def test_epsilon_of_rms_norm():
    for dtype in DTYPES:
        x = torch.full((2, 8), 1e-4).to(dtype)
        truth = (
            x.double()
            / (x.double().square() + (2**-52 if x.dtype == torch.float64 else 2**-23)).sqrt()
        )
        assert_as_accurate(F.rms_norm(x, (8,)), TF.rms_norm(x, (8,)), truth)


def test_infinities_and_nan_stay_in_their_row():
    x = torch.randn(6, 40)
    x[1, 3], x[2, 5], x[3, 39], x[4] = float("inf"), float("nan"), -float("inf"), 0.0
    for norm, twin in ((F.layer_norm, TF.layer_norm), (F.rms_norm, TF.rms_norm)):
        torch.testing.assert_close(norm(x, (40,)), twin(x, (40,)), equal_nan=True)


def test_a_residual_of_another_dtype_is_promoted():
    x, residual = torch.randn(3, 20).bfloat16(), torch.randn(3, 20)
    weight = torch.rand(20)
    y, s = F.layer_norm(x, (20,), weight, residual=residual, return_sum=True)
    assert y.dtype == s.dtype == torch.float32
    torch.testing.assert_close(s, x + residual)
    torch.testing.assert_close(y, TF.layer_norm(x + residual, (20,), weight))


def test_the_sum_is_the_input_where_nothing_is_added():
    x = torch.randn(3, 20, requires_grad=True)
    y, s = F.rms_norm(x, (20,), return_sum=True)
    assert s is x
    (y.sum() + s.sum()).backward()


# ------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("residual", [False, True])
def test_dropout_is_that_of_the_definition(residual, rms, monkeypatch):
    for columns, p in itertools.product((1, 4, 63, 64, 65, 768), (0.1, 0.5, 1.0)):
        monkeypatch.setattr(ops, "draw_seed", lambda x: torch.tensor([11**14]))
        function = F.rms_norm if rms else F.layer_norm
        x, other = torch.randn(2, 5, columns), torch.randn(2, 5, columns)
        added = other if residual else None
        leaf = x.clone().requires_grad_()
        y, s = function(leaf, (columns,), eps=EPS, residual=added, dropout_p=p, return_sum=True)
        expected = dropped(x, 11**14, p) + (other if residual else 0)
        torch.testing.assert_close(s, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(y, theirs(rms, (columns,))(expected), rtol=1e-4, atol=2e-5)
        weights = torch.randn(2, 5, columns)
        (dx,) = torch.autograd.grad(s, leaf, weights)
        torch.testing.assert_close(dx, dropped(weights, 11**14, p))


def test_dropout_follows_torchs_generator():
    x = torch.randn(40, 256)
    torch.manual_seed(3)
    one, two = (F.layer_norm(x, (256,), dropout_p=0.25) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(one, F.layer_norm(x, (256,), dropout_p=0.25))
    assert not torch.equal(one, two)
    _, s = F.layer_norm(torch.ones(400, 256), (256,), dropout_p=0.25, return_sum=True)
    assert abs(float((s == 0).double().mean()) - 0.25) < 0.01
