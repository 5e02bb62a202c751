"""gated_linear and gated_activation against torch in float64: algorithms, dtypes, strides."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from kernel_cases import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    VIEWS,
    act,
    compare,
    equal_to_torch,
    name_of,
    needs_poison,
    on_fresh_memory,
    small_integers,
    ulps_of_sum,
)
from torch import Tensor

import nnarch
from nnarch import functional as F
from nnarch.kernels.activation import kinds

# (rows, depth, outputs): the algorithms change at 4 and 512 rows, the blocks at 64 and 128 columns.
SIZES = [
    (1, 7, 5),
    (3, 129, 65),
    (4, 257, 130),
    (5, 1, 1),
    (13, 96, 257),
    (97, 31, 48),
    (31, 1031, 17),
    (250, 40, 33),
    (513, 20, 129),
    (600, 67, 131),
]


def tensors(m: int, c: int, k: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """All arguments, with both products near 1."""
    named = {"x": torch.randn(m, c)}
    named |= {n: torch.randn(k, c) / max(c, 1) ** 0.5 for n in ("gate_weight", "up_weight")}
    named |= {n: torch.randn(k) for n in ("gate_bias", "up_bias")}
    return {name: t.to(dtype) for name, t in named.items()}


def ours(activation="silu", packed=None, **named: Any) -> Tensor:
    return F.gated_linear(**named, activation=activation, packed=packed)


def theirs(activation="silu", **named: Any) -> Tensor:
    x, gate_bias, up_bias = named["x"], named.get("gate_bias"), named.get("up_bias")
    gates = torch.nn.functional.linear(x, named["gate_weight"], gate_bias)
    ups = torch.nn.functional.linear(x, named["up_weight"], up_bias)
    return act(gates, activation) * ups


def _samples() -> list[tuple[Any, ...]]:
    samples = []
    for rows, kind in ((3, kinds.SILU), (70, kinds.GELU), (600, kinds.RELU)):
        t = tensors(rows, 21, 35, torch.float32)
        samples.append((*t.values(), None, kind, 0.0))
    return samples


def _gates(count: int) -> list[tuple[Any, ...]]:
    return [(*(torch.randn(3, 5, 41) for _ in range(count)), code, 0.1 if code == kinds.LEAKY_RELU
             else 0.0) for code in kinds.NAMES]  # fmt: skip


SAMPLES = {
    "gated_linear": _samples,
    "gated_linear_pack": lambda: [(torch.randn(35, 21), torch.randn(35, 21))],
    "gate": lambda: _gates(2),
    "gate_grad": lambda: _gates(3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_forward_and_gradients(size, dtype):
    named, grad = tensors(*size, dtype), torch.randn(size[0], size[2]).to(dtype)
    packed = F.pack_gated_linear_weights(named["gate_weight"], named["up_weight"])
    ulps = ulps_of_sum(max(size), dtype)
    compare(ours, theirs, named, ulps=ulps)
    compare(lambda **t: ours(packed=packed, **t), theirs, named, ulps=ulps)
    compare(ours, theirs, named, grad, ulps=ulps and 2 * ulps)  # the gates' add up


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("size", [(2, 20, 35), (37, 9, 66), (520, 5, 19)], ids=str)
def test_every_activation(size, activation):
    """With every subset of the biases, with and without gradients."""
    named, grad = tensors(*size, torch.float32), torch.randn(size[0], size[2])
    for absent in ((), ("gate_bias",), ("up_bias",), ("gate_bias", "up_bias")):
        t = {name: value for name, value in named.items() if name not in absent}
        mine, truth = partial(ours, activation), partial(theirs, activation)
        compare(mine, truth, t)
        compare(mine, truth, t, grad, ulps=16)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("size", [(3, 9, 66), (37, 20, 35), (520, 5, 19)], ids=str)
def test_views(size, view):
    named = {n: VIEWS[view](small_integers(t)) for n, t in tensors(*size, torch.float32).items()}
    like = torch.empty(size[0], size[2])
    grad = VIEWS[view](small_integers(like))
    equal_to_torch(partial(ours, "relu"), partial(theirs, "relu"), named, grad)


def test_one_matrix_of_both_weights():
    """Two views of a stacked weight are read as they lie, and its gradient comes back whole."""
    x, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(10, 8, dtype=torch.float64)
    weight.requires_grad_()
    y = F.gated_linear(x, *weight.chunk(2), activation="gelu")
    gates, ups = (x @ weight.T).chunk(2, -1)
    z = torch.nn.functional.gelu(gates) * ups
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), weight)[0] for t in (y, z)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 4, 7), (0, 7), (2, 0, 7)])
def test_leading_dimensions(shape, backend):
    t = tensors(1, 7, 5, torch.float64) | {"x": torch.randn(shape, dtype=torch.float64)}
    with nnarch.use_backend(backend):
        torch.testing.assert_close(ours(**t), theirs(**t))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(3, 0, 5), (600, 0, 5), (3, 4, 0), (0, 4, 5), (0, 0, 0)])
def test_empty(size, backend):
    t = tensors(*size, torch.float32)
    with nnarch.use_backend(backend):
        torch.testing.assert_close(on_fresh_memory(lambda: ours(**t)), theirs(**t))


@needs_poison
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reads_no_uninitialised_memory(size):
    t = tensors(*size, torch.float32)
    weights = (t["gate_weight"], t["up_weight"])
    packed = on_fresh_memory(lambda: F.pack_gated_linear_weights(*weights))
    assert torch.equal(packed, F.pack_gated_linear_weights(*weights))
    for chosen in (None, packed):
        fresh = on_fresh_memory(lambda p=chosen: ours(packed=p, **t))
        assert torch.equal(fresh, ours(packed=chosen, **t))
        assert bool(torch.isfinite(fresh).all())


@pytest.mark.parametrize(
    ("rows", "packed", "algorithm"),
    [
        (1, False, "gated_gemv"),
        (4, True, "gated_gemv"),
        (5, False, "gated_gemm"),
        (5, True, "gated_gemm_packed"),
        (513, False, "gated_gemm_packed"),
    ],
)
def test_algorithm(rows, packed, algorithm):
    t = tensors(rows, 12, 10, torch.float32)
    chosen = F.pack_gated_linear_weights(t["gate_weight"], t["up_weight"]) if packed else None
    with nnarch.trace() as trace:
        ours(packed=chosen, **t)
    (entry,) = trace
    assert (entry.op, entry.backend, entry.algorithm) == ("gated_linear", "cpu", algorithm)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gradcheck(activation):
    leaves = [t.requires_grad_() for t in tensors(4, 5, 3, torch.float64).values()]

    def function(*t: Tensor) -> Tensor:
        return F.gated_linear(*t, activation=activation)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# ------------------------------------------------------------------------------------ elementwise


def exactly(z: Tensor, activation) -> Tensor:
    """torch's activation; exact in float64, where torch rounds a sixth to float32."""
    if z.dtype == torch.float64 and activation in ("hardsigmoid", "hardswish"):
        sigmoid = (z + 3).clamp(0, 6) / 6
        return sigmoid if activation == "hardsigmoid" else z * sigmoid
    return act(z, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_gated_activation(activation, dtype):
    for size in (0, 1, 33, 1023, 16387):
        named = {"gate": (torch.randn(size) * 3).to(dtype), "value": torch.randn(size).to(dtype)}
        compare(
            lambda gate, value: F.gated_activation(gate, value, activation),
            lambda gate, value: exactly(gate, activation) * value,
            named,
            torch.randn(size).to(dtype),
            # 1 - tanh² cancels: one value alone, near 1, is off by a few hundred ulp.
            **({"ulps": 512} if dtype == torch.float64 else {}),
        )


def test_gated_activation_of_views_and_formats():
    """Halves of one tensor, and images by channels, without copies of the caller's."""
    both = torch.randn(5, 14)
    gate, value = both.chunk(2, -1)
    torch.testing.assert_close(
        F.gated_activation(gate, value), torch.nn.functional.silu(gate) * value
    )
    gate = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    value = torch.randn(2, 3, 4, 5)
    y = F.gated_activation(gate, value, "relu")
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, gate.relu() * value)


BAD = [
    ({"up_weight": torch.randn(4, 7)}, ValueError, "gate_weight and up_weight must be"),
    ({"x": torch.randn(3, 6)}, ValueError, "x must be"),
    ({"x": [1.0]}, TypeError, "x must be a tensor"),
    ({"gate_bias": torch.randn(4)}, ValueError, "gate_bias must have shape"),
    ({"up_bias": torch.randn(5).double()}, TypeError, "up_bias must be torch.float32"),
    ({"activation": "swish"}, ValueError, "activation must be one of"),
    ({"packed": torch.randn(3)}, ValueError, "packed does not belong"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[b[2] for b in BAD])
def test_bad_input(change, error, message):
    t: dict[str, Any] = tensors(6, 7, 5, torch.float32)
    with pytest.raises(error, match=f"gated_linear: {message}"):
        F.gated_linear(**(t | change))


def test_bad_gates():
    with pytest.raises(ValueError, match="gate: value must have the shape of gate"):
        F.gated_activation(torch.randn(3), torch.randn(4))
    with pytest.raises(TypeError, match="gated_activation: value must be a tensor"):
        F.gated_activation(torch.randn(3), 1.0)  # type: ignore[arg-type]
