"""When a result counts as right: it is as accurate as torch's, measured against float64.

No fixed rtol can hold for every dtype and reduction length. The bound is torch's own error on the
same input in the same dtype, times two, plus a few units in the last place; in relative L2, which a
systematic error moves, and in the maximum, which a single wrong element moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
ULPS = 4.0
# In float64 the truth is itself rounded, differently in each summation order.
ULPS_FLOAT64 = 64.0


def assert_as_accurate(
    actual: Tensor,
    torch_result: Tensor,
    truth64: Tensor,
    *,
    factor: float = FACTOR,
    ulps: float | None = None,
    what: str = "result",
) -> None:
    """Assert that ``error(actual) <= factor * error(torch_result) + ulps`` in L2 and in maximum.

    Args:
        actual: what nnarch computed.
        torch_result: what torch computed from the same input, in the same dtype.
        truth64: the same in float64, from the input as it was after rounding to that dtype.
        factor: how many times torch's error is allowed.
        ulps: allowance on top, in units of the dtype's epsilon, relative to the norm (for L2) and
            to the largest magnitude (for the maximum) of `truth64`.
        what: names the result in the failure message.
    """
    __tracebackhide__ = True
    assert actual.shape == torch_result.shape == truth64.shape, (
        f"{what}: shape {tuple(actual.shape)}, torch has {tuple(torch_result.shape)}, "
        f"the truth {tuple(truth64.shape)}"
    )
    assert actual.dtype == torch_result.dtype, (
        f"{what}: dtype {actual.dtype}, torch has {torch_result.dtype}"
    )
    assert truth64.dtype == torch.float64, f"{what}: the truth is {truth64.dtype}, not float64"
    if ulps is None:
        ulps = ULPS_FLOAT64 if actual.dtype == torch.float64 else ULPS
    slack = ulps * torch.finfo(actual.dtype).eps

    mine, theirs, finite = _finite_parts(actual, torch_result, truth64, what)
    for norm, name in ((_l2, "relative L2"), (_max, "maximum")):
        scale = norm(finite) or 1.0
        error, torch_error = norm(mine - finite) / scale, norm(theirs - finite) / scale
        assert error <= factor * torch_error + slack, (
            f"{what}: {name} error {error:.3e}, torch's {torch_error:.3e}, "
            f"allowed {factor:g}x + {slack:.1e}"
        )


def _finite_parts(
    actual: Tensor, torch_result: Tensor, truth64: Tensor, what: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The three as flat float64, where all are finite; elsewhere `actual` must agree with torch."""
    mine, theirs, truth = (t.detach().double().flatten() for t in (actual, torch_result, truth64))
    odd = ~torch.isfinite(theirs)
    agree = (mine[odd] == theirs[odd]) | (mine[odd].isnan() & theirs[odd].isnan())
    assert bool(agree.all()), f"{what}: {int((~agree).sum())} elements where torch has NaN or inf"
    stray = ~torch.isfinite(mine) & ~odd
    assert not bool(stray.any()), f"{what}: {int(stray.sum())} NaN or inf where torch has none"
    keep = ~odd & torch.isfinite(truth)
    return mine[keep], theirs[keep], truth[keep]


def _l2(values: Tensor) -> float:
    return float(values.norm())


def _max(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
