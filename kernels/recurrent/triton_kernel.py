"""The shapes that the Triton kernels of recurrent layers are meant for, to compile elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nnarch.kernels.gpu.static import StaticCase, meta

from . import kinds
from .gpu_problem import Sequence, new_outputs
from .triton_norm import cell, norm_backward
from .triton_small import small_backward, small_forward
from .triton_step import step_backward, step_forward

__all__ = ["STATIC_CASES"]


def _forward(scan: Callable[..., None], kind: int, steps: int, batch: int, hidden: int):
    def run(dtype: torch.dtype) -> None:
        x = meta(steps, batch, hidden, dtype=dtype)
        weight = meta(kinds.GATES[kind] * hidden, hidden, dtype=dtype)
        sequence = Sequence.of(x, None)
        out = new_outputs(x, weight, weight, None, kind, sequence, True)
        gx = meta(sequence.rows, weight.shape[0], dtype=dtype)
        state = meta(batch, hidden, dtype=dtype)
        bias_n = meta(hidden, dtype=dtype)
        scan(gx, state, state, weight, bias_n, None, None, sequence, out, kind, False)

    return run


def _backward(scan: Callable[..., object], kind: int, steps: int, batch: int, hidden: int):
    def run(dtype: torch.dtype) -> None:
        x = meta(steps, batch, hidden, dtype=dtype)
        weight = meta(kinds.GATES[kind] * hidden, hidden, dtype=dtype)
        sequence = Sequence.of(x, None)
        state = meta(batch, hidden, dtype=dtype)
        rows: Tensor = meta(sequence.rows, hidden, dtype=dtype)
        width = kinds.reserve_width(kind, False) * hidden
        reserve = meta(sequence.rows, width, dtype=dtype)
        scan(
            rows, state, state, None, None, weight, None, None, rows, reserve, sequence, kind,
            False,
        )  # fmt: skip

    return run


def _case(
    name: str, kind: int, steps: int, batch: int, hidden: int, only: str = "", shared_bytes: int = 0
) -> StaticCase:
    small, backward = name.startswith("small"), name.endswith("backward")
    scan = (small_forward, step_forward, small_backward, step_backward)[2 * backward + (not small)]
    gates = kinds.GATES[kind]
    a_row = gates + 1 + kinds.reserve_width(kind, False)  # gx, y, reserve, or their gradients
    if backward and kind != kinds.LSTM:
        a_row += 1 + (gates if kind == kinds.GRU else 0)  # y; the state's gates beside the input's
    return StaticCase(
        f"{kinds.NAMES[kind]} {name} T{steps} B{batch} H{hidden}",
        (_backward if backward else _forward)(scan, kind, steps, batch, hidden),
        flops=2.0 * steps * batch * gates * hidden * hidden,
        elements=hidden * (steps * batch * a_row + 3 * batch + gates * hidden),
        matrix=True,
        only=only,
        shared_bytes=shared_bytes,
    )


def _projected_backward(steps: int, batch: int, hidden: int, size: int) -> StaticCase:
    """An LSTM with a projection, whose sizes are no multiples of 16: so ptxas 12.8 failed."""

    def run(dtype: torch.dtype) -> None:
        x = meta(steps, batch, size, dtype=dtype)
        weight, projection = meta(4 * hidden, size, dtype=dtype), meta(size, hidden, dtype=dtype)
        sequence = Sequence.of(x, None)
        rows, reserve = (meta(sequence.rows, n, dtype=dtype) for n in (size, 5 * hidden))
        h, c = meta(batch, size, dtype=dtype), meta(batch, hidden, dtype=dtype)
        small_backward(
            rows, h, c, None, None, weight, projection, None, rows, reserve, sequence, kinds.LSTM,
            False,
        )  # fmt: skip

    return StaticCase(
        f"lstm projected small backward T{steps} B{batch} H{hidden} P{size}",
        run,
        flops=2.0 * steps * batch * 5 * hidden * size,
        elements=steps * batch * (9 * hidden + 2 * size) + batch * (size + hidden),
        matrix=True,
        only="float16",
    )


def _normalized(backward: bool, batch: int, hidden: int) -> StaticCase:
    """The cell alone, a step: its products are the linear layer's."""

    def run(dtype: torch.dtype) -> None:
        x = meta(1, batch, hidden, dtype=dtype)
        weight, norm = meta(4 * hidden, hidden, dtype=dtype), meta(18, hidden, dtype=dtype)
        sequence = Sequence.of(x, None)
        out = new_outputs(x, weight, weight, norm, kinds.LSTM, sequence, True)
        rows, state = x[0], meta(batch, hidden, dtype=dtype)
        if backward:
            y = out.states[:batch]
            norm_backward(
                rows, state, state, None, None, weight, None, None, norm, y, out.reserve, sequence,
                False, 1e-5,
            )  # fmt: skip
        else:
            gates, c = (
                meta(batch, 4 * hidden, dtype=dtype),
                meta(batch, hidden, dtype=torch.float32),
            )
            cell(gates, gates.clone(), None, None, norm, c, out.states, out.reserve, 1e-5)

    # Forward: two products read, y, 13 rows of reserve, c there and back in float32.
    a_row = 8 + 1 + 13 if not backward else 1 + 13 + 12 + 1
    name = "backward" if backward else "forward"
    return StaticCase(
        f"lstm normalized cell {name} B{batch} H{hidden}",
        run,
        flops=60.0 * batch * hidden,
        elements=float(a_row * batch * hidden),
        fixed_bytes=8.0 * batch * hidden,
    )


STATIC_CASES = [
    _case("small forward", kinds.LSTM, 64, 4096, 64),
    _case("small forward", kinds.GRU, 64, 4096, 64),
    _case("small forward", kinds.RNN_TANH, 64, 4096, 128),
    _case("small forward", kinds.LSTM, 64, 2048, 128, "float16", 128 * 1024),
    _case("small backward", kinds.LSTM, 64, 4096, 64),
    _case("small backward", kinds.GRU, 64, 4096, 64),
    _case("small backward", kinds.RNN_TANH, 64, 4096, 128),
    _case("small backward", kinds.LSTM, 64, 2048, 128, "float16", 128 * 1024),
    _projected_backward(63, 4090, 50, 30),
    _case("step forward", kinds.LSTM, 1, 512, 1024),
    _case("step forward", kinds.LSTM, 8, 256, 832, "float16"),  # one launch, a barrier a step
    _case("step forward", kinds.GRU, 1, 512, 1024),
    _case("step forward", kinds.RNN_RELU, 1, 512, 1024),
    _case("step backward", kinds.LSTM, 1, 512, 1024),
    _case("step backward", kinds.LSTM, 8, 256, 832, "float16"),
    _case("step backward", kinds.GRU, 1, 512, 1024),
    _case("step backward", kinds.RNN_RELU, 1, 512, 1024),
    _normalized(False, 4096, 512),
    _normalized(True, 4096, 512),
]
"""What bench/static_gpu.py compiles. The input's product is the linear layer's, compiled there."""
