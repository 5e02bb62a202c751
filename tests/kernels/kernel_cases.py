"""What the kernel tests share: views of odd strides, poisoned memory, and the comparison."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from alone import alone
from tolerances import assert_as_accurate
from torch import Tensor
from torch.nn import functional as TF

from nnarch import library

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FORMATS = (torch.contiguous_format, torch.channels_last)
BACKENDS = ("cpu", "reference")
ACTIVATIONS: tuple[Any, ...] = (
    None, "relu", "relu6", ("leaky_relu", 0.1), "hardswish", "hardsigmoid", "silu", "gelu",
    "gelu_tanh", "tanh", "sigmoid",
)  # fmt: skip

short = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
short |= {torch.contiguous_format: "nchw", torch.channels_last: "nhwc"}


def name_of(value: Any) -> str | None:
    """pytest's id of a dtype or memory format."""
    return short.get(value)


@contextlib.contextmanager
def machine_with(l2_kib: int = 0, far_l3: bool | None = None) -> Iterator[None]:
    """Native algorithms chosen as on a machine with these caches; 0 and None are this one's."""
    pretend = library.native.nnarch_pretend_machine
    pretend.argtypes = [ctypes.c_int64, ctypes.c_int64]
    pretend(l2_kib << 10, 0 if far_l3 is None else 1 + far_l3)
    try:
        yield
    finally:
        pretend(0, 0)


# ------------------------------------------------------------------------------- views of tensors


def _sliced(t: Tensor) -> Tensor:
    """Every second element of every dimension of a larger tensor."""
    wide = t.new_full([2 * s + 1 for s in t.shape], float("nan"))
    view = wide[tuple(slice(1, 2 * s + 1, 2) for s in t.shape)]
    return view.copy_(t)


def _misaligned(t: Tensor) -> Tensor:
    """Dense, one element past an aligned address."""
    memory = t.new_full((t.numel() + 1,), float("nan"))
    return memory[1:].view(t.shape).copy_(t)


def _transposed(t: Tensor) -> Tensor:
    """Dense with the dimensions in the opposite order."""
    dims = tuple(reversed(range(t.dim())))
    return t.permute(dims).contiguous().permute(dims)


def _expanded(t: Tensor) -> Tensor:
    """The first slice of dimension 0 again and again, with stride 0."""
    return t[:1].expand(t.shape) if t.shape[0] else t


def _scalar(t: Tensor) -> Tensor:
    """One number everywhere: all strides 0, as `.sum().backward()` makes gradients."""
    return t.flatten()[:1].reshape([1] * t.dim()).expand(t.shape) if t.numel() else t


def _border(t: Tensor) -> Tensor:
    """The middle of a larger tensor: dense rows that do not follow each other."""
    wide = t.new_full([s + 2 for s in t.shape], float("nan"))
    view = wide[tuple(slice(1, s + 1) for s in t.shape)]
    return view.copy_(t)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": _sliced,
    "misaligned": _misaligned,
    "transposed": _transposed,
    "expanded": _expanded,
    "scalar": _scalar,
    "border": _border,
}

# ------------------------------------------------------------------------------- poisoned memory

_M_PERTURB = -6  # of glibc's malloc.h


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every block of memory that malloc hands out with 0xFF bytes: NaN in every dtype.

    torch.utils.deterministic.fill_uninitialized_memory serves torch's own functions only; this
    reaches the outputs of native kernels, and `nnarch_pool_fill` their scratch memory and packed
    weights. mallopt keeps an int and fills with its low byte, inverted: 0x100 switches filling on
    and makes it 0xFF.
    """
    libc = ctypes.CDLL(None)
    if not sys.platform.startswith("linux") or not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(_M_PERTURB, 0x100)
    if library.native is not None:
        library.native.nnarch_pool_fill(0xFF)
    try:
        yield
    finally:
        libc.mallopt(_M_PERTURB, 0)
        if library.native is not None:
            library.native.nnarch_pool_fill(-1)


def memory_is_poisoned() -> bool:
    """Whether :func:`poisoned_memory` works with this C library (a sanitizer replaces malloc)."""
    with poisoned_memory():
        return all(bool(torch.empty(n).isnan().all()) for n in (1, 60, 5000, 200_000))


def on_fresh_memory(function: Callable[[], Any]) -> Any:
    """Run `function` on a new thread in poisoned memory: its scratch buffers start as NaN too."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    with poisoned_memory():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


# ----------------------------------------------------------------------------------- comparison


def act(z: Tensor, activation: Any) -> Tensor:
    """torch's own activation function."""
    name, alpha = activation if isinstance(activation, tuple) else (activation, 0.01)
    if name is None:
        return z
    if name == "leaky_relu":
        return TF.leaky_relu(z, alpha)
    if name == "gelu_tanh":
        return TF.gelu(z, approximate="tanh")
    return getattr(TF, name)(z) if name not in ("tanh", "sigmoid") else getattr(torch, name)(z)


