"""Batch normalization against torch in float64, and what all of its operations share."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from kernel_cases import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    FORMATS,
    VIEWS,
    act,
    compare,
    name_of,
    needs_poison,
    on_fresh_memory,
    torch_epilogue,
)
from tolerances import assert_as_accurate
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch.kernels.activation import kinds
from nnarch.kernels.normalization import op as ops

# [N, C], [N, C, L], images with channels around a vector, planes cut into runs, many images.
SHAPES = [
    (2, 1),
    (5, 3),
    (37, 130),
    (3, 7, 5),
    (3, 5, 4, 6),
    (2, 17, 7, 7),
    (9, 64, 3, 5),
    (1, 2, 260, 200),
    (70, 3, 13, 11),
    (2, 3, 2, 3, 4),
]
SMALL = [SHAPES[i] for i in (1, 3, 4, 5, 9)]


# Beside channels_last float32: of more than kFarTensor, with half a vector; of more than
# kStreamBytes, in whole cache lines, which are written past the caches; and not in whole ones.
LARGE = [(1, 24, 190, 190), (2, 80, 101, 101), (2, 32, 160, 160), (1, 40, 211, 211)]


def operands(shape, dtype, memory_format=torch.contiguous_format, mean=1.0):
    """input, weight, bias; the input far enough from 0 to need a good variance."""
    x = (torch.randn(shape) * 2 + mean).to(dtype)
    if len(shape) == 4:
        x = x.contiguous(memory_format=memory_format)
    channels = shape[1]
    parameter = torch.float32 if dtype in DTYPES[2:] else dtype
    return {
        "input": x,
        "weight": torch.rand(channels).to(parameter) + 0.5,
        "bias": torch.randn(channels).to(parameter),
    }


def ours(input, weight=None, bias=None, residual=None, activation=None, eps=1e-5):
    return F.batch_norm(
        input, None, None, weight, bias, True, eps=eps, residual=residual, activation=activation
    )


def theirs(input, weight=None, bias=None, residual=None, activation=None, eps=1e-5):
    y = TF.batch_norm(input, None, None, weight, bias, True, eps=eps)
    return torch_epilogue(y, None, None, residual, activation, dim=1)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(shape, dtype, memory_format):
    if len(shape) != 4 and memory_format is torch.channels_last:
        pytest.skip("channels_last is for images")
    tensors, grad = operands(shape, dtype, memory_format), torch.randn(shape).to(dtype)
    # Two values per channel normalise to -1 and 1 but for eps: all digits of the input's gradient
    # but eps / variance cancel, in torch as here. A large eps leaves digits to compare.
    eps = 0.1 if grad.numel() == 2 * shape[1] else 1e-5
    # Gradients are differences of large sums over the batch, each rounded once. In float64 the
    # truth is torch's own result; of 52,000 values its sums lose up to 70 ulp (ours 17).
    ulps = 128 if dtype == torch.float64 else 16
    compare(partial(ours, eps=eps), partial(theirs, eps=eps), tensors, grad, ulps=ulps)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_activation_and_residual(activation, backend):
    for shape, residual in itertools.product(SMALL, (False, True)):
        t = operands(shape, torch.float64)
        if residual:
            t["residual"] = torch.randn(shape, dtype=torch.float64)

        def run(**named):
            with nnarch.use_backend(backend):
                return ours(**named, activation=activation)

        grad = torch.randn(shape, dtype=torch.float64)
        # torch's own hardsigmoid and hardswish round 1/6 to float32 in the derivative.
        rough = {"ulps": 2e9} if activation in ("hardsigmoid", "hardswish") else {"ulps": 1e3}
        compare(run, lambda **named: theirs(**named, activation=activation), t, grad, **rough)


@pytest.mark.parametrize("activation", [None, "relu6"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_tensors_that_come_from_memory(shape, dtype, activation):
    t = operands(shape, dtype, torch.channels_last)
    grad = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    for residual in (False, True):
        if residual:
            t["residual"] = torch.randn_like(t["input"])
        run, truth = (partial(f, activation=activation) for f in (ours, theirs))
        compare(run, truth, t, grad, ulps=64)


@pytest.mark.parametrize("offset", [0.0, 100.0, -1e4])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_variance_of_numbers_far_from_zero(offset, memory_format):
    """One pass over sums of squares would lose every digit of these variances."""
    x = operands((4, 6, 20, 20), torch.float32, memory_format, offset)["input"]
    _, mean, invstd = torch.ops.nnarch.batch_norm_train(x, None, None, None, 0.0, 0, 0.0)
    variance, truth = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), truth, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(invstd.double(), variance.rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics(shape, dtype, momentum):
    t = operands(shape, dtype)
    channels, wide = shape[1], t["weight"].dtype
    mine = [torch.randn(channels).to(wide), torch.rand(channels).to(wide)]
    torchs = [s.clone() for s in mine]
    for _ in range(3):
        F.batch_norm(t["input"], *mine, training=True, momentum=momentum)
        TF.batch_norm(t["input"], *torchs, training=True, momentum=momentum)
    torch.testing.assert_close(mine, torchs)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3)])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_training_on_nothing(shape, activation):
    """As torch's: no values, no new statistics, gradients of zeros."""
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.ones(3, requires_grad=True) for _ in range(2))
    mean, var = torch.full((3,), 0.5), torch.full((3,), 2.0)
    y = F.batch_norm(x, mean, var, weight, bias, training=True, activation=activation)
    y.sum().backward()
    assert y.shape == x.shape and y.dtype == x.dtype
    assert x.grad.shape == x.shape
    assert torch.equal(weight.grad, torch.zeros(3)) and torch.equal(bias.grad, torch.zeros(3))
    assert torch.equal(mean, torch.full((3,), 0.5)) and torch.equal(var, torch.full((3,), 2.0))


