"""Capsule routing of samples side by side, whose votes are computed again in every iteration."""

from __future__ import annotations

import pytest
import torch
from capsule_cases import capsules, our_routing, plain_routing
from kernel_cases import DTYPES, check_under_isa, compare, machine_with, name_of
from torch import Tensor

import nnarch
from nnarch import functional as F


@pytest.fixture(autouse=True)
def _far_cache():
    """A last-level cache from which it costs more to read votes than to compute them again."""
    with machine_with(l2_kib=2048, far_l3=True):
        yield


# Votes too many for the second cache; samples are as many as there are lanes, one less, and more;
# values of an output in runs of 16, 8, 4, 2 and 1; samples of more than a chunk of 32 MB.
LANES = [
    (16, 360, 1, 10, 16),
    (15, 359, 2, 7, 23),
    (47, 333, 3, 11, 15),
    (32, 370, 4, 10, 16),
    (30, 359, 5, 7, 23),
    (16, 375, 8, 10, 16),
    (63, 371, 11, 9, 17),
    (33, 1600, 1, 40, 6),
]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=name_of)
@pytest.mark.parametrize("shape", LANES, ids=str)
def test_samples_in_lanes(shape, dtype):
    """Votes that would leave the second cache are computed in every iteration instead."""
    x, weight, bias = (t.to(dtype) for t in capsules(*shape))
    for iterations, detach in ((1, False), (3, True), (3, False), (2, False)):
        compare(
            our_routing(iterations=iterations, detach_routing=detach),
            lambda i=iterations, d=detach, **t: plain_routing(**t, iterations=i, detach=d),
            {"x": x, "weight": weight, "bias": bias if detach else None},
            torch.randn(shape[0], *shape[3:]).to(dtype),
            # Three iterations over thousands of capsules pass rounding errors on.
            ulps=256 if dtype == torch.float64 or shape[1] > 1000 else 64,
        )


def _lane_capsules() -> tuple[Tensor, Tensor, Tensor]:
    return capsules(16, 750, 1, 10, 16)


def test_the_choice_of_lanes():
    x, weight, _ = _lane_capsules()
    x.requires_grad_()
    with nnarch.trace() as trace:
        for some, w in ((x, weight), (x[:1], weight), (x[:, :20], weight[:, :20])):
            F.capsule_routing(some, w).sum().backward()
        F.capsule_routing(x, weight, detach_routing=True).sum().backward()
    for op, last in (("capsule_routing", "lanes"), ("capsule_routing_grad", "cache")):
        algorithms = [entry.algorithm for entry in trace if entry.op == op]
        places = ["lanes", "cache", "cache", last]
        assert algorithms == [f"votes in {place}" for place in places]


@pytest.mark.parametrize("shape", LANES, ids=str)
def test_these_samples_are_in_lanes(shape):
    x, weight, _ = capsules(*shape)
    with nnarch.trace() as trace:
        F.capsule_routing(x.requires_grad_(), weight).sum().backward()
    assert [entry.algorithm for entry in trace if "pack" not in entry.op] == ["votes in lanes"] * 2


def test_a_near_cache_keeps_votes():
    with machine_with(l2_kib=512, far_l3=False), nnarch.trace() as trace:
        F.capsule_routing(*capsules(32, 370, 8, 10, 16)[:2])
    assert [entry.algorithm for entry in trace] == ["votes in cache"]


def test_gradients_do_not_depend_on_threads():
    x, weight, _ = (t.requires_grad_() for t in capsules(50, 372, 8, 10, 16))
    grad = torch.randn(50, 10, 16)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(torch.autograd.grad(F.capsule_routing(x, weight), (x, weight), grad))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


def test_lanes_take_any_weight():
    """Packed, in either order of memory: the same bits."""
    x, weight, bias = _lane_capsules()
    expected = F.capsule_routing(x, weight, bias=bias)
    for w in (weight, weight.contiguous(memory_format=torch.channels_last)):
        packed = F.pack_capsule_weight(w)
        assert torch.equal(F.capsule_routing(x, w, bias=bias, packed=packed), expected)
        assert torch.equal(F.capsule_routing(x, w, bias=bias), expected)
    with pytest.raises(ValueError, match="packed is not what this weight"):
        F.capsule_routing(x, weight, packed=packed[1:])


def test_lanes_with_nan_and_large_logits():
    """Of one sample: no other sees them."""
    x, weight, _ = _lane_capsules()
    for value, count in ((float("nan"), 1), (float("inf"), 1), (300.0, 100)):
        changed = x.clone()
        changed[5, :count] *= value
        mine, truth = changed.requires_grad_(), changed.detach().double().requires_grad_()
        v, expected = F.capsule_routing(mine, weight), plain_routing(truth, weight.double())
        torch.testing.assert_close(v, expected.float(), equal_nan=True, rtol=1e-3, atol=1e-4)
        v.sum().backward(), expected.sum().backward()
        others = [sample for sample in range(16) if sample != 5]
        torch.testing.assert_close(
            mine.grad[others], truth.grad[others].float(), rtol=1e-3, atol=1e-4
        )


def _on_every_isa() -> None:
    """What the subprocess of the next test runs."""
    with machine_with(l2_kib=2048, far_l3=True):
        test_samples_in_lanes(LANES[2], torch.float32)
        test_samples_in_lanes(LANES[5], torch.float64)
        test_lanes_with_nan_and_large_logits()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, _on_every_isa)