def torch_epilogue(
    y: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: Any,
    dim: int,
) -> Tensor:
    """The epilogue in torch's functions, for channels along `dim`."""
    shape = [1] * y.dim()
    shape[dim] = -1
    if scale is not None:
        y = y * scale.reshape(shape)
    if shift is not None:
        y = y + shift.reshape(shape)
    if residual is not None:
        y = y + residual
    return act(y, activation)


def evaluate(
    function: Callable[..., Tensor],
    tensors: dict[str, Tensor | None],
    dtype: torch.dtype | None = None,
    grad: Tensor | None = None,
) -> list[Tensor]:
    """function(**tensors), in `dtype` if given, and with `grad` the gradients of all tensors."""
    inputs = {name: t if t is None or dtype is None else t.to(dtype) for name, t in tensors.items()}
    if grad is None:
        return [function(**inputs)]
    leaves = {name: t if t is None else t.detach().requires_grad_() for name, t in inputs.items()}
    y = function(**leaves)
    wanted = [t for t in leaves.values() if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))]


def compare(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    tensors: dict[str, Tensor | None],
    grad: Tensor | None = None,
    **tolerance: Any,
) -> Tensor:
    """Assert that ours(**tensors) and its gradients are as accurate as torch's; return the output.

    Args:
        ours, theirs: take the tensors by name.
        tensors: in the dtype under test; None stays None.
        grad: gradient of the output; None compares the output alone.
        tolerance: as :func:`tolerances.assert_as_accurate`.
    """
    mine = on_fresh_memory(lambda: evaluate(ours, tensors, None, grad))
    truth = evaluate(theirs, tensors, torch.float64, grad)
    try:
        reference: Sequence[Tensor] = evaluate(theirs, tensors, None, grad)
    except (RuntimeError, NotImplementedError):  # torch lacks some float16 kernels on the CPU
        reference = [t.to(m.dtype) for t, m in zip(truth, mine, strict=True)]
    names = ["output", *(f"gradient of {n}" for n, t in tensors.items() if t is not None)]
    for what, a, b, c in zip(names, mine, reference, truth, strict=False):
        assert_as_accurate(a, b, c, what=what, **tolerance)
    return mine[0]


def small_integers(like: Tensor) -> Tensor:
    """Integers from -2 to 2, not 0: sums of their products are exact in float32, in any order."""
    signs = torch.randint(0, 2, like.shape) * 2 - 1
    return (signs * torch.randint(1, 3, like.shape)).to(like.dtype)


def equal_to_torch(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    tensors: dict[str, Tensor | None],
    grad: Tensor,
) -> None:
    """Assert that ours(**tensors) and its gradients are torch's, where nothing is rounded.

    With :func:`small_integers`, a wrong address is all that can make a difference: tests of strides
    need no tolerance.
    """
    mine = on_fresh_memory(lambda: evaluate(ours, tensors, None, grad))
    names = ["output", *(f"gradient of {n}" for n, t in tensors.items() if t is not None)]
    for what, a, b in zip(names, mine, evaluate(theirs, tensors, None, grad), strict=True):
        assert torch.equal(a, b), f"{what}: {int((a != b).sum())} of {a.numel()} elements differ"


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a·b of float64 matrices, summed in long double and rounded once: a truth for float64."""
    wide = a.numpy().astype(np.longdouble) @ b.numpy().astype(np.longdouble)
    return torch.from_numpy(wide.astype(np.float64))


def ulps_of_running_sum(depth: int) -> float:
    """The allowance for sums of `depth` random products, in ulp.

    Rounding errors of a running sum grow with the root of its length. The matrix product keeps at
    most 1024 products in one running sum; torch's libraries often keep fewer.
    """
    return max(4.0, min(depth, 1024) ** 0.5 / 4)


def ulps_of_sum(depth: int, dtype: torch.dtype) -> float | None:
    """The same for float32; None, the usual allowance, for other dtypes.

    Half types are rounded once, at the end; in float64 the truth itself is a running sum.
    """
    return ulps_of_running_sum(depth) if dtype == torch.float32 else None


needs_long_double = pytest.mark.skipif(
    np.finfo(np.longdouble).eps >= np.finfo(np.float64).eps,
    reason="this machine's long double is no longer than a double",
)
needs_poison = pytest.mark.skipif(
    not memory_is_poisoned(), reason="this C library's malloc cannot fill memory"
)


def check_under_isa(isa: str, check: Callable[[], None]) -> None:
    """Run `check` in a process of its own, with instruction set `isa`.

    Skips the test where this CPU lacks the set.
    """
    if not alone(_check_where_usable, isa, check, environment={"NNARCH_ISA": isa}):
        pytest.skip(f"this CPU lacks {isa}")


def _check_where_usable(isa: str, check: Callable[[], None]) -> bool:
    used = library.native_string("nnarch_isa")
    assert used == isa or (not used and isa != "generic")  # which every CPU has
    if used:
        check()
    return bool(used)
