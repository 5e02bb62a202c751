"""What the tests of interpreted Triton kernels share: memory formats, views, and the comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from tolerances import assert_as_accurate
from torch import Tensor

from nnarch.kernels.activation import kinds
from nnarch.kernels.gpu import launch

DTYPES = [torch.float32, torch.float16]
if not launch.INTERPRETED:  # bfloat16 is wrong in the interpreter of Triton 3.9
    DTYPES.append(torch.bfloat16)
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
ACTIVATIONS = sorted(kinds.NAMES)  # codes; 0 is none
ALPHA = 0.1


def _sliced(t: Tensor) -> Tensor:
    wide = t.new_full([2 * s + 1 for s in t.shape], float("nan"))
    return wide[tuple(slice(1, 2 * s + 1, 2) for s in t.shape)].copy_(t)


def _transposed(t: Tensor) -> Tensor:
    dims = tuple(reversed(range(t.dim())))
    return t.permute(dims).contiguous().permute(dims)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": _sliced,  # every second element of every dimension; NaN between them
    "transposed": _transposed,
    "expanded": lambda t: t[:1].expand(t.shape),
    "scalar": lambda t: t.flatten()[:1].reshape([1] * t.dim()).expand(t.shape),  # of a sum
}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    tensors: list[Tensor | None],
    *arguments: object,
    ulps: float | None = None,
) -> Tensor:
    """Assert that kernel(*tensors, *arguments) is as accurate as the reference; return it.

    Args:
        kernel: runs in poisoned memory.
        reference: the same in plain torch; run in the tensors' dtype and, for the truth, float64.
        tensors: None stays None.
        arguments: that follow the tensors.
        ulps: as :func:`tolerances.assert_as_accurate`.
    """
    with poisoned_memory():
        actual = kernel(*tensors, *arguments)
    torchs = reference(*tensors, *arguments)
    truth = reference(*(t if t is None else t.double() for t in tensors), *arguments)
    assert_as_accurate(actual, torchs, truth, ulps=ulps)
    return actual
