"""The losses in Triton's interpreter, forward and backward."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_cases import DTYPES, VIEWS, check, poisoned_memory

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
from nnarch.kernels.cross_entropy import reference, triton_linear, triton_loss  # noqa: E402
from nnarch.kernels.cross_entropy import triton_kernel as kernel  # noqa: E402

# Positions and classes of less than a block, and more; all three orders in memory.
LOGITS = {
    "rows": lambda: torch.randn(5, 9),
    "many": lambda: torch.randn(3, 2500),
    "planes": lambda: torch.randn(2, 7, 70),
    "channels_last": lambda: torch.randn(2, 6, 7).transpose(1, 2),
    "turned": lambda: torch.randn(19, 140).t(),
}
NUMBERS = [(-100, 0.0, 0.0, 1), (1, 0.2, 0.1, 1), (1, 0.2, 0.0, 0), (-100, 0.0, 0.1, 2)]


def _target(x, soft):
    if soft:
        return torch.randn(x.shape).softmax(1).to(x.dtype)
    return torch.randint(0, x.shape[1], (x.numel() // x.shape[1],))


def _bound(function, index, target, weight, *rest, lse=None):
    """function as one of the logits (and of grad before them), in whose dtype all others are."""

    def run(*tensors):
        *grad, x = tensors
        q = target.to(x.dtype) if target.is_floating_point() else target
        w = weight if weight is None or x.dtype != torch.float64 else weight.double()
        return function(*grad, x, q, w, *([lse] if grad else []), *rest)[index]

    return run


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_more_positions_than_a_program_adds(weighted):
    x, weight = torch.randn(17_000, 3), torch.tensor([0.5, 1.0, 3.0]) if weighted else None
    target = _target(x, soft=False)
    target[::7] = -100
    mine = kernel.cross_entropy(x, target, weight, -100, 0.0, 0.0, 1, 1)
    true = reference.cross_entropy(
        x.double(), target, None if weight is None else weight.double(), -100, 0.0, 0.0, 1, 1
    )
    torch.testing.assert_close(mine[0].double(), true[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(mine[2].double(), true[2], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("soft", [False, True])
def test_logits(soft, name, dtype):
    for numbers, weighted in itertools.product(NUMBERS, (False, True)):
        x = LOGITS[name]().to(dtype)
        target = _target(x, soft)
        weight = torch.rand(x.shape[1]) + 0.1 if weighted else None
        wanted = int(numbers[3] != 0)
        for i in (0, 1) + (2,) * wanted:
            functions = (kernel.cross_entropy, reference.cross_entropy)
            check(
                *(_bound(f, i, target, weight, *numbers, wanted) for f in functions), [x], ulps=32
            )
        loss, lse, dx = kernel.cross_entropy(x, target, weight, *numbers, wanted)
        assert not wanted or dx.stride() == reference.empty_like_logits(x).stride()
        grad = torch.randn(loss.shape).to(dtype)
        both = 3 if soft else 1
        for i in range(both // 2 + 1):
            functions = (kernel.cross_entropy_backward, reference.cross_entropy_backward)
            pair = [_bound(f, i, target, weight, *numbers, both, lse=lse) for f in functions]
            check(*pair, [grad, x], ulps=32)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_any_strides(view):
    x = view(torch.randn(2, 6, 7))
    target = _target(x, False)
    for i in range(3):
        functions = (kernel.cross_entropy, reference.cross_entropy)
        check(*(_bound(f, i, target, None, -100, 0.1, 0.0, 1, 1) for f in functions), [x], ulps=32)


def test_infinities_and_nan():
    for value in (float("inf"), -float("inf"), float("nan")):
        x = torch.randn(4, 9)
        x[1, 2], x[2] = value, value
        target = torch.tensor([0, 1, 2, 3])
        for f in (kernel.cross_entropy, reference.cross_entropy):
            loss = f(x, target, None, -100, 0.0, 0.0, 0, 0)[0]
            expected = torch.nn.functional.cross_entropy(x, target, reduction="none")
            torch.testing.assert_close(loss, expected, equal_nan=True)


def test_no_class_gives_nan():
    loss = kernel.cross_entropy(
        torch.randn(3, 5), torch.tensor([0, 5, -1]), None, -100, 0.0, 0.0, 0, 0
    )[0]
    assert loss.isnan().tolist() == [False, True, True]


def test_all_ignored_and_no_samples():
    x, target = torch.randn(3, 5), torch.full((3,), -100)
    loss, _, dx = kernel.cross_entropy(x, target, None, -100, 0.0, 0.0, 1, 1)
    assert bool(loss.isnan()) and torch.equal(dx, torch.zeros(3, 5))
    loss, lse, dx = kernel.cross_entropy(x[:0], target[:0], None, -100, 0.0, 0.0, 2, 1)
    assert loss == 0 and lse.shape == (0,) and dx.shape == (0, 5)


# The smallest chunks have 128 samples; rows of logits are rounded up to 64 columns.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "samples, classes, bytes",
    [(0, 11, 0), (1, 11, 0), (5, 64, 0), (260, 11, 0), (40, 77, 2**28)],
    ids=["none", "one", "even", "three chunks", "one chunk"],
)
def test_linear(samples, classes, bytes, dtype, monkeypatch):
    monkeypatch.setattr(triton_linear, "CHUNK_BYTES", bytes)
    for numbers, bias, weighted in itertools.product(NUMBERS, (False, True), (False, True)):
        x, weight = torch.randn(samples, 6).to(dtype), torch.randn(classes, 6).to(dtype)
        b = torch.randn(classes).to(dtype) if bias else None
        target = torch.randint(0, classes, (samples,))
        class_weight = torch.rand(classes) + 0.1 if weighted else None
        wanted = (7 if bias else 3) if numbers[3] else 0
        if numbers[3] == 1 and bool((target == numbers[0]).all()):
            continue  # 0/0
        arguments = (x, weight, b, target, class_weight, *numbers)
        with poisoned_memory():
            mine = kernel.linear_cross_entropy(*arguments, wanted)
        theirs = reference.linear_cross_entropy(*arguments, wanted)
        _compare(mine, theirs, dtype)
        lse, grad = theirs[1], torch.randn(theirs[0].shape)
        arguments = (grad, *arguments[:5], lse, *numbers, 7 if bias else 3)
        with poisoned_memory():
            mine = kernel.linear_cross_entropy_backward(*arguments)
        _compare(mine, reference.linear_cross_entropy_backward(*arguments), dtype)


def test_linear_with_nothing_kept():
    x, weight, target = torch.randn(5, 6), torch.randn(11, 6), torch.full((5,), 3)
    loss, _, *gradients = kernel.linear_cross_entropy(
        x, weight, None, target, None, 3, 0.1, 0.1, 1, 3
    )
    assert bool(loss.isnan())
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_chunks():
    """Equally large, of 2²⁸ bytes or as much as the weight; whole rows of 128 bytes."""
    x, weight = (torch.empty(n, 768, dtype=torch.bfloat16, device="meta") for n in (8192, 50257))
    assert triton_linear.chunk_sizes(x, weight) == (50304, 2048)
    assert triton_linear.chunk_sizes(x[:100], weight) == (50304, 128)
    x, weight = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (9000, 128256))
    assert triton_linear.chunk_sizes(x, weight) == (128256, 3072)


def _compare(mine, theirs, dtype):
    """In half types the logits and their gradient are rounded on the way: what that comes to is
    known for all numbers together, not for each."""
    size = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}[dtype]
    for a, b in zip(mine, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if dtype is torch.float32:
            torch.testing.assert_close(a, b, rtol=size, atol=size)
        else:
            a, b = a.double(), b.double()
            assert (a - b).norm() <= size * (b.norm() + 1e-2)


def test_scale():
    for size in ((5000,), (3, 4), (0,)):
        x = torch.randn(size)
        assert torch.equal(kernel.cross_entropy_scale(torch.tensor(0.3), x, None), x * 0.3)


def test_int64_offsets(monkeypatch):
    """The branch for tensors of 2³¹ elements computes the same on small ones."""
    monkeypatch.setattr(triton_loss, "needs_int64", lambda *_: True)
    x, target = torch.randn(3, 7, 5), torch.randint(0, 7, (15,))
    mine = kernel.cross_entropy(x, target, None, 1, 0.1, 0.0, 1, 1)
    torch.testing.assert_close(mine, reference.cross_entropy(x, target, None, 1, 0.1, 0.0, 1, 1))


def test_what_is_refused():
    with pytest.raises(NotImplementedError, match=r"cross_entropy for torch\.float64"):
        kernel.cross_entropy(
            torch.randn(3, 4).double(), torch.zeros(3).long(), None, -100, 0, 0, 1, 0
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_scale_in_place(factor, dtype):
    whole = torch.randn(5000).to(dtype)
    x = whole[:4999].clone()
    kernel.scale_on_gpu(torch.tensor(factor, dtype=dtype), x)
    assert torch.equal(x, whole[:4999] * factor)
