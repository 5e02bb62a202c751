"""The definition of a sparse reservoir in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from nnarch.kernels.activation import reference as activations


class _Matrix:
    """Compressed rows, as a product with states. Entries of one place add up."""

    def __init__(self, values: Tensor, columns: Tensor, rows: Tensor) -> None:
        self.size, self.values, self.columns = rows.numel() - 1, values, columns.long()
        lengths = rows[1:].long() - rows[:-1].long()
        self.row = torch.repeat_interleave(torch.arange(self.size, device=rows.device), lengths)

    def times(self, state: Tensor) -> Tensor:
        """W·s for every batch row; what is not connected is not touched, NaN included."""
        products = self.values * state[:, self.columns]
        return state.new_zeros(len(state), self.size).index_add(1, self.row, products)


def _step(state: Tensor, z: Tensor, w: _Matrix, leak: float, activation: int) -> Tensor:
    response = activations.activation(z + w.times(state), activation, 0.0)
    return (1 - leak) * state + leak * response


def reservoir_pack(values: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Nothing to do: the definition reads the matrix as it is."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.new_empty(0, dtype=dtype)


def reservoir_scan(
    x: Tensor,
    w_in: Tensor | None,
    bias: Tensor | None,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    packed: Tensor | None,
    state0: Tensor,
    leak: float,
    activation: int,
    skip: int,
) -> tuple[Tensor, Tensor]:
    """s = (1 - leak)·s + leak·f(W·s + w_in·x + bias): the states after `skip` steps, the last."""
    w, state, kept = _Matrix(values, columns, rows), state0, []
    for t, u in enumerate(x):
        z = u if w_in is None else u @ w_in.T
        state = _step(state, z if bias is None else z + bias, w, leak, activation)
        if t >= skip:
            kept.append(state)
    states = torch.stack(kept) if kept else x.new_empty((0, *state0.shape))
    return states, state.clone()


def reservoir_generate(
    x: Tensor,
    y0: Tensor,
    w_in: Tensor,
    bias: Tensor | None,
    values: Tensor,
    columns: Tensor,
    rows: Tensor,
    packed: Tensor | None,
    state0: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    leak: float,
    activation: int,
) -> tuple[Tensor, Tensor]:
    """The same with [x, y] as input, where y = w_out·[s, x, y] + b_out is the step before's."""
    w, state, y, outputs = _Matrix(values, columns, rows), state0, y0, []
    for u in x:
        u = torch.cat((u, y), 1)
        z = u @ w_in.T
        state = _step(state, z if bias is None else z + bias, w, leak, activation)
        features = state if w_out.shape[1] == state.shape[1] else torch.cat((state, u), 1)
        y = features @ w_out.T
        y = y if b_out is None else y + b_out
        outputs.append(y)
    ys = torch.stack(outputs) if outputs else x.new_empty((0, *y0.shape))
    return ys, state.clone()
