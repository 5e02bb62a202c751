"""cross_entropy of logits against torch and float64, forward and backward."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from kernel_cases import VIEWS, check_under_isa, compare, name_of, on_fresh_memory
from tolerances import assert_as_accurate
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")


def _sample(x: Tensor, target: Tensor, wanted: int = 1, **numbers: float) -> tuple:
    values = {"ignore_index": 1, "label_smoothing": 0.0, "z_loss": 0.0, "reduction": 1} | numbers
    weight = torch.rand(x.shape[1]) if values["label_smoothing"] else None
    return x, target, weight, *values.values(), wanted


def _classes(x: Tensor) -> Tensor:
    return torch.randint(0, x.shape[1], (x.numel() // x.shape[1],))


def _forward_samples() -> list[tuple]:
    rows, many, planes = torch.randn(9, 11), torch.randn(5, 300), torch.randn(2, 7, 6)
    turned = torch.randn(11, 9).t()
    return [
        _sample(rows, _classes(rows)),
        _sample(many, _classes(many), label_smoothing=0.1, z_loss=0.01),
        _sample(planes, _classes(planes), reduction=2),
        _sample(planes, _classes(planes), 0, reduction=0, label_smoothing=0.2),
        _sample(turned, turned.softmax(1)),
    ]


def _backward_samples() -> list[tuple]:
    samples = []
    for x, target, weight, *numbers, wanted in _forward_samples():
        lse = x.movedim(1, -1).logsumexp(-1).reshape(-1).double()
        grad = torch.randn(len(lse)) if numbers[-1] == 0 else torch.tensor(0.7)
        both = 3 if target.is_floating_point() else 1
        samples.append((grad, x, target, weight, lse, *numbers, both))
        assert wanted in (0, 1)
    return samples


SAMPLES = {
    "cross_entropy": _forward_samples,
    "cross_entropy_backward": _backward_samples,
    "cross_entropy_scale": lambda: [
        (torch.tensor(0.3), torch.randn(4, 5), torch.randn(4, 5)),
        (torch.tensor(2.0), torch.randn(7), None),
    ],
}

# Few classes and many, one vector and no whole one, planes of less than a block and more.
SIZES = [
    (1, 1),
    (5, 7),
    (3, 200),
    (130, 70),
    (4, 10, 6),
    (2, 100, 3, 5),
    (7,),
    (70, 131, 3),
    (1, 3, 600),
]


def _target(x: Tensor, probabilities: bool = False) -> Tensor:
    """With an ignored one, where there are enough."""
    dim = 0 if x.dim() == 1 else 1
    if probabilities:
        return torch.randn(x.shape).softmax(dim).to(x.dtype)
    target = torch.randint(0, x.shape[dim], (*x.shape[:dim], *x.shape[dim + 1 :]))
    if target.numel() > 3:
        target.view(-1)[2] = -100
    return target


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_forward_and_backward(probabilities, reduction, dtype):
    for size, smoothing, weighted in itertools.product(SIZES, (0.0, 0.3), (False, True)):
        x = torch.randn(size).to(dtype)
        target = _target(x, probabilities)
        weight = (torch.rand(x.shape[min(1, x.dim() - 1)]) + 0.1).to(dtype) if weighted else None

        def loss(function, x, q=None, target=target, weight=weight, smoothing=smoothing):
            q = target if q is None else q
            w = weight if weight is None else weight.to(x.dtype)
            return function(x, q, w, reduction=reduction, label_smoothing=smoothing)

        def theirs(x, q=None, loss=loss):
            if x.dtype != torch.float16:
                return loss(TF.cross_entropy, x, q)
            # torch's own float16 overflows where the weights are small.
            return loss(TF.cross_entropy, x.float(), q if q is None else q.float()).half()

        tensors = {"x": x} | ({"q": target} if probabilities else {})
        grad = torch.randn(loss(TF.cross_entropy, x).shape)
        compare(
            lambda loss=loss, **t: loss(F.cross_entropy, **t),
            theirs, tensors, grad, ulps=256 if dtype == torch.float64 else 16,
        )  # fmt: skip


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", [(6, 9), (5, 140), (3, 9, 7), (2, 9, 3, 4)])
def test_views(size, view):
    """Logits with strides that are not the usual ones; the gradient of an unreduced loss too."""
    kinds = (False,) if view == "scalar" else (False, True)  # equal ones: a gradient of 0
    for reduction, probabilities in itertools.product(("mean", "none"), kinds):
        x = VIEWS[view](torch.randn(size))
        target = _target(x, probabilities)
        target = VIEWS[view](target) if probabilities else target
        grad = (
            torch.randn(()) if reduction == "mean" else VIEWS[view](torch.randn(_target(x).shape))
        )

        def loss(function, x, target=target, reduction=reduction):
            return function(x, target, reduction=reduction)

        compare(
            lambda x, loss=loss: loss(F.cross_entropy, x),
            lambda x, loss=loss: loss(TF.cross_entropy, x),
            {"x": x}, grad, ulps=16,
        )  # fmt: skip


def test_channels_last_images():
    x = torch.randn(2, 20, 9, 11).contiguous(memory_format=torch.channels_last).requires_grad_()
    target = torch.randint(0, 20, (2, 9, 11))
    dx = torch.autograd.grad(F.cross_entropy(x, target), x)[0]
    assert dx.is_contiguous(memory_format=torch.channels_last)
    expected = torch.autograd.grad(TF.cross_entropy(x, target), x)[0]
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("size", [(4, 9), (3, 300), (2, 9, 5), (2, 70, 19)])
def test_infinities_and_nan(size):
    """The loss and the gradient of every sample are what torch says they are."""
    special = [(INF,), (-INF,), (NAN,), (INF, INF), (-INF, NAN), (3e38, -3e38)]
    for values, smoothing in itertools.product(special, (0.0, 0.1)):
        x = torch.randn(size)
        for i, value in enumerate(values):
            x[1, 2 + i] = value
        target = _target(x).clamp_min(0)
        for target_class in (2, 7):  # where the special value is, and elsewhere
            target[1] = target_class
            leaves = [x.clone().requires_grad_() for _ in range(2)]
            options = {"reduction": "none", "label_smoothing": smoothing}
            mine, theirs = (
                f(leaf, target, **options)
                for f, leaf in zip((F.cross_entropy, TF.cross_entropy), leaves, strict=True)
            )
            torch.testing.assert_close(mine, theirs, equal_nan=True)
            gradients = [
                torch.autograd.grad(y.sum(), leaf)[0]
                for y, leaf in zip((mine, theirs), leaves, strict=True)
            ]
            torch.testing.assert_close(*gradients, equal_nan=True)


def test_a_row_of_minus_infinity():
    for classes in (9, 300):
        x = torch.randn(3, classes)
        x[1] = -INF
        target = torch.tensor([1, 2, 3])
        mine = F.cross_entropy(x, target, reduction="none")
        torch.testing.assert_close(
            mine, TF.cross_entropy(x, target, reduction="none"), equal_nan=True
        )
        assert bool(mine[1].isnan())
        # Many of them, as masks leave.
        x = torch.full((2, classes), -INF)
        x[:, -1], x[:, 0] = 1.0, 2.0
        torch.testing.assert_close(F.cross_entropy(x, target[:2] * 0), torch.tensor(0.3132617))


def test_far_from_zero():
    """Logits of 1e4 that differ little: the loss is a difference of large numbers."""
    for classes, smoothing in itertools.product((8, 70, 1000), (0.0, 0.1)):
        x, target = torch.randn(20, classes) + 1e4, torch.randint(0, classes, (20,))
        options = {"reduction": "none", "label_smoothing": smoothing}
        mine, theirs = (f(x, target, **options) for f in (F.cross_entropy, TF.cross_entropy))
        truth = TF.cross_entropy(x.double(), target, **options)
        assert_as_accurate(mine, theirs, truth)


def test_all_targets_ignored():
    x, target = torch.randn(4, 6, requires_grad=True), torch.full((4,), -100)
    for reduction, value in (("mean", NAN), ("sum", 0.0)):
        loss = F.cross_entropy(x, target, reduction=reduction)
        torch.testing.assert_close(loss, torch.tensor(value), equal_nan=True)
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros(4, 6))
    assert torch.equal(F.cross_entropy(x, target, reduction="none"), torch.zeros(4))


@pytest.mark.parametrize("size", [(0, 5), (0, 5, 3), (2, 5, 0)])
def test_no_samples(size):
    x = torch.randn(size, requires_grad=True)
    target = torch.zeros((size[0], *size[2:]), dtype=torch.int64)
    for reduction in ("mean", "sum", "none"):
        loss = F.cross_entropy(x, target, reduction=reduction)
        torch.testing.assert_close(
            loss, TF.cross_entropy(x, target, reduction=reduction), equal_nan=True
        )
        assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape


def test_ignored_class_within_the_range():
    x, target = torch.randn(9, 4), torch.randint(0, 4, (9,))
    torch.testing.assert_close(
        F.cross_entropy(x, target, ignore_index=2), TF.cross_entropy(x, target, ignore_index=2)
    )


def _with_z(x: Tensor, target: Tensor, z_loss: float, **options) -> Tensor:
    """The definition: a mean of its own over the samples that count."""
    square = x.logsumexp(1).square()[target != -100]
    added = square.mean() if options["reduction"] == "mean" else square.sum()
    return TF.cross_entropy(x, target, **options) + z_loss * added


@pytest.mark.parametrize("size", [(6, 9), (6, 300), (3, 9, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_z_loss(reduction, size):
    x = torch.randn(size)
    target = _target(x)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    options["weight"] = torch.rand(size[1]) + 0.1

    def theirs(x: Tensor) -> Tensor:
        own = options | {"weight": options["weight"].to(x.dtype)}
        return _with_z(x, target, 0.02, **own)

    compare(
        lambda x: F.cross_entropy(x, target, z_loss=0.02, **options),
        theirs, {"x": x}, torch.randn(()), ulps=16,
    )  # fmt: skip


@pytest.mark.parametrize("size", [(3, 5), (2, 140), (2, 4, 3)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction, size):
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    q = torch.randn(size, dtype=torch.float64).softmax(1).requires_grad_()
    options = {"reduction": reduction, "label_smoothing": 0.2, "z_loss": 0.1}
    assert gradcheck(lambda x: F.cross_entropy(x, _target(x) * 0 + 1, **options), x)
    assert gradcheck(lambda x, q: F.cross_entropy(x, q, **options), (x, q))


def test_no_second_derivative():
    x, target = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, 2, 3])
    for reduction in ("mean", "none"):
        loss = F.cross_entropy(x, target, reduction=reduction).sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(
            (RuntimeError, NotImplementedError), match=r"cross_entropy.*\(once_differ"
        ):
            dx.square().sum().backward()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_second_derivative_behind_it(reduction, traced):
    """Not a part of one without a word, where other terms have one; with nodes and without."""
    x, weight = torch.randn(4, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3])
    losses = (
        lambda h: F.cross_entropy(F.linear(h, weight), target, reduction=reduction),
        lambda h: F.linear_cross_entropy(h, weight, target, reduction=reduction),
    )
    for loss, wanted in itertools.product(losses, ([x], [weight])):
        h = x * 2
        with nnarch.trace() if traced else contextlib.nullcontext():  # a watcher: no nodes
            total = loss(h).sum() + h.square().sum()
            (dx,) = torch.autograd.grad(total, x, create_graph=True)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"cross_entropy.*once_diff"):
            torch.autograd.grad(dx.square().sum(), wanted)


def test_backward_twice():
    """A graph that is kept gives the same gradient again, and does not hand out its own memory."""
    x, target = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, 2, 3])
    loss = F.cross_entropy(x, target)
    (first,) = torch.autograd.grad(loss * 3, x, retain_graph=True)
    kept = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss * 3, x)
    torch.testing.assert_close(second, kept)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss * 3, x)


def test_float16_gradient_scaled_in_place():
    x, target = torch.randn(8, 300).half(), torch.randint(0, 300, (8,))
    leaves = [t.clone().requires_grad_() for t in (x, x.float())]
    for f, leaf in zip((F.cross_entropy, TF.cross_entropy), leaves, strict=True):
        (f(leaf, target) * 512).backward()
    torch.testing.assert_close(leaves[0].grad.float(), leaves[1].grad, rtol=2e-3, atol=1e-4)


def test_the_gradient_is_not_copied():
    """The forward's gradient becomes x.grad itself: it may be as large as the logits."""
    x = torch.randn(4, 6, requires_grad=True)
    saved = []

    def look(t):
        saved.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(look, lambda t: t):
        loss = F.cross_entropy(x, torch.tensor([0, 1, 2, 3]))
    (ready,) = saved
    loss.backward()
    assert x.grad.data_ptr() == ready


