"""Reservoir cases: a whole sequence, against loops over the sparse products of scipy and torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nnarch.benchmarking.case import Case, Target

LEAK = 0.3


class ReservoirLoop(nn.Module):
    """The definition, step by step: leaky tanh neurons, one input, 1 % connectivity.

    Args:
        units: N.
        keep: whether all states are the result, ``[T, B, N]``, rather than the last one.
    """

    values: Tensor
    columns: Tensor
    rows: Tensor
    w_in: Tensor
    bias: Tensor

    def __init__(self, units: int, keep: bool) -> None:
        super().__init__()
        self.units, self.keep = units, keep
        count = max(1, units * units // 100)
        with torch.device("cpu"):  # also where the case is only counted, on meta tensors
            place = torch.randint(units * units, (count,)).unique()
            row, column = place // units, place % units
            rows = torch.cat((torch.zeros(1), torch.bincount(row, minlength=units).cumsum(0)))
            # A spectral radius of about 0.9: errors of rounding fade rather than grow.
            values = torch.randn(len(place)) * 0.9 / (len(place) / units) ** 0.5
            w_in, bias = torch.rand(units, 1) * 2 - 1, torch.rand(units) * 0.2 - 0.1
        self.register_buffer("values", values)
        self.register_buffer("columns", column.int())
        self.register_buffer("rows", rows.int())
        self.register_buffer("w_in", w_in)
        self.register_buffer("bias", bias)

    def matrix(self) -> Tensor:
        """W as a sparse CSR tensor."""
        size = (self.units, self.units)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls the format a beta
            return torch.sparse_csr_tensor(
                self.rows, self.columns, self.values, size, check_invariants=False
            )

    def drive(self, x: Tensor) -> Tensor:
        """What all steps receive from outside, ``[T, N, B]``: one product before the loop."""
        return (x @ self.w_in.T + self.bias).transpose(1, 2).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, 1]`` to the states, by torch's sparse product."""
        if x.device.type == "meta":
            shape = (x.shape[1], self.units)
            return x.new_empty((x.shape[0], *shape) if self.keep else shape)
        return torch_csr(self)(x)


def torch_csr(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A loop over torch's CSR product, in place wherever torch can."""
    assert isinstance(module, ReservoirLoop)
    w = module.matrix()

    def run(x: Tensor) -> Tensor:
        drive = module.drive(x)
        state = drive.new_zeros(drive.shape[1:])
        states = torch.empty_like(drive) if module.keep else None
        if x.shape[1] == 1:  # a vector: torch's matrix-vector product is the faster one
            drive, state = drive[:, :, 0], state[:, 0]
        for t in range(len(drive)):
            z = (w @ state).add_(drive[t]).tanh_()
            state = state.mul_(1 - LEAK).add_(z, alpha=LEAK)
            if states is not None:
                states[t].copy_(state.view(states[t].shape))
        if states is not None:
            return states.transpose(1, 2)
        return state.view(module.units, -1).T

    return run


def scipy_csr(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A loop over scipy's CSR product, in place wherever NumPy can."""
    import numpy as np
    import scipy.sparse

    assert isinstance(module, ReservoirLoop)
    parts = module.values.numpy(), module.columns.numpy(), module.rows.numpy()
    w = scipy.sparse.csr_matrix(parts, shape=(module.units, module.units))
    leak = np.float32(LEAK)

    def run(x: Tensor) -> Tensor:
        drive = module.drive(x).numpy()
        states = np.empty_like(drive) if module.keep else None
        if drive.shape[2] == 1:
            drive = drive[:, :, 0]
        state = np.zeros_like(drive[0])
        for t in range(len(drive)):
            z = w @ state
            z += drive[t]
            np.tanh(z, out=z)
            z *= leak
            state *= 1 - leak
            state += z
            if states is not None:
                states[t].reshape(state.shape)[...] = state
        if states is not None:
            return torch.from_numpy(states).transpose(1, 2)
        return torch.from_numpy(state).view(module.units, -1).T

    return run


def _ours(module: nn.Module) -> Callable[[Tensor], Tensor]:
    from nnarch import functional as F

    assert isinstance(module, ReservoirLoop)
    matrix = module.values, module.columns, module.rows
    packed = F.pack_reservoir(matrix) if module.values.device.type == "cpu" else None

    def run(x: Tensor) -> Tensor:
        states, last = F.reservoir_scan(
            x, matrix, module.w_in, module.bias, leak=LEAK,
            skip=0 if module.keep else len(x), packed=packed,
        )  # fmt: skip
        return states if module.keep else last

    return run


def reservoir(
    units: int, batch: int, steps: int, target: Target, *, keep: bool = False, **options: Any
) -> Case:
    """A scan of `steps` steps. A step costs the same in a shorter sequence, so large reservoirs
    have fewer than the 2,000 that small ones do."""
    return Case(
        f"reservoir_n{units}_b{batch}" + ("_states" if keep else ""),
        "reservoir",
        lambda nn: ReservoirLoop(units, keep),
        (steps, batch, 1),
        label=f"reservoir N {units}, batch {batch}, {steps} steps"
        + (", all states" if keep else ""),
        ours=_ours,
        rivals={"scipy_csr": scipy_csr, "torch_csr": torch_csr},
        flops=2 * (units * units // 100 + 2 * units) * batch * steps,
        target=target,
        **options,
    )


def reservoirs() -> Iterable[Case]:
    """Steps of reservoirs of 1 % connectivity, and sequences of which every state is kept."""
    yield reservoir(1000, 1, 2000, Target(3.5, 4.5), quick=True)
    yield reservoir(5000, 1, 200, Target(2.0, 2.5))
    yield reservoir(10000, 1, 60, Target(1.0, 1.5))
    yield reservoir(1000, 16, 500, Target(5.0, 7.0))
    yield reservoir(5000, 16, 60, Target(2.3, 3.2))
    yield reservoir(10000, 16, 20, Target(1.0, 3.0))
    yield reservoir(100, 1, 2000, Target(1.0, 4.0))
    yield reservoir(1000, 1, 2000, Target(1.0, 4.5), keep=True)
    yield reservoir(1000, 16, 500, Target(1.0, 5.0), keep=True)
