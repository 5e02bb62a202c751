"""Recurrent layers on the GPU: which algorithm runs a scan, and the gradients of its weights.

In this order, the first that fits:

1. `small`: the state's weights fit one program, which runs all steps of its sequences
   (triton_small.py).
2. `persistent`: few sequences and weights that fit the GPU's shared memory together; a Numba kernel
   with one grid barrier a step (numba_scan.py). Forward only.
3. `step`: a Triton kernel a step, or one cooperative launch of all (triton_step.py).
4. `unfused`: layer normalization, whose sums run over all units (triton_norm.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import library
from nnarch.kernels.gpu.launch import check_dtype, device_guard

from . import kinds
from .gpu_problem import (
    Outputs,
    Sequence,
    StateGradients,
    both_biases,
    input_product,
    multiply,
    new_outputs,
)
from .numba_scan import fits_persistent, persistent_forward
from .triton_norm import NormGradients, norm_backward, norm_forward, norm_weight_gradient
from .triton_small import fits_small, small_backward, small_forward
from .triton_step import step_backward, step_forward


def recurrent_scan(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    norm: Tensor | None,
    batch_sizes: Tensor | None,
    packed: Tensor | None,
    kind: int,
    reverse: bool,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nnarch::recurrent_scan on a GPU; `packed` is a CPU matter and not read."""
    check_dtype("recurrent_scan", x)
    sequence = Sequence.of(x, batch_sizes)
    out = new_outputs(x, weight_ih, weight_hh, norm, kind, sequence, save)
    with device_guard(x):
        if sequence.rows == 0 or weight_hh.numel() == 0:
            return _nothing_to_do(out, h0, c0)
        if norm is not None:
            library.ran.algorithm = "unfused"
            norm_forward(
                x.reshape(sequence.rows, x.shape[-1]), h0, c0, weight_ih, weight_hh,
                both_biases(bias_ih, bias_hh), weight_hr, peephole, norm, sequence, out, reverse,
                eps,
            )  # fmt: skip
            return out.y, out.h, out.c, out.reserve
        gx, bias_n = input_product(
            x.reshape(sequence.rows, x.shape[-1]), weight_ih, bias_ih, bias_hh, kind
        )
        if fits_small(kind, x, weight_hh, sequence):
            scan, library.ran.algorithm = small_forward, "small"
        elif fits_persistent(kind, x, weight_hh, weight_hr, sequence):
            scan, library.ran.algorithm = persistent_forward, "persistent"
        else:
            scan, library.ran.algorithm = step_forward, "step"
        scan(gx, h0, c0, weight_hh, bias_n, weight_hr, peephole, sequence, out, kind, reverse)
    return out.y, out.h, out.c, out.reserve


def _nothing_to_do(
    out: Outputs, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """No rows, or no units: the states are what they were."""
    for state, initial in ((out.h, h0), (out.c, c0)):
        if initial is None:
            state.zero_()
        else:
            state.copy_(initial)
    return out.y.zero_(), out.h, out.c, out.reserve


def recurrent_scan_backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    norm: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    kind: int,
    reverse: bool,
    eps: float,
    wanted: int,
) -> tuple[Tensor, ...]:
    """nnarch::recurrent_scan_backward on a GPU."""
    check_dtype("recurrent_scan_backward", x)
    inputs = [x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm]
    sequence = Sequence.of(x, batch_sizes)
    with device_guard(x):
        if sequence.rows == 0 or weight_hh.numel() == 0:
            found = _untouched_gradients(inputs, grad_h, grad_c)
        else:
            flat_y = y.reshape(sequence.rows, weight_hh.shape[1])
            given = (grad_y, grad_h, grad_c, h0, c0, weight_hh, weight_hr, peephole)
            normalized = None
            if norm is not None:
                library.ran.algorithm = "unfused"
                state, normalized = norm_backward(
                    *given, norm, flat_y, reserve, sequence, reverse, eps
                )
            else:
                small = fits_small(kind, x, weight_hh, sequence)
                library.ran.algorithm = "small" if small else "step"
                scan = small_backward if small else step_backward
                state = scan(*given, flat_y, reserve, sequence, kind, reverse)
            found = _weight_gradients(
                inputs, flat_y, reserve, state, sequence, kind, reverse, eps, wanted, normalized
            )
    return tuple(
        g if g is not None and t is not None and wanted >> bit & 1 else x.new_empty(0)
        for bit, (t, g) in enumerate(zip(inputs, found, strict=True))
    )


