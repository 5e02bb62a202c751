"""linear_cross_entropy against linear and cross_entropy of torch, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import VIEWS, check_under_isa, compare, name_of, ulps_of_sum
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as TF

from nnarch import functional as F

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _samples() -> list[tuple]:
    x, weight, bias = torch.randn(9, 5), torch.randn(300, 5), torch.randn(300)
    target, class_weight = torch.randint(0, 300, (9,)), torch.rand(300)
    target[3] = -100
    return [
        (x, weight, bias, target, None, -100, 0.0, 0.0, 1, 7),
        (x[:3], weight, None, target[:3], class_weight, -100, 0.1, 0.01, 2, 3),
        (x, weight, None, target, class_weight, -100, 0.1, 0.0, 0, 0),
        (x[:2], weight[:7], bias[:7], target[:2] % 7, None, -100, 0.0, 0.0, 1, 7),
    ]


def _backward_samples() -> list[tuple]:
    samples = []
    for x, weight, bias, target, class_weight, *numbers, _ in _samples():
        lse = TF.linear(x, weight, bias).logsumexp(1).double()
        grad = torch.randn(len(lse)) if numbers[-1] == 0 else torch.tensor(0.7)
        wanted = 3 if bias is None else 7
        samples.append((grad, x, weight, bias, target, class_weight, lse, *numbers, wanted))
    return samples


SAMPLES = {
    "linear_cross_entropy": _samples,
    "linear_cross_entropy_backward": _backward_samples,
}

# samples, depth, classes: fewer than a tile, several tiles, several groups; chunks of samples
SIZES = [
    (1, 8, 5),
    (3, 16, 130),
    (70, 33, 300),
    (4, 1024, 270),
    (5, 0, 7),
    (0, 4, 9),
    (600, 7, 513),
]


def _theirs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias=None,
    weight=None,
    **options,
):
    if weight is not None:
        weight = weight.to(input.dtype)
    logits = TF.linear(input, linear_weight, linear_bias)
    return TF.cross_entropy(logits.flatten(0, -2), target.flatten(), weight, **options)


def _problem(n: int, d: int, v: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    tensors = {
        "input": torch.randn(n, d),
        "linear_weight": torch.randn(v, d),
        "linear_bias": torch.randn(v),
    }
    target = torch.randint(0, v, (n,))
    if n > 2:
        target[1] = -100
    return {name: t.to(dtype) for name, t in tensors.items()}, target


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_forward_and_backward(reduction, dtype):
    for size, smoothing, weighted in itertools.product(SIZES, (0.0, 0.2), (False, True)):
        tensors, target = _problem(*size, dtype)
        if reduction == "mean" and size[0] == 0:
            continue  # 0/0
        options = {"reduction": reduction, "label_smoothing": smoothing}
        options["weight"] = torch.rand(size[2]).to(dtype) if weighted else None
        grad = torch.randn((size[0],) if reduction == "none" else ())
        ulps = max(16.0, ulps_of_sum(size[1], dtype) or 0) if dtype == torch.float32 else 512
        for bias in (True, False):
            given = tensors if bias else {n: t for n, t in tensors.items() if n != "linear_bias"}
            compare(
                lambda target=target, options=options, **t: F.linear_cross_entropy(
                    target=target, **t, **options
                ),
                lambda target=target, options=options, **t: _theirs(target=target, **t, **options),
                given, grad, ulps=ulps,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=name_of)
def test_half_storage(dtype):
    """Computed in float32, from inputs and to gradients of half the size; the loss is float32."""
    tensors, target = _problem(40, 24, 300, dtype)
    for reduction in ("mean", "none"):
        results = []
        for function, kind in ((F.linear_cross_entropy, dtype), (_theirs, torch.float32)):
            leaves = {n: t.to(kind).requires_grad_() for n, t in tensors.items()}
            loss = function(target=target, reduction=reduction, **leaves)
            gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
            assert loss.dtype == torch.float32 and all(g.dtype == kind for g in gradients)
            results.append([loss, *(g.float() for g in gradients)])
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(*results, rtol=eps, atol=eps / 8)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    tensors, target = _problem(12, 10, 140, torch.float32)
    tensors = {n: VIEWS[view](t) for n, t in tensors.items()}
    for reduction in ("mean", "none"):
        grad = torch.randn(()) if reduction == "mean" else VIEWS[view](torch.randn(12))
        compare(
            lambda reduction=reduction, **t: F.linear_cross_entropy(
                target=target, reduction=reduction, **t
            ),
            lambda reduction=reduction, **t: _theirs(target=target, reduction=reduction, **t),
            tensors, grad, ulps=16,
        )  # fmt: skip


def test_sequences_and_strided_targets():
    x, weight = torch.randn(3, 4, 8), torch.randn(20, 8)
    target = torch.randint(0, 20, (4, 3)).t()
    for reduction in ("mean", "none"):
        mine = F.linear_cross_entropy(x, weight, target, reduction=reduction)
        theirs = _theirs(x, weight, target, reduction=reduction)
        torch.testing.assert_close(mine, theirs.view(3, 4) if reduction == "none" else theirs)


@pytest.mark.parametrize("frozen", ["input", "linear_weight", "linear_bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted(reduction, frozen):
    """A gradient that nobody wants is not made."""
    tensors, target = _problem(30, 8, 140, torch.float32)
    leaves = {n: t.requires_grad_(n != frozen) for n, t in tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    results = []
    for function in (F.linear_cross_entropy, _theirs):
        loss = function(target=target, reduction=reduction, **leaves)
        if function is F.linear_cross_entropy and reduction == "mean":
            empty = [t.numel() == 0 for t in loss.grad_fn.saved_tensors[:3]]
            assert empty == [n == frozen for n in ("input", "linear_weight", "linear_bias")]
        results.append(torch.autograd.grad(loss.sum(), wanted))
    torch.testing.assert_close(*results)


def test_z_loss():
    tensors, target = _problem(30, 8, 140, torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]
    logits = TF.linear(*leaves)
    square = logits.logsumexp(1).square()
    theirs = TF.cross_entropy(logits, target) + 0.3 * square[target != -100].mean()
    mine = F.linear_cross_entropy(target=target, z_loss=0.3, **tensors)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves)
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    tensors, _ = _problem(5, 3, 130, torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]
    target = torch.tensor([0, 129, -100, 3, 127])
    options = {"reduction": reduction, "label_smoothing": 0.2, "z_loss": 0.1}
    assert gradcheck(
        lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b, **options),
        leaves,
        fast_mode=True,
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_second_derivative(reduction):
    tensors, target = _problem(5, 3, 13, torch.float32)
    x = tensors["input"].requires_grad_()
    loss = F.linear_cross_entropy(target=target, reduction=reduction, **tensors).sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(
        (RuntimeError, NotImplementedError), match=r"linear_cross_entropy.*once_diff"
    ):
        dx.square().sum().backward()


def test_gradients_add_up():
    """Two backwards of a kept graph, and a scale: the forward's gradients are not handed out."""
    tensors, target = _problem(30, 8, 140, torch.float32)
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    loss = F.linear_cross_entropy(target=target, **leaves)
    (loss * 2).backward(retain_graph=True)
    (loss * 3).backward()
    expected = torch.autograd.grad(_theirs(target=target, **leaves), list(leaves.values()))
    torch.testing.assert_close([t.grad / 5 for t in leaves.values()], list(expected))


