"""Capsule routing against plain torch in float64, forward and backward."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from capsule_cases import capsules, our_routing, plain_routing
from kernel_cases import (
    DTYPES,
    VIEWS,
    check_under_isa,
    compare,
    machine_with,
    name_of,
    needs_poison,
    on_fresh_memory,
)
from test_squash import plain_squash
from torch import Tensor
from torch.autograd import gradcheck

import nnarch
from nnarch import functional as F
from nnarch.kernels.capsule_routing.op import (
    capsule_routing_grad,
    capsule_routing_op,
    capsule_routing_pack,
)


def _grad_sample(b: int, i: int, k: int, o: int, d: int, iterations: int, detach: bool):
    x, weight, _ = capsules(b, i, k, o, d)
    v, sums = capsule_routing_op(x, weight, None, iterations, detach, None)
    return torch.randn_like(v), x, weight, sums, detach, None


SAMPLES = {
    "capsule_routing": lambda: [
        (*capsules(3, 37, 8, 5, 6), 3, False, None),
        (*capsules(2, 9, 5, 4, 3)[:2], None, 2, True, None),
    ],
    "capsule_routing_grad": lambda: [
        _grad_sample(3, 37, 8, 5, 6, 3, False),
        _grad_sample(2, 9, 5, 4, 3, 2, True),
    ],
    "capsule_routing_pack": lambda: [(torch.randn(5, 37, 6, 8),)],
}

# B, I, D_in, O, D_out: less and more than a block of input capsules, groups of samples with a rest,
# values in runs of 8, 4, 2 and 1.
SHAPES = [
    (2, 7, 3, 4, 5),
    (9, 70, 8, 10, 16),
    (19, 33, 15, 2, 7),
    (1, 1, 1, 2, 1),
    (3, 40, 11, 3, 70),
]
EMPTY = [(0, 7, 3, 4, 5), (2, 0, 3, 4, 5), (2, 7, 0, 4, 5), (2, 7, 3, 0, 5), (2, 7, 3, 4, 0)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_forward_and_backward(iterations, dtype):
    for shape, detach, with_bias in itertools.product(SHAPES, (False, True), (False, True)):
        x, weight, bias = (t.to(dtype) for t in capsules(*shape))
        tensors = {"x": x, "weight": weight, "bias": bias if with_bias else None}
        b, _, _, o, d = shape
        compare(
            our_routing(iterations=iterations, detach_routing=detach),
            lambda detach=detach, **t: plain_routing(**t, iterations=iterations, detach=detach),
            tensors,
            torch.randn(b, o, d).to(dtype),
            # Five iterations pass rounding errors on; in float64 the truth has them too.
            ulps={torch.float64: 256, torch.float32: 64}.get(dtype, 8),
        )  # fmt: skip


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_to_route(shape):
    x, weight, bias = capsules(*shape)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    b, _, _, o, d = shape
    for detach in (False, True):
        v = F.capsule_routing(*leaves[:2], bias=bias, detach_routing=detach)
        expected = plain_squash(bias).expand(b, o, d)  # nothing but the bias
        torch.testing.assert_close(v, expected)
        for g, leaf in zip(torch.autograd.grad(v.sum(), leaves), leaves, strict=True):
            assert g.shape == leaf.shape
            assert bool(g.isfinite().all())


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    """Inputs and gradient with strides that are not the usual ones, stride 0 among them."""
    x, weight, bias = (VIEWS[view](t) for t in capsules(3, 21, 8, 4, 6))
    grad = VIEWS[view](torch.randn(3, 4, 6))
    compare(our_routing(), plain_routing, {"x": x, "weight": weight, "bias": bias}, grad, ulps=64)


@pytest.mark.parametrize("detach", [False, True])
def test_input_capsules_have_no_order(detach):
    """With their weights they may come in any order; the sums are rounded differently, no more."""
    x, weight, _ = (t.double() for t in capsules(4, 75, 8, 5, 6))
    order = torch.randperm(75)
    v = F.capsule_routing(x, weight, detach_routing=detach)
    other = F.capsule_routing(x[:, order], weight[:, order], detach_routing=detach)
    torch.testing.assert_close(v, other, rtol=1e-13, atol=1e-14)


def test_detached_routing_has_another_gradient_and_the_same_output():
    x, weight, _ = capsules(2, 40, 8, 5, 6)
    x.requires_grad_()
    outputs = [F.capsule_routing(x, weight, detach_routing=detach) for detach in (False, True)]
    assert torch.equal(*outputs)
    full, detached = (torch.autograd.grad(v.square().sum(), x)[0] for v in outputs)
    assert (full - detached).norm() > 0.05 * full.norm()


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_gradcheck(iterations):
    x, weight, bias = (t.double().requires_grad_() for t in capsules(2, 6, 3, 3, 4))
    with nnarch.trace() as trace:
        # The detached gradient is that of no function: test_forward_and_backward has it.
        assert gradcheck(our_routing(iterations=iterations), (x, weight, bias))
    assert {entry.backend for entry in trace} == {"cpu"}


def test_packed_weight():
    x, weight, bias = capsules(3, 37, 8, 5, 6)
    packed = F.pack_capsule_weight(weight)
    assert torch.equal(
        F.capsule_routing(x, weight, bias=bias, packed=packed),
        F.capsule_routing(x, weight, bias=bias),
    )
    assert packed is not None
    with pytest.raises(ValueError, match="packed is not what this weight"):
        F.capsule_routing(x, weight, packed=packed[1:])


def test_nan_and_infinities():
    """One reaches everything that its sample routes, as in torch, and no other sample."""
    for value in (float("nan"), float("inf"), 3e38):
        x, weight, _ = capsules(3, 40, 8, 5, 6)
        x[1, 3, 2] = value
        v = F.capsule_routing(x, weight)
        torch.testing.assert_close(v, plain_routing(x, weight), equal_nan=True)
        assert bool(v[1].isnan().any())
        assert bool(v[[0, 2]].isfinite().all())


def test_large_logits_do_not_overflow():
    """Nor do their softmax's sums vanish: blocks of capsules whose logits are far from zero take
    another path, here beside blocks that do not. Such a softmax multiplies rounding errors."""
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-11)):
        for factor, detach in itertools.product((30, 300), (False, True)):
            x, weight, _ = (t.to(dtype) for t in capsules(2, 72, 8, 5, 6))
            x[:, 40:] *= factor
            grad = torch.randn(2, 5, 6, dtype=dtype)
            ours, plain = (
                torch.cat([t.flatten() for t in _with_gradients(function, x, weight, grad)])
                for function in (
                    our_routing(detach_routing=detach),
                    lambda x, w, detach=detach: plain_routing(
                        x.double(), w.double(), detach=detach
                    ),
                )
            )
            assert (ours - plain).norm() <= tolerance * plain.norm()


def _with_gradients(function, x, weight, grad) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    v = function(*leaves)
    return v.detach(), *torch.autograd.grad(v, leaves, grad.to(v.dtype))


def test_long_capsules_are_as_exact_as_torchs():
    """Iterations amplify what a dot product of 64 values loses: in one chain 1.4 times torch's."""
    ratios = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        sizes = (2, 5, 8), (10, 5, 64, 8), (2, 10, 64)
        x, weight, grad = (torch.randn(size, generator=generator) for size in sizes)

        def weight_grad(route, dtype, x=x, weight=weight, grad=grad):
            w = (weight * 8**-0.5).to(dtype).requires_grad_()
            return torch.autograd.grad(route(x.to(dtype), w, iterations=5), w, grad.to(dtype))[0]

        exact = weight_grad(plain_routing, torch.float64)
        ours, theirs = (
            (weight_grad(route, torch.float32) - exact).norm()
            for route in (F.capsule_routing, plain_routing)
        )
        ratios.append(float(ours / theirs))
    assert statistics.geometric_mean(ratios) < 1.2


