"""The Triton normalization kernels in the interpreter, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate
from torch.nn import functional as F

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from triton_cases import DTYPES  # noqa: E402

from nnarch import library  # noqa: E402
from nnarch.kernels.activation import kinds  # noqa: E402
from nnarch.kernels.normalization import (  # noqa: E402  # noqa: E402
    reference,
    running,
    triton_kernel,
    triton_layout,
    triton_reduce,
    triton_running,
)

EPS = 1e-3
C = 5
LAYOUTS = {
    "nchw": lambda: torch.randn(3, C, 7, 11),
    "channels_last": lambda: torch.randn(3, C, 7, 11).contiguous(memory_format=torch.channels_last),
    "2-d": lambda: torch.randn(37, C),
    "3-d": lambda: torch.randn(3, C, 67),
    "slice": lambda: torch.randn(3, 9, 7, 13)[:, 2:7, :, 1:12],
    "transposed": lambda: torch.randn(3, C, 11, 7).transpose(2, 3),
    "expanded": lambda: torch.randn(1, C, 1, 1).expand(3, C, 7, 11),
    "one value": lambda: torch.randn(1, C, 1, 1),
}
NO_VARIANCE = ("one value", "expanded")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty returns NaN: what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def per_channel(*shape, dtype=torch.float32):
    return (torch.rand(*shape, C) + 0.5).to(dtype)


def check(actual, function, *tensors, ulps=None):
    """Tensors that a kernel computed, against torch in the same dtype and in float64."""
    torchs = function(*tensors)
    truth = function(*(t if t is None else t.double() for t in tensors))
    for i, (a, t, exact) in enumerate(zip(actual, torchs, truth, strict=True)):
        assert_as_accurate(a, t.to(a.dtype), exact, ulps=ulps, what=f"result {i}")


def assert_format(actual, x):
    assert actual.stride() == library.new_output(x, x.shape).stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_affine(layout, dtype):
    x, residual = LAYOUTS[layout]().to(dtype), LAYOUTS[layout]().to(dtype)
    scale, shift = per_channel(2)
    code = kinds.CODES["leaky_relu"]
    y = triton_kernel.affine(x, scale, shift, residual, code, 0.2)

    def torchs(x, residual, scale, shift):
        size = (1, C, *[1] * (x.dim() - 2))
        wide = torch.promote_types(x.dtype, torch.float32)
        z = x.to(wide) * scale.view(size) + shift.view(size) + residual
        return (F.leaky_relu(z, 0.2),)

    check([y], torchs, x, residual, scale, shift)
    assert_format(y, x)


@pytest.mark.parametrize("absent", ["scale", "shift", "residual", "all"])
def test_affine_without(absent):
    x = LAYOUTS["nchw"]()
    given = {"scale": per_channel(), "shift": per_channel(), "residual": LAYOUTS["nchw"]()}
    given = {k: None if absent in (k, "all") else v for k, v in given.items()}
    y = triton_kernel.affine(x, *given.values(), kinds.CODES["gelu"], 0.0)
    expected = reference.affine(x, *given.values(), kinds.CODES["gelu"], 0.0)
    torch.testing.assert_close(y, expected)


def test_affine_of_mixed_memory_formats():
    x, residual = LAYOUTS["channels_last"](), LAYOUTS["nchw"]()
    scale = torch.randn(2 * C)[::2]
    y = triton_kernel.affine(x, scale, None, residual, kinds.NONE, 0.0)
    torch.testing.assert_close(y, x * scale.view(1, C, 1, 1) + residual)
    assert_format(y, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm_by_given_statistics(dtype):
    x, residual = LAYOUTS["nchw"]().to(dtype), LAYOUTS["nchw"]().to(dtype)
    mean, var, weight, bias = per_channel(4)
    for w, b, r in ((weight, bias, residual), (weight, None, None), (None, None, None)):
        arguments = (x, mean, var, w, b, r, EPS, kinds.CODES["relu"], 0.0)
        y = triton_kernel.batch_norm_eval(*arguments)
        torch.testing.assert_close(y, reference.batch_norm_eval(*arguments))
        assert_format(y, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channel_sum_and_dot(layout, dtype):
    a, b = LAYOUTS[layout]().to(dtype), LAYOUTS[layout]().to(dtype)
    dims = [d for d in range(a.dim()) if d != 1]
    check([triton_kernel.channel_sum(a)], lambda a: (a.sum(dims),), a)
    wide = torch.float32
    dot = triton_kernel.channel_dot(a, b)
    check([dot], lambda a, b: ((a.to(torch.promote_types(a.dtype, wide)) * b).sum(dims),), a, b)
    assert dot.dtype == dtype


def test_channel_sum_of_mixed_memory_formats():
    a, b = LAYOUTS["channels_last"](), LAYOUTS["nchw"]()
    check([triton_kernel.channel_dot(a, b)], lambda a, b: ((a * b).sum((0, 2, 3)),), a, b)


def test_channel_sum_of_nothing():
    assert torch.equal(triton_kernel.channel_sum(torch.randn(0, 3, 4, 4)), torch.zeros(3))


def batch_norm(x, weight, bias, residual):
    """Batch normalization and relu by torch, with the statistics that it used."""
    mean, var = torch.zeros_like(weight), torch.zeros_like(weight)
    y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, EPS)
    y = y if residual is None else y + residual
    count = x.numel() // C
    return F.relu(y), mean, (var * ((count - 1) / count) + EPS).rsqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in NO_VARIANCE])
def test_batch_norm_forward(layout, dtype):
    x, residual = (LAYOUTS[layout]() * 2 + 3).to(dtype), LAYOUTS[layout]().to(dtype)
    weight, bias = per_channel(2)
    y, mean, invstd = triton_kernel.batch_norm_train(
        x, weight, bias, residual, EPS, kinds.CODES["relu"], 0.0
    )
    assert mean.dtype == invstd.dtype == torch.float32
    check([y], lambda *t: batch_norm(*t)[:1], x, weight, bias, residual)
    wide = (x.float(), weight, bias, None)
    check([mean, invstd], lambda *t: batch_norm(*t)[1:], *wide, ulps=16)
    assert_format(y, x)


def test_batch_norm_without_weight_and_bias():
    x = LAYOUTS["channels_last"]()
    y, _, _ = triton_kernel.batch_norm_train(x, None, None, None, EPS, kinds.NONE, 0.0)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True, eps=EPS))


@pytest.mark.parametrize("layout", NO_VARIANCE)
def test_batch_norm_without_variance(layout):
    x = LAYOUTS[layout]()
    y, mean, invstd = triton_kernel.batch_norm_train(x, None, None, None, EPS, kinds.NONE, 0.0)
    torch.testing.assert_close(mean, x[0].flatten(1)[:, 0])
    torch.testing.assert_close(invstd, torch.full((C,), EPS**-0.5), rtol=1e-4, atol=0)
    assert y.abs().max() < 1e-3


@pytest.mark.parametrize("channels_last", [False, True])
def test_statistics_far_from_zero(channels_last):
    """A variance of 1 beside a mean of 1000, over several splits of unlike data."""
    x = torch.randn(40, C, 16, 16) + 1000
    x[20:] += 2
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    (view,) = triton_layout.as_ncl(x)
    assert triton_layout.reduction_grid(view, triton_layout.blocks(view))[2] > 1
    mean, invstd = triton_reduce.statistics(x, 0.0)
    var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=3e-7, atol=0)
    torch.testing.assert_close(invstd.double(), var.rsqrt(), rtol=1e-5, atol=0)


def gradients(grad, x, weight, code):
    """dx, dweight, dbias of batch normalization with an activation, by torch's autograd."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    bias = torch.linspace(-0.5, 0.5, C).to(weight).requires_grad_()
    y = F.batch_norm(x, None, None, weight, bias, True, eps=EPS)
    y = {kinds.NONE: lambda y: y, kinds.CODES["relu"]: F.relu, kinds.CODES["tanh"]: torch.tanh}[
        code
    ](y)
    return torch.autograd.grad(y, (x, weight, bias), grad.to(y.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [None, "relu", "tanh"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "2-d", "3-d", "slice"])
def test_batch_norm_backward(layout, name, dtype):
    x, grad = LAYOUTS[layout]().to(dtype), LAYOUTS[layout]().to(dtype)
    weight, bias = per_channel(), torch.linspace(-0.5, 0.5, C)
    code = kinds.CODES[name]
    y, mean, invstd = triton_kernel.batch_norm_train(x, weight, bias, None, EPS, code, 0.0)
    dx, dweight, dbias = triton_kernel.batch_norm_backward(
        grad, x, weight, mean, invstd, y if name else None, code, 0.0
    )
    assert_format(dx, x)
    assert dweight.dtype == dbias.dtype == torch.float32
    if dtype == torch.float32:
        check([dx, dweight, dbias], lambda *t: gradients(*t, code), grad, x, weight, ulps=16)
    else:  # torch's saved output of the activation is not rounded to half on the way back
        truth = gradients(grad.double(), x.double(), weight.double(), code)
        unit = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(dx.double(), truth[0], rtol=unit, atol=unit)
        torch.testing.assert_close(dweight.double(), truth[1], rtol=unit, atol=10 * unit)
        torch.testing.assert_close(dbias.double(), truth[2], rtol=unit, atol=10 * unit)


@pytest.mark.parametrize("expand", [lambda g: g[:1, :1, :1, :1], lambda g: g[:, :, :1, :1]])
def test_batch_norm_backward_of_expanded_gradient(expand):
    x = LAYOUTS["channels_last"]()
    grad = expand(torch.randn(3, C, 7, 11)).expand(x.shape)
    weight = per_channel()
    _, mean, invstd = triton_kernel.batch_norm_train(x, weight, None, None, EPS, 0, 0.0)
    actual = triton_kernel.batch_norm_backward(grad, x, weight, mean, invstd, None, 0, 0.0)
    truth = gradients(grad.double(), x.double(), weight.double(), 0)
    for value, exact in zip(actual, truth, strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-4)


def double_backward(gg_x, gg_weight, gg_bias, grad, x, weight):
    """The gradients of <gg, gradients of batch normalization> for grad, x and weight, by torch."""
    grad, x, weight = (t.detach().requires_grad_() for t in (grad, x, weight))
    bias = torch.zeros_like(weight, requires_grad=True)
    y = F.batch_norm(x, None, None, weight, bias, True, eps=EPS)
    first = torch.autograd.grad(y, (x, weight, bias), grad, create_graph=True)
    total = sum((g * v).sum() for g, v in zip(first, (gg_x, gg_weight, gg_bias), strict=True))
    return torch.autograd.grad(total, (grad, x, weight))


@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "2-d", "slice"])
def test_batch_norm_double_backward(layout, with_weight):
    x, grad, gg_x = (LAYOUTS[layout]() for _ in range(3))
    weight, gg_weight, gg_bias = per_channel(3)
    weight = weight if with_weight else torch.ones(C)
    _, mean, invstd = triton_kernel.batch_norm_train(x, weight, None, None, EPS, 0, 0.0)
    actual = triton_kernel.batch_norm_backward_backward(
        gg_x, gg_weight, gg_bias, grad, x, weight if with_weight else None, mean, invstd
    )
    check(actual, double_backward, gg_x, gg_weight, gg_bias, grad, x, weight, ulps=32)
    assert_format(actual[0], x)
    assert_format(actual[1], x)


