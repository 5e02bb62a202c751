"""What pooling refuses: errors that name the operation, the argument, what was expected and got."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_cases import FORMATS, name_of

from nnarch import functional as F
from nnarch.kernels.pooling import average as a
from nnarch.kernels.pooling import maximum as m

X = torch.randn(1, 2, 6, 7)
P = torch.zeros(1, 2, 3, 3, dtype=torch.int64)
G = torch.randn(1, 2, 3, 3)
TAPS = ((2, 3), (2, 2), (0, 0), (1, 1), False)
BAD = [
    (lambda: F.max_pool2d(X[0, 0], 2), ValueError, r"must be \[C, H, W\].*got shape \(6, 7\)"),
    (lambda: F.max_pool2d(X[:, :0], 2), ValueError, r"no size but N being 0, got shape \(1, 0,"),
    (lambda: F.avg_pool2d(X[..., :0], 2), ValueError, r"avg_pool2d: input must.*\(1, 2, 6, 0\)"),
    (lambda: F.max_pool2d(X.long(), 2), TypeError, "input must be floating point, got torch.int64"),
    (lambda: F.avg_pool2d([1.0], 2), TypeError, "avg_pool2d: input must be a tensor.*got list"),
    (lambda: F.max_pool2d(X, 2.5), TypeError, "kernel_size must be an int or a pair.*got 2.5"),
    (lambda: F.max_pool2d(X, (2, 2, 2)), TypeError, r"kernel_size must be.*got \(2, 2, 2\)"),
    (lambda: F.max_pool2d(X, 2, "2"), TypeError, "stride must be an int or a pair.*got '2'"),
    (lambda: F.max_pool2d(X, 2, 0), ValueError, r"stride must be at least 1.*got \(0, 0\)"),
    (lambda: F.max_pool2d(X, -1), ValueError, r"kernel_size must be at least 1.*got \(-1, -1\)"),
    (lambda: F.max_pool2d(X, 2, 2, 0, 0), ValueError, r"dilation must be at least 1.*\(0, 0\)"),
    (lambda: F.max_pool2d(X, 2, 2, (0, 2)), ValueError, r"padding must be at most half.*\(0, 2\)"),
    (lambda: F.avg_pool2d(X, 2, 2, -1), ValueError, r"padding must be at least 0.*\(-1, -1\)"),
    (lambda: F.max_pool2d(X, (7, 1)), ValueError, r"input of \(6, 7\) is too small for kernel"),
    (lambda: F.max_pool2d(X, 3, 1, 0, 4), ValueError, r"too small for kernel_size.*dilation"),
    (lambda: F.max_pool2d(X, 2**40, 1, 2**39), ValueError, r"kernel_size must be.*below 2\*\*31"),
    (lambda: F.max_pool2d(X, 2, 2**31), ValueError, r"stride must be.*below 2\*\*31"),
    (lambda: F.avg_pool2d(X, 2, divisor_override=0), ValueError, "divisor_override must.*got 0"),
    (lambda: F.avg_pool2d(X, 2, divisor_override=1.5), TypeError, "divisor_override must.*got 1.5"),
    (lambda: F.adaptive_avg_pool2d(X, -1), ValueError, r"output_size must not be negative.*\(-1"),
    (lambda: F.adaptive_avg_pool2d(X, (1, 2, 3)), TypeError, r"output_size must be.*\(1, 2, 3\)"),
    (lambda: F.adaptive_max_pool2d(X, "1"), TypeError, "output_size must be an int or a pair"),
    (lambda: F.adaptive_max_pool2d(X[0, 0], None), ValueError, "adaptive_max_pool2d: input must"),
    (lambda: F.adaptive_avg_pool2d(None, None), TypeError, "DLPack, got NoneType"),
    (lambda: m.max_pool2d_input_grad(G, P.int(), X.shape), TypeError, "indices must be.*int64"),
    (lambda: m.max_pool2d_input_grad(G, P[..., :2], X.shape), ValueError, "the shape of grad"),
    (lambda: m.max_pool2d_input_grad(G, P + 42, X.shape), ValueError, r"lie in.*got 42 to 42"),
    (lambda: m.max_pool2d_input_grad(G, P - 2, X.shape), ValueError, "lie in.*got -2 to -2"),
    (lambda: m.max_pool2d_input_grad(G, P, (1, 3, 6, 7)), ValueError, "input_size must be"),
    (lambda: m.max_pool2d_gather(X, P + 42), ValueError, "max_pool2d_gather: indices must lie"),
    (lambda: m.max_pool2d_gather(X, P[:, :1]), ValueError, "max_pool2d_gather: indices must be"),
    (lambda: m.max_pool2d_taps_op(X, (16, 16), *[(8, 8)] * 2, (1, 1), True), ValueError, "254"),
    (lambda: m.max_pool2d_taps_grad(G, P, X.shape, *TAPS), TypeError, "taps must be.*uint8"),
    (lambda: m.max_pool2d_taps_grad(G, P[..., :2].byte(), X.shape, *TAPS), ValueError, "shape of"),
    (lambda: m.max_pool2d_taps_grad(G, P.byte(), (1, 2, 9, 9), *TAPS), ValueError, "grad must"),
    (lambda: m.max_pool2d_taps_grad(G, P.byte(), (1, 3, 6, 7), *TAPS), ValueError, "input_size"),
    (lambda: a.avg_pool2d_input_grad(G, X.shape, (3, 3), (1, 1), (0, 0), False, True, None),
     ValueError, r"grad must have height and width \(4, 5\)"),
    (lambda: a.adaptive_avg_pool2d_input_grad(G, (1, 2, 0, 3)), ValueError, "must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# What would fill the memory, or take a table of every window, is refused before either happens.
MOST = 2**26
HUGE = [
    (lambda: F.adaptive_avg_pool2d(X, 10**9), ValueError, r"output_size must have at most 2\*\*26"),
    (lambda: F.adaptive_avg_pool2d(X, (1, 10**9)), ValueError, "output_size must have at most"),
    (lambda: F.adaptive_max_pool2d(X, (10**9, 1)), ValueError, "adaptive_max_pool2d: output_size"),
    (lambda: F.adaptive_max_pool2d(X, 2**70, True), ValueError, "adaptive_max_pool2d: output_size"),
    (lambda: F.adaptive_avg_pool2d(X, MOST), RuntimeError, "a tensor of 36028797018963968 bytes"),
    (lambda: F.adaptive_max_pool2d(X, MOST), RuntimeError, "not enough memory"),
    (lambda: F.adaptive_max_pool2d(X, MOST, True), RuntimeError, "not enough memory"),
    (lambda: F.avg_pool2d(torch.zeros(1, 1, 1, 1).expand(1, 1, 2**20, MOST), 2),
     RuntimeError, "not enough memory"),
    (lambda: a.adaptive_avg_pool2d_input_grad(G, (1, 2, 10**9, 1)), ValueError, "input_size must"),
    (lambda: a.adaptive_avg_pool2d_input_grad(G, (1, 2, MOST, MOST)), RuntimeError, "not enough"),
    (lambda: a.avg_pool2d_input_grad(
        G, (1, 2, 10**9, 3), (1, 1), (10**9, 1), (0, 0), False, True, None),
     ValueError, r"input_size must have|grad must have"),
    (lambda: m.max_pool2d_input_grad(G, P, (1, 2, 2**30, 2**30)), ValueError, "overflows int64"),
]  # fmt: skip


@pytest.mark.parametrize("memory_format", FORMATS, ids=name_of)
@pytest.mark.parametrize(("call", "error", "message"), HUGE, ids=range(len(HUGE)))
def test_huge(call, error, message, memory_format, little_memory, monkeypatch):
    for name in ("X", "G"):
        monkeypatch.setitem(
            globals(), name, globals()[name].contiguous(memory_format=memory_format)
        )
    with pytest.raises(error, match=message):
        call()


def test_nothing_of_huge_size():
    """No output, so no table of its windows either."""
    assert F.adaptive_avg_pool2d(X[:0], MOST).shape == (0, 2, MOST, MOST)
    assert F.adaptive_max_pool2d(X, (0, MOST)).shape == (1, 2, 0, MOST)


def test_windows_of_padding(little_memory):
    """A kernel of a thousand million taps, of which all but a few are padding."""
    for kernel, padding, taps in (
        (10**9, 5 * 10**8, 10**18),
        ((7, 10**9), (3, 5 * 10**8), 7 * 10**9),
    ):
        y = F.max_pool2d(X[:, :, :1], kernel, 1, padding)
        assert torch.equal(y[:, :, 0], X[:, :, :1].amax(-1).expand_as(y[:, :, 0]))
        y = F.avg_pool2d(X[:, :, :1], kernel, 1, padding)
        torch.testing.assert_close(y[:, :, 0] * taps, X[:, :, :1].sum(-1).expand_as(y[:, :, 0]))


@pytest.fixture
def little_memory():
    """This process may take 2 GB more and not all that the machine has."""
    resource = pytest.importorskip("resource")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**31, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