def test_running_mean_or_variance_alone():
    x, statistic = torch.randn(4, 3, 5), torch.zeros(3)
    F.batch_norm(x, statistic, None, training=True, momentum=1.0)
    torch.testing.assert_close(statistic, x.mean((0, 2)))
    F.batch_norm(x, None, statistic, training=True, momentum=1.0)
    torch.testing.assert_close(statistic, x.var((0, 2)))


def test_the_update_in_place_is_seen():
    """By the schema that PyTorch reads, and by what looks at version counters."""
    mean, var, x = torch.zeros(6)[::2], torch.ones(3), torch.randn(4, 3, 5)
    before, expected = (mean._version, var._version), (mean.clone(), var.clone())
    F.batch_norm(x, mean, var, training=True)
    TF.batch_norm(x, *expected, training=True)
    torch.testing.assert_close((mean, var), expected)
    assert mean._version > before[0] and var._version > before[1]
    torch.library.opcheck(
        torch.ops.nnarch.batch_norm_update.default,
        (mean, var, torch.randn(3), torch.rand(3) + 0.5, 0.1, 1e-5, 20),
        test_utils="test_schema",
    )


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
def test_evaluation(activation, dtype, memory_format):
    shape = (3, 19, 5, 7)
    t = operands(shape, dtype, memory_format)
    t["residual"] = torch.randn(shape).to(dtype)
    mean, var = torch.randn(19).to(dtype), torch.rand(19).to(dtype) + 0.1

    def mine(input, weight, bias, residual):
        m, v = mean.to(input.dtype), var.to(input.dtype)
        return F.batch_norm(input, m, v, weight, bias, residual=residual, activation=activation)

    def truth(input, weight, bias, residual):
        m, v = mean.to(input.dtype), var.to(input.dtype)
        return act(TF.batch_norm(input, m, v, weight, bias) + residual, activation)

    rough = {"ulps": 2e9 if dtype == torch.float64 else 16}
    compare(mine, truth, t, torch.randn(shape).to(dtype), **rough)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [*SMALL, (0, 3, 2, 2)], ids=str)
def test_evaluation_without_gradient(shape, dtype, backend):
    """One operation, for every subset of weight, bias and residual, and statistics of any dtype."""
    t = operands(shape, dtype) | {"residual": torch.randn(shape).to(dtype)}
    x, channels = t.pop("input"), shape[1]
    for statistic in {dtype, t["weight"].dtype}:
        mean = torch.randn(channels).to(statistic)[torch.arange(channels)]
        var = (torch.rand(2 * channels) + 0.1).to(statistic)[::2]
        for names in itertools.chain(*(itertools.combinations(t, n) for n in range(4))):
            given = {name: t[name] for name in names}
            with nnarch.use_backend(backend), nnarch.trace() as trace:
                y = F.batch_norm(x, mean, var, activation="leaky_relu", **given)
            assert trace.ops == ["batch_norm_eval"]
            wide = {name: v.double() for name, v in given.items()}
            residual = wide.pop("residual", 0)
            truth = TF.batch_norm(x.double(), mean.double(), var.double(), **wide) + residual
            truth = TF.leaky_relu(truth)
            assert_as_accurate(y, truth.to(dtype), truth, ulps=32)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "tanh", "gelu"])
@pytest.mark.parametrize("given", ["weight", "bias", "residual"])
def test_gradcheck(training, activation, given):
    """First and second derivatives, in the input and one more operand or in all."""
    t = operands((3, 2, 3, 2), torch.float64)
    t["residual"] = torch.randn(3, 2, 3, 2, dtype=torch.float64)
    names = ["input", given] if given != "residual" else list(t)
    leaves = [t[name].requires_grad_() for name in names]
    mean, var = (None, None) if training else (torch.randn(2).double(), torch.rand(2).double())

    def function(*values):
        n = dict(zip(names, values, strict=True))
        x = n.pop("input")
        return F.batch_norm(x, mean, var, training=training, activation=activation, **n)

    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("shape", [(4, 5, 6, 7), LARGE[0]], ids=str)