def test_batch_norm_double_backward_in_half():
    x, grad, gg_x = (LAYOUTS["nchw"]().half() for _ in range(3))
    weight, gg_weight, gg_bias = per_channel(3)
    (_, mean, invstd) = triton_kernel.batch_norm_train(x, weight, None, None, EPS, 0, 0.0)
    given = (gg_x, gg_weight, gg_bias, grad, x, weight)
    actual = triton_kernel.batch_norm_backward_backward(*given, mean, invstd)
    assert [t.dtype for t in actual] == [torch.float16, torch.float16, torch.float32]
    truth = double_backward(*(t.double() for t in given))
    for value, exact in zip(actual, truth, strict=True):
        unit = 4 * torch.finfo(torch.float16).eps
        torch.testing.assert_close(value.double(), exact, rtol=unit, atol=unit)


def test_int64_offsets(monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    monkeypatch.setattr(triton_kernel, "needs_int64", lambda *_: True)
    monkeypatch.setattr(triton_reduce, "needs_int64", lambda *_: True)
    x, weight = LAYOUTS["nchw"](), per_channel()
    y, mean, invstd = triton_kernel.batch_norm_train(x, weight, None, None, EPS, 0, 0.0)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, weight, None, True, eps=EPS))
    actual = triton_kernel.batch_norm_backward(y, x, weight, mean, invstd, None, 0, 0.0)
    expected = reference.batch_norm_backward(y, x, weight, mean, invstd, None, 0, 0.0)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_more_channels_than_a_block():
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 67, 3, 3).contiguous(memory_format=memory_format)
        torch.testing.assert_close(triton_kernel.channel_sum(x), x.sum((0, 2, 3)))
        y, _, _ = triton_kernel.batch_norm_train(x, None, None, None, EPS, 0, 0.0)
        torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True, eps=EPS))