def test_the_gradient_is_not_copied():
    weight = torch.randn(140, 8, requires_grad=True)
    loss = F.linear_cross_entropy(torch.randn(30, 8), weight, torch.randint(0, 140, (30,)))
    ready = loss.grad_fn.saved_tensors[1].data_ptr()
    (loss * 2).backward()
    assert weight.grad.data_ptr() == ready


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(threads):
    """The same bits for any number; enough classes for several groups of tiles."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            tensors, target = _problem(90, 16, 3000, torch.float32)
            leaves = [t.requires_grad_() for t in tensors.values()]
            for reduction in ("mean", "none"):
                loss = F.linear_cross_entropy(
                    *leaves[:2],
                    target,
                    linear_bias=leaves[2],
                    reduction=reduction,
                    label_smoothing=0.1,
                )
                results.append([loss, *torch.autograd.grad(loss.sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(results[:2], results[2:], strict=True):
        assert all(map(torch.equal, a, b))


def test_compile_and_functorch():
    tensors, target = _problem(6, 8, 19, torch.float32)
    x = tensors["input"].requires_grad_()

    def step(x: Tensor) -> Tensor:
        return (
            F.linear_cross_entropy(
                x * 2, tensors["linear_weight"], target, linear_bias=tensors["linear_bias"]
            )
            * 3
        )

    expected = torch.autograd.grad(step(x), x)[0]
    torch._dynamo.reset()
    y = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], expected)
    torch.testing.assert_close(torch.func.grad(step)(x.detach()), expected)


def test_autocast():
    tensors, target = _problem(6, 8, 19, torch.float32)
    weight = tensors["linear_weight"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.linear_cross_entropy(target=target, **tensors)
    loss.backward()
    assert loss.dtype == weight.grad.dtype == torch.float32
    rounded = {n: t.detach().bfloat16().float() for n, t in tensors.items()}
    torch.testing.assert_close(loss, _theirs(target=target, **rounded))


def check_isa() -> None:
    """Run in processes of their own."""
    for size, reduction in itertools.product(SIZES, ("sum", "none")):
        tensors, target = _problem(*size, torch.float32)
        leaves = {n: t.requires_grad_() for n, t in tensors.items()}
        results = []
        for function in (F.linear_cross_entropy, _theirs):
            loss = function(target=target, reduction=reduction, label_smoothing=0.1, **leaves)
            results.append([loss, *torch.autograd.grad(loss.sum(), list(leaves.values()))])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_isa(isa):
    check_under_isa(isa, check_isa)