def test_autocast():
    x = torch.randn(6, 9).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(x, torch.arange(6))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, TF.cross_entropy(x.float(), torch.arange(6)))


def test_arrays():
    x, target = np.random.default_rng(0).normal(size=(5, 7)), np.arange(5)
    loss = F.cross_entropy(x, target, reduction="none")
    assert isinstance(loss, np.ndarray)
    expected = TF.cross_entropy(torch.from_numpy(x), torch.from_numpy(target), reduction="none")
    np.testing.assert_allclose(loss, expected.numpy())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_other_integers(dtype):
    x, target = torch.randn(6, 9), torch.arange(6)
    assert torch.equal(F.cross_entropy(x, target.to(dtype)), F.cross_entropy(x, target))


def test_compile():
    x, target = torch.randn(6, 9, requires_grad=True), torch.arange(6)

    def step(x: Tensor) -> Tensor:
        return F.cross_entropy(x * 2, target, label_smoothing=0.1) * 3

    torch._dynamo.reset()
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    (dx,) = torch.autograd.grad(y, x)
    expected = step(x)
    torch.testing.assert_close((y, dx), (expected, torch.autograd.grad(expected, x)[0]))


def test_functorch():
    x, target = torch.randn(6, 9), torch.arange(6)
    dx = torch.func.grad(lambda x: F.cross_entropy(x, target) * 3)(x)
    torch.testing.assert_close(dx, torch.func.grad(lambda x: TF.cross_entropy(x, target) * 3)(x))


def test_legacy_arguments():
    x, target = torch.randn(3, 5), torch.tensor([0, 4, 2])
    with pytest.warns(UserWarning, match="deprecated"):
        loss = F.cross_entropy(x, target, None, False)
    torch.testing.assert_close(loss, TF.cross_entropy(x, target, reduction="sum"))


def check_isa() -> None:
    """Run in processes of their own."""
    for size in SIZES:
        if len(size) == 1:
            continue
        x, target = torch.randn(size), _target(torch.empty(size))
        options = {"label_smoothing": 0.1, "weight": torch.rand(size[1])}
        results = []
        for f in (F.cross_entropy, TF.cross_entropy):
            leaf = x.clone().requires_grad_()
            loss = on_fresh_memory(lambda f=f, x=leaf, t=target, o=options: f(x, t, **o))
            results.append((loss, torch.autograd.grad(loss, leaf)[0]))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_isa(isa):
    check_under_isa(isa, check_isa)