def test_views_need_no_copy():
    sliced = torch.randn(3, 9, 7, 11)[:, 2:7]
    (view,) = triton_layout.as_ncl(sliced)
    assert view.data_ptr() == sliced.data_ptr()
    assert (view.shape, view.stride()) == ((3, C, 77), (693, 77, 1))
    (view,) = triton_layout.as_ncl(LAYOUTS["channels_last"]())
    assert (view.shape, view.stride()[1:]) == ((1, C, 231), (1, C))


def test_splits_depend_on_the_shape_alone():
    view = torch.empty(64, 8, 56 * 56, device="meta")
    row_tiles, per_split, splits = triton_layout.reduction_grid(view, triton_layout.blocks(view))
    assert 1 < splits <= 256
    assert (splits - 1) * per_split < row_tiles <= splits * per_split


def test_unsupported_dtype_names_operation_and_dtype():
    with pytest.raises(NotImplementedError, match=r"channel_sum for torch\.float64"):
        triton_kernel.channel_sum(torch.zeros(2, 3).double())


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("absent", [None, 0, 1])
def test_running_statistics(momentum, absent):
    """As torch mixes them, strided ones and those of half types included."""
    batch, invstd, eps, count = torch.randn(300), torch.rand(300) + 0.1, 1e-5, 9
    for dtype in (torch.float32, torch.float16, torch.float64):
        both = [torch.randn(600, dtype=dtype)[::2], torch.rand(300, dtype=dtype)]
        mine = [None if i == absent else s.clone() for i, s in enumerate(both)]
        if absent != 0:
            mine[0] = torch.zeros(600, dtype=dtype)[::2].copy_(both[0])
        true = [None if s is None else s.double() for s in mine]
        triton_running.update(*mine, batch, invstd, momentum, eps, count)
        running._update_in_torch(
            batch, *true, batch.double(), invstd.double(), momentum, eps, count
        )
        for got, expected in zip(mine, true, strict=True):
            if got is not None:
                tolerance = {torch.float16: 1e-3}.get(dtype, 2e-7)
                torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
