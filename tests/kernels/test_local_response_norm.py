"""Local response normalization against torch and float64, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import (
    DTYPES,
    FORMATS,
    VIEWS,
    check_under_isa,
    compare,
    name_of,
    needs_poison,
    on_fresh_memory,
)
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch.kernels.local_response_norm.op import local_response_norm_grad

_NORM = (5, 0.3, 0.75, 1.5, True)
_IMAGE = (2, 12, 9, 11)


def _image(*size: int) -> Tensor:
    return torch.randn(size).contiguous(memory_format=torch.channels_last)


SAMPLES = {
    "local_response_norm": lambda: [
        (_image(*_IMAGE), *_NORM),
        (torch.randn(2, 7, 5), 4, 0.2, 1.3, 0.5, False),
    ],
    "local_response_norm_grad": lambda: [(_image(*_IMAGE), _image(*_IMAGE), *_NORM)],
}

# size, alpha, beta, k
NORMS = {
    "AlexNet": (5, 1e-4, 0.75, 2.0),
    "strong": (5, 0.7, 0.75, 1.0),
    "three": (3, 0.5, 0.75, 1.0),
    "roots": (5, 0.9, 0.5, 0.3),
    "even": (4, 0.8, 0.75, 1.0),
    "two": (2, 0.8, 0.5, 1.0),
    "one": (1, 0.5, 0.75, 1.0),
    "wide": (11, 2.0, 0.75, 1.0),
    "more than there are": (300, 5.0, 0.75, 1.0),
    "any power": (5, 0.7, 1.3, 1.0),
    "whole power": (3, 0.7, 2.0, 1.0),
    "power below zero": (3, 0.7, -0.5, 1.0),
    "no power": (3, 0.7, 0.0, 1.0),
    "negative energy": (3, -0.1, 2.0, -1.0),
}
# Planes of less than a vector and of more than a block; channels of less than a group or vector.
SIZES = [(2, 96, 13, 13), (1, 7, 3, 1), (3, 33, 1, 2), (1, 17, 37, 41), (0, 5, 4, 4), (2, 5, 0, 3)]


def _ours(input_activation=None, **kwargs):
    return lambda x: F.local_response_norm(x, input_activation=input_activation, **kwargs)


def _theirs(relu: bool, size: int, alpha: float, beta: float, k: float):
    def run(x: Tensor) -> Tensor:
        x = x.relu() if relu else x
        # torch returns an empty input itself.
        return TF.local_response_norm(x, size, alpha, beta, k) if x.numel() else x.clone()

    return run


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_forward_and_backward(norm, dtype, memory_format):
    size, alpha, beta, k = norm
    for shape, activation in itertools.product(SIZES, (None, "relu")):
        x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
        grad = torch.randn(shape).to(dtype)
        ours = _ours(activation, size=size, alpha=alpha, beta=beta, k=k)
        theirs = _theirs(activation == "relu", *norm)
        y = compare(ours, theirs, {"x": x}, grad, ulps=64 if dtype == torch.float64 else 8)
        assert y.stride() == nnarch.library.new_output(x, x.shape).stride()


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 9, 3, 4, 5), (1, 6, 2, 2, 2, 2)])
def test_other_ranks(shape):
    x, grad = torch.randn(shape), torch.randn(shape)
    compare(_ours(size=3, alpha=0.5), _theirs(False, 3, 0.5, 0.75, 1.0), {"x": x}, grad)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_alpha_of_the_paper(activation):
    """Krizhevsky and others weigh the sum of the squares, torch and Caffe their mean."""
    x = torch.randn(2, 13, 6, 7)
    paper = F.local_response_norm(
        x, 5, 1e-2, 0.75, 2.0, alpha_convention="paper", input_activation=activation
    )
    r = x.relu() if activation else x
    torch.testing.assert_close(paper, TF.local_response_norm(r, 5, 5e-2, 0.75, 2.0))


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    """Input and gradient with strides that are not the usual ones, stride 0 among them."""
    x, grad = VIEWS[view](torch.randn(3, 12, 5, 8)), VIEWS[view](torch.randn(3, 12, 5, 8))
    compare(_ours(size=5, alpha=0.5), _theirs(False, 5, 0.5, 0.75, 1.0), {"x": x}, grad)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("size", [3, 5, 6])
def test_infinities_nan_and_zeros(size, memory_format):
    """They reach the channels around them, and no other; x / 0 is what torch says it is."""
    for beta, k, shape in itertools.product((0.75, 0.5, 1.2), (0.0, 1.0), [(2, 40, 5, 7)]):
        x = torch.randn(shape)
        infinity = float("inf")
        for value, rarity in ((infinity, 90), (-infinity, 90), (float("nan"), 90), (0.0, 5)):
            x[torch.randint(rarity, shape) == 0] = value
        x[0, :, 2] = 0.0
        x[1, 3, 3, 3] = 3e38  # its square is no float
        x = x.contiguous(memory_format=memory_format)
        actual = F.local_response_norm(x, size, 0.5, beta, k)
        expected = TF.local_response_norm(x, size, 0.5, beta, k)
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("beta", [0.75, 0.5, 0.9, -1.7])
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_powers_of_large_and_small_sums(beta, memory_format):
    """Sums from 1e-36 to 1e36: no product on the way to their powers leaves the range of floats."""
    sums = torch.logspace(-36, 36, 4096)
    x = sums.sqrt().view(1, 16, 16, 16).contiguous(memory_format=memory_format)
    actual = F.local_response_norm(x, 1, 1.0, beta, 0.0).double()
    expected = x.double() / (x.double() ** 2) ** beta
    inside = (expected > 2e-38) & (expected < 3e38)
    assert bool((actual == 0)[expected < 1e-46].all())
    torch.testing.assert_close(actual[inside], expected[inside], rtol=1e-6, atol=0)


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_gradcheck(norm, memory_format):
    size, alpha, beta, k = norm
    for activation in (None, "relu"):
        x = (torch.rand(2, 9, 3, 4).double() + 0.1) * (torch.randint(0, 2, (2, 9, 3, 4)) * 2 - 1)
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        with nnarch.trace() as trace:
            assert gradcheck(_ours(activation, size=size, alpha=alpha, beta=beta, k=k), x)
        assert {entry.backend for entry in trace} == {"cpu"}


def test_no_second_derivative_is_an_error():
    x = torch.randn(1, 8, 3, 3, requires_grad=True)
    y = F.local_response_norm(x, 3)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"local_response_norm_grad.*once_different"):
        dx.sum().backward()


def test_relu_has_no_gradient_at_zero_and_below():
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0, float("nan"), -float("inf")]).view(1, 6, 1, 1)
    x.requires_grad_()
    y = F.local_response_norm(x, 1, 0.0, input_activation="relu")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.flatten()[[0, 1, 2, 3, 5]].tolist() == [0, 0, 0, 1, 0]
    assert y.flatten()[[0, 1, 2, 3, 5]].tolist() == [0, 0, 0, 3, 0]
    assert bool(y.flatten()[4].isnan())


def test_images_that_leave_the_caches():
    """Outputs of 6 MB and more are written past the caches."""
    for shape in ((2, 96, 110, 111), (3, 64, 100, 101)):
        x = _image(*shape)
        grad = _image(*shape)
        compare(_ours(size=5), _theirs(False, 5, 1e-4, 0.75, 1.0), {"x": x}, grad)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: F.local_response_norm(x * 2, 5, 0.5, input_activation="relu"),
        fullgraph=True, backend="aot_eager", dynamic=dynamic,
    )  # fmt: skip
    for height in (9, 12) if dynamic else (9,):
        x = torch.randn(2, 10, height, 10).requires_grad_()
        y, expected = compiled(x), F.local_response_norm(x * 2, 5, 0.5, input_activation="relu")
        assert torch.equal(y, expected)
        (a,), (b,) = (torch.autograd.grad(t.square().sum(), x) for t in (y, expected))
        assert torch.equal(a, b)


@needs_poison
@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_reads_no_uninitialised_memory(memory_format):
    x = torch.randn(2, 19, 9, 10).contiguous(memory_format=memory_format)
    for size in (3, 5, 6):
        arguments = (x, x, size, 0.1, 0.75, 1.0, True)
        fresh = on_fresh_memory(lambda a=arguments: local_response_norm_grad(*a))
        assert torch.equal(fresh, local_response_norm_grad(*arguments))


def _everything(x: Tensor) -> list[Tensor]:
    results = []
    for size, beta in itertools.product((3, 5, 6), (0.75, 0.5, 1.3)):
        leaf = x.detach().requires_grad_()
        y = F.local_response_norm(leaf, size, 0.5, beta, 2.0)
        results += [y.detach(), *torch.autograd.grad(y, leaf, y.detach())]
    return results


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
def test_one_and_two_threads_agree(memory_format):
    x = torch.randn(3, 67, 57, 61).contiguous(memory_format=memory_format)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(_everything(x))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def _against_reference() -> None:
    """What the subprocess of the next test runs."""
    for memory_format, dtype in itertools.product(FORMATS, DTYPES[:2]):
        x = torch.randn(2, 37, 9, 11, dtype=dtype).contiguous(memory_format=memory_format)
        results = _everything(x)
        with nnarch.use_backend("reference"):
            torch.testing.assert_close(results, _everything(x))
        test_powers_of_large_and_small_sums(0.75, memory_format)
        test_powers_of_large_and_small_sums(0.9, memory_format)
        test_infinities_nan_and_zeros(5, memory_format)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, _against_reference)


X = torch.randn(1, 6, 4, 4)
BAD = [
    (lambda: F.local_response_norm([1.0], 3), TypeError, "input must be a tensor.*list|DLPack"),
    (lambda: F.local_response_norm(X.long(), 3), TypeError, "input must be floating.*int64"),
    (lambda: F.local_response_norm(X[0, 0], 3), ValueError, r"at least 3 dimensions, got \(4, 4\)"),
    (lambda: F.local_response_norm(X, 0), ValueError, "size must be at least 1.*got 0"),
    (lambda: F.local_response_norm(X, -3), ValueError, "size must be at least 1.*got -3"),
    (lambda: F.local_response_norm(X, 2**70), ValueError, r"below 2\*\*63"),
    (lambda: F.local_response_norm(X, 2.5), TypeError, "size must be an int, got 2.5"),
    (lambda: F.local_response_norm(X, 3, "1"), TypeError, "alpha must be a number, got '1'"),
    (lambda: F.local_response_norm(X, 3, beta=None), TypeError, "beta must be a number, got None"),
    (lambda: F.local_response_norm(X, 3, k=True), TypeError, "k must be a number, got True"),
    (lambda: F.local_response_norm(X, 3, alpha_convention="caffe"), ValueError, "'paper'.*'caffe'"),
    (lambda: F.local_response_norm(X, 3, input_activation="gelu"), ValueError, "'relu'.*'gelu'"),
    (lambda: local_response_norm_grad(X[:, :5], X, *_NORM), ValueError, "grad must have the shape"),
    (lambda: local_response_norm_grad(X.double(), X, *_NORM), TypeError, "grad must be.*float32"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