def test_gradient_of_a_large_weight():
    """It goes past the caches, in either order of the weight's memory."""
    x, weight, _ = capsules(3, 290, 16, 8, 16)
    for format in (torch.contiguous_format, torch.channels_last):
        compare(
            our_routing(),
            plain_routing,
            {"x": x, "weight": weight.to(memory_format=format)},
            torch.randn(3, 8, 16),
            ulps=64,
        )


def test_samples_of_more_than_a_chunk():
    """Coefficients of 18 MB: a second chunk adds to the weight's gradient, in either order."""
    x, weight, _ = capsules(47, 600, 8, 40, 2)
    with machine_with(far_l3=False):
        for format in (torch.contiguous_format, torch.channels_last):
            w = weight.to(memory_format=format)
            compare(
                our_routing(),
                plain_routing,
                {"x": x, "weight": w},
                torch.randn(47, 40, 2),
                ulps=64,
            )
        with nnarch.trace() as trace:
            F.capsule_routing(x.requires_grad_(), weight).sum().backward()
    assert [e.algorithm for e in trace if "grad" in e.op] == ["votes in cache"]


def test_no_second_derivative_is_an_error():
    x, weight, _ = capsules(2, 9, 5, 4, 3)
    x.requires_grad_()
    for function in (lambda: F.capsule_routing(x, weight), lambda: F.squash(x)):
        (dx,) = torch.autograd.grad(function().sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"_grad.*once_different"):
            dx.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    _, weight, bias = capsules(1, 9, 5, 4, 3)
    weight.requires_grad_()

    def net(x: Tensor) -> Tensor:
        return F.capsule_routing(F.squash(x * 2), weight, bias=bias)

    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for b in (3, 5) if dynamic else (3,):
        x = torch.randn(b, 9, 5, requires_grad=True)
        results = [(v, *torch.autograd.grad(v.sum(), (x, weight))) for v in (compiled(x), net(x))]
        assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_channels_last_weight(shape, dtype):
    """What ``module.to(memory_format=torch.channels_last)`` makes of it: the same bits, and a
    gradient in that format, which autograd takes without a copy."""
    x, weight, _ = (t.to(dtype) for t in capsules(*shape))
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaf = weight.clone().contiguous(memory_format=memory_format).requires_grad_()
        y = F.capsule_routing(x, leaf)
        y.backward(torch.cos(y.detach() * 100))
        assert leaf.grad.stride() == leaf.stride()
        packed = capsule_routing_pack(leaf.detach())
        results.append([y.detach(), leaf.grad, packed])
    assert all(map(torch.equal, *results))