def test_gradient_penalty(shape, memory_format):
    """The norm of a gradient as a loss, against torch's double backward."""
    t = operands(shape, torch.float64, memory_format)
    leaves = {name: v.requires_grad_() for name, v in t.items()}
    results = []
    for function in (ours, theirs):
        y = torch.relu(function(**leaves)).square().sum()
        (gradient,) = torch.autograd.grad(y, leaves["input"], create_graph=True)
        penalty = (gradient.flatten(1).norm(dim=1) - 1).square().sum()
        results.append(torch.autograd.grad(penalty, list(leaves.values())))
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------------ memory and threads


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(4, 3), (3, 5, 4, 6)], ids=str)
def test_views(shape, view):
    """Every operand with strides that are not the usual ones, gradient included."""
    strange = VIEWS[view]
    t = {name: strange(v) for name, v in operands(shape, torch.float64).items()}
    if view in ("scalar", "expanded"):  # no variance: only that nothing is read out of bounds
        y = F.batch_norm(t["input"], torch.zeros(shape[1]).double(), t["weight"].abs())
        torch.testing.assert_close(y, t["input"] / (t["weight"].abs() + 1e-5).sqrt().view(
            1, -1, *[1] * (len(shape) - 2)
        ))  # fmt: skip
        return
    compare(ours, theirs, t, strange(torch.randn(shape).double()), ulps=1e3)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_sum_backward(memory_format):
    """`.sum()` sends back a gradient of strides 0."""
    t = operands((3, 5, 4, 6), torch.float64, memory_format)
    leaves = {name: v.requires_grad_() for name, v in t.items()}
    ours(**leaves, activation="relu").sum().backward()
    truth = torch.autograd.grad(theirs(**leaves, activation="relu").sum(), list(leaves.values()))
    torch.testing.assert_close([v.grad for v in leaves.values()], list(truth))


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_memory_format_is_kept(memory_format):
    t = operands((2, 3, 4, 5), torch.float32, memory_format)
    x = t["input"].requires_grad_()
    y = ours(**t)
    (gradient,) = torch.autograd.grad(y, x, torch.randn(2, 3, 4, 5))
    for result in (y, gradient):
        assert result.is_contiguous(memory_format=memory_format)


@needs_poison
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reads_no_uninitialised_memory(shape):
    t = operands(shape, torch.float32)
    used = ours(**t, activation="relu")
    fresh = on_fresh_memory(lambda: ours(**t, activation="relu"))
    assert torch.equal(used, fresh) and bool(torch.isfinite(fresh).all())


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("shape", [(6, 24, 40, 41), *LARGE[:3]], ids=str)
def test_one_and_two_threads_agree(shape, memory_format):
    t = operands(shape, torch.float32, memory_format)
    x, grad, gg = t["input"], torch.randn(shape), torch.randn(shape)
    run = torch.ops.nnarch
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y, mean, invstd = run.batch_norm_train(x, t["weight"], t["bias"], None, 1e-5, 1, 0.0)
            first = run.batch_norm_backward(grad, x, t["weight"], mean, invstd, y, 1, 0.0)
            second = run.batch_norm_backward_backward(
                gg, t["weight"], t["bias"], grad, x, t["weight"], mean, invstd
            )
            sums = (ops.channel_sum(x), ops.channel_dot(x, grad))
            results.append((y, mean, invstd, *first, *second, *sums))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operations_match_their_reference(shape):
    """The gradients' operations alone, native against their definitions."""
    t = operands(shape, torch.float64)
    x, weight = t["input"], t["weight"]
    grad, gg = torch.randn(shape).double(), torch.randn(shape).double()
    y, mean, invstd = ops.batch_norm_train(x, weight, t["bias"], None, 1e-5, kinds.TANH, 0.0)
    calls = (
        lambda: ops.batch_norm_backward(grad, x, weight, mean, invstd, y, kinds.TANH, 0.0),
        lambda: ops.batch_norm_backward(grad, x, None, mean, invstd, None, kinds.NONE, 0.0),
        lambda: ops.batch_norm_backward_backward(
            gg, weight, t["bias"], grad, x, weight, mean, invstd
        ),
        lambda: ops.batch_norm_backward_backward(
            gg, weight, t["bias"], grad, x, None, mean, invstd
        ),
    )
    for call in calls:
        with nnarch.use_backend("reference"):
            definition = call()
        torch.testing.assert_close(on_fresh_memory(call), definition)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_opcheck(memory_format):
    t = operands((2, 3, 4, 5), torch.float32, memory_format)
    x, weight, bias = (v.requires_grad_() for v in t.values())
    grad = torch.randn(2, 3, 4, 5)
    run, check = torch.ops.nnarch, torch.library.opcheck
    check(run.affine.default, (x, weight, bias, grad, 1, 0.0))
    check(run.channel_sum.default, (x,))
    check(run.channel_dot.default, (x, grad))
    check(run.batch_norm_train.default, (x, weight, bias, grad, 1e-5, 1, 0.0))
    _, mean, invstd = (
        s.detach() for s in run.batch_norm_train(x, weight, bias, None, 1e-5, 0, 0.0)
    )
    check(run.batch_norm_backward.default, (grad, x, weight, mean, invstd, None, 0, 0.0))
    plain = (grad, mean, mean, grad, x.detach(), weight.detach(), mean, invstd)
    check(run.batch_norm_backward_backward.default, plain)
