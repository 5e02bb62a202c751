"""The tolerance itself: it lets rounding pass and nothing else."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate

TRUTH = torch.linspace(-1, 1, 101, dtype=torch.float64).exp()
NEAR = TRUTH.float()


def changed(index, value):
    copy = NEAR.clone()
    copy[index] = value
    return copy


def test_rounding_passes():
    assert_as_accurate(NEAR, NEAR, TRUTH)
    assert_as_accurate(torch.nextafter(NEAR, NEAR + 1), NEAR, TRUTH)
    assert_as_accurate(NEAR[:0], NEAR[:0], TRUTH[:0])
    assert_as_accurate(NEAR * 0, NEAR * 0, TRUTH * 0)


def test_twice_the_error_of_torch_passes_and_more_does_not():
    off = TRUTH * 1e-3
    assert_as_accurate((TRUTH + 2 * off).float(), (TRUTH - off).float(), TRUTH)
    with pytest.raises(AssertionError, match="relative L2 error"):
        assert_as_accurate((TRUTH + 2.1 * off).float(), (TRUTH - off).float(), TRUTH)


def test_infinities_and_nan_must_be_torchs():
    odd = changed(3, float("nan"))
    odd[5] = -float("inf")
    assert_as_accurate(odd, odd, TRUTH)


@pytest.mark.parametrize(
    ("actual", "reference", "message"),
    [
        (changed(0, float(NEAR[0]) + 1e-4), NEAR, "error"),
        (changed(4, float("nan")), NEAR, "1 NaN or inf where torch has none"),
        (NEAR, changed(4, float("nan")), "1 elements where torch has NaN or inf"),
        (changed(4, float("inf")), changed(4, -float("inf")), "where torch has NaN or inf"),
        (NEAR[:1], NEAR, "shape"),
        (NEAR.half(), NEAR, "dtype"),
    ],
)
def test_wrong_results_fail(actual, reference, message):
    with pytest.raises(AssertionError, match=message):
        assert_as_accurate(actual, reference, TRUTH, what="y")


def test_a_single_wrong_element_of_many_fails():
    truth = torch.rand(1_000_000, dtype=torch.float64)
    wrong = truth.float()
    wrong[17] += 1e-5  # moves the relative L2 norm by 2e-8 only
    with pytest.raises(AssertionError, match="maximum error"):
        assert_as_accurate(wrong, truth.float(), truth)
