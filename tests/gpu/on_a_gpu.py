"""What the tests on a real GPU share: where they run, and the comparison with torch there.

NNARCH_TEST_DEVICE=cpu runs their bodies on the native kernels instead, to test the tests.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tolerances import assert_as_accurate
from torch import Tensor, nn

import nnarch

DEVICE = os.environ.get("NNARCH_TEST_DEVICE", "cuda")
BACKEND = "triton" if DEVICE == "cuda" else "cpu"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="needs a GPU",
    ),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def assert_ran(record: nnarch.backends.Trace, backend: str = BACKEND) -> None:
    """Assert that operations ran, all of them on one backend."""
    backends = {entry.backend for entry in record}
    assert backends == {backend}, f"\n{record}"


def check(
    ours: Callable[..., Any],
    torchs: Callable[..., Any],
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    call: Callable[..., Any] | None = None,
    gradients: bool = True,
    factor: float = 3.0,
    ulps: float | None = None,
    backend: str = BACKEND,
) -> nnarch.backends.Trace:
    """Assert that a function is as accurate as torch's on the same device, and its gradients too.

    Args:
        ours, torchs: take `tensors` and return a tensor or several. `torchs` also runs in float64
            on the CPU, which is the truth. Modules get the same parameters, copied and rounded.
        tensors: on the CPU; floating-point ones are rounded to `dtype` and want gradients.
        dtype: that is tested.
        call: of a module and the tensors, where that is more than ``module(*tensors)``.
        gradients: whether gradients (of parameters too) are compared.
        factor: as in :func:`assert_as_accurate`, of torch's error.
        ulps: likewise.
        backend: that every operation has to run on.
    """
    if isinstance(ours, nn.Module) and isinstance(torchs, nn.Module):
        ours.load_state_dict(torchs.state_dict())
    rounded = [t.to(dtype) if t.is_floating_point() else t for t in tensors]

    def run(function: Any, device: str, wide: torch.dtype) -> dict[str, Tensor]:
        parameters: dict[str, Tensor] = {}
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).to(dtype).to(device, wide)
            parameters = dict(function.named_parameters()) if gradients else {}
        leaves = [
            t.to(device, wide).requires_grad_(gradients) if t.is_floating_point() else t.to(device)
            for t in rounded
        ]
        with torch.set_grad_enabled(gradients):
            result = call(function, *leaves) if call else function(*leaves)
        outputs = [result] if isinstance(result, Tensor) else list(result)
        found = {f"result {i}": y for i, y in enumerate(outputs)}
        if gradients:
            wanted = {f"gradient {i}": t for i, t in enumerate(leaves) if t.requires_grad}
            wanted |= {f"gradient of {name}": p for name, p in parameters.items()}
            directions = [direction(y) for y in outputs]
            grads = torch.autograd.grad(outputs, list(wanted.values()), directions)
            found |= dict(zip(wanted, grads, strict=True))
        return {name: t.detach().cpu() for name, t in found.items()}

    with nnarch.trace() as record:
        got = run(ours, DEVICE, dtype)
    assert_ran(record, backend)
    expected, truth = run(torchs, DEVICE, dtype), run(torchs, "cpu", torch.float64)
    assert got.keys() == expected.keys() == truth.keys()
    for name, value in got.items():
        assert_as_accurate(value, expected[name], truth[name], factor=factor, ulps=ulps, what=name)
    return record


def direction(y: Tensor) -> Tensor:
    """The gradient that comes from above: the same numbers in every dtype, exact in all of them."""
    steps = torch.arange(y.numel(), dtype=torch.float64).view(y.shape)
    return (((steps * 37) % 64 - 31.5) / 32).to(y.device, y.dtype)