def recurrent_cell(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    packed: Tensor | None,
    kind: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """nnarch::recurrent_cell on a GPU: a scan of one step."""
    check_dtype("recurrent_cell", x)
    y, _, c, reserve = recurrent_scan(
        x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, None, None, None, None, packed, kind,
        False, 0.0, save,
    )  # fmt: skip
    return y, c, reserve


def recurrent_cell_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """nnarch::recurrent_cell_backward on a GPU."""
    check_dtype("recurrent_cell_backward", rest[0])
    *inputs, after, reserve, kind, wanted = rest
    run: Any = recurrent_scan_backward  # no type checker counts what a star stands for
    return run(
        grad_h, None, grad_c, *inputs, None, None, None, None, after, reserve, kind, False, 0.0,
        wanted,
    )[:7]  # fmt: skip


def _untouched_gradients(
    inputs: list[Tensor | None], grad_h: Tensor | None, grad_c: Tensor | None
) -> list[Tensor | None]:
    """No rows, or no units: what came for the last states is the first states' gradient."""
    found = [None if t is None else torch.zeros_like(t) for t in inputs]
    for bit, grad in ((1, grad_h), (2, grad_c)):
        gradient = found[bit]
        if grad is not None and gradient is not None:
            gradient.copy_(grad)
    return found


def _weight_gradients(
    inputs: list[Tensor | None],
    y: Tensor,
    reserve: Tensor,
    state: StateGradients,
    sequence: Sequence,
    kind: int,
    reverse: bool,
    eps: float,
    wanted: int,
    normalized: NormGradients | None,
) -> list[Tensor | None]:
    """The gradient of every input, from those of the products: None where it is not wanted."""
    x, h0, c0, weight_ih, weight_hh, _, _, weight_hr, _, norm = inputs
    assert x is not None and weight_ih is not None and weight_hh is not None
    rows = x.reshape(sequence.rows, x.shape[-1])
    found: list[Tensor | None] = [None] * 10
    want = [wanted >> bit & 1 and t is not None for bit, t in enumerate(inputs)]
    if want[0]:
        found[0] = multiply(state.dgx, weight_ih.t(), torch.empty_like(rows)).view(x.shape)
    found[1], found[2] = state.dh0, state.dc0
    if want[3]:
        found[3] = multiply(state.dgx.t(), rows.t(), x.new_empty(weight_ih.shape))
    if want[4]:
        before = _states_before(y, h0, sequence, reverse)
        found[4] = multiply(state.dgh.t(), before.t(), x.new_empty(weight_hh.shape))
    of_gates = state.dgx if normalized is None else normalized.gates
    if want[5]:
        found[5] = of_gates.sum(0)
    if want[6]:
        found[6] = (state.dgh if normalized is None else of_gates).sum(0)
    hidden = weight_hh.shape[0] // kinds.GATES[kind]
    if want[7]:
        assert state.dy is not None and weight_hr is not None
        seen = reserve[:, 4 * hidden : 5 * hidden]
        if norm is not None:
            seen = torch.nn.functional.layer_norm(seen, (hidden,), norm[16], norm[17], eps)
        full = reserve[:, 3 * hidden : 4 * hidden] * seen.tanh()
        found[7] = multiply(state.dy.t(), full.t(), x.new_empty(weight_hr.shape))
    if want[8]:
        cells = reserve[:, 4 * hidden : 5 * hidden]
        seen = _states_before(cells, c0, sequence, reverse)
        sums = [
            (of_gates[:, k * hidden : (k + 1) * hidden].float() * c.float()).sum(0)
            for k, c in ((0, seen), (1, seen), (3, cells))
        ]
        found[8] = torch.stack(sums).to(x.dtype)
    if want[9] and normalized is not None:
        found[9] = norm_weight_gradient(normalized, reserve, eps)
    return found


def _states_before(
    states: Tensor, initial: Tensor | None, sequence: Sequence, reverse: bool
) -> Tensor:
    """For each row, the state that its step began with: [rows, ·]."""
    if initial is None:
        initial = states.new_zeros((sequence.batch, states.shape[1]))
    if sequence.batch_sizes is not None:
        return torch.cat([initial, states])[sequence.previous_rows(reverse, states)]
    if reverse:
        return torch.cat([states[sequence.batch :], initial])
    return torch.cat([initial, states[: sequence.rows - sequence.batch]])