# ------------------------------------------------------------------- machines, threads, bad input


@needs_poison
def test_reads_no_uninitialised_memory():
    for iterations, detach in itertools.product((1, 3), (False, True)):
        arguments = _grad_sample(5, 45, 9, 5, 6, iterations, detach)
        fresh = on_fresh_memory(lambda a=arguments: capsule_routing_grad(*a))
        assert all(map(torch.equal, fresh, capsule_routing_grad(*arguments)))
        assert all(bool(t.isfinite().all()) for t in fresh)


def _everything(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    results = []
    shapes = (19, 100, 8, 10, 16), (3, 45, 7, 3, 5), (33, 360, 2, 10, 16)
    for shape, detach in itertools.product(shapes, (False, True)):
        torch.manual_seed(3)
        x, weight, bias = (t.to(dtype).requires_grad_() for t in capsules(*shape))
        v = F.capsule_routing(F.squash(x), weight, bias=bias, detach_routing=detach)
        results += [v.detach(), *torch.autograd.grad(v.square().sum(), (x, weight, bias))]
    return results


def test_one_and_two_threads_agree():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(_everything())
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def _against_reference() -> None:
    """What the subprocess of the next test runs."""
    for dtype in DTYPES[:2]:
        results = _everything(dtype)
        with nnarch.use_backend("reference"):
            torch.testing.assert_close(results, _everything(dtype), rtol=1e-4, atol=1e-6)
    test_gradcheck(3)
    test_nan_and_infinities()
    test_large_logits_do_not_overflow()
    test_gradient_of_a_large_weight()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, _against_reference)


X, W, B = torch.randn(2, 9, 5), torch.randn(4, 9, 3, 5), torch.randn(4, 3)
V = torch.randn(2, 4, 3)
BAD = [
    (lambda: F.capsule_routing([1.0], W), TypeError, "x must be a tensor.*list|DLPack"),
    (lambda: F.capsule_routing(X.long(), W), TypeError, "x must be floating.*int64"),
    (lambda: F.capsule_routing(X, W.double()), TypeError, "weight must be.*float32.*float64"),
    (lambda: F.capsule_routing(X[0], W), ValueError, r"x must be \[B, I, D_in\].*\(9, 5\)"),
    (lambda: F.capsule_routing(X, W[0]), ValueError, r"weight \[O, I, D_out, D_in\].*\(9, 3, 5\)"),
    (lambda: F.capsule_routing(X, W[:, :8]), ValueError, "9 capsules of 5 values.*8 of 5"),
    (lambda: F.capsule_routing(X[..., :4], W), ValueError, "9 capsules of 4 values.*9 of 5"),
    (lambda: F.capsule_routing(X, W, 0), ValueError, "iterations must be at least 1, got 0"),
    (lambda: F.capsule_routing(X, W, 2.0), TypeError, "iterations must be an int, got 2.0"),
    (lambda: F.capsule_routing(X, W, bias=B[:2]), ValueError, r"bias.*\(4, 3\), got \(2, 3\)"),
    (lambda: F.capsule_routing(X, W, bias=B.double()), TypeError, "bias must be.*float32"),
    (lambda: F.capsule_routing(X, W, detach_routing=1), TypeError, "detach_routing.*bool, got 1"),
    (lambda: F.capsule_routing(X, W, packed=3), TypeError, "packed|Tensor"),
    (lambda: capsule_routing_pack(W[0]), ValueError, r"weight must be \[O, I, D_out, D_in\]"),
    (
        lambda: capsule_routing_grad(V, X, W, torch.randn(2, 3, 4, 2), False, None),
        ValueError,
        r"sums must be \[B, iterations, O, D_out\]",
    ),
    (
        lambda: capsule_routing_grad(V[:1], X, W, torch.randn(2, 3, 4, 3), False, None),
        ValueError,
        r"grad must have the shape \(2, 4, 3\)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
