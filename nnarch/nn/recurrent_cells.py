"""Recurrent cells: one step a call, for loops that a program writes itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase

from nnarch.kernels.recurrent import kinds
from nnarch.kernels.recurrent.cells import recurrent_cell
from nnarch.nn.recurrent_weights import RecurrentWeights


class _Cell(RecurrentWeights, RNNCellBase):
    """What the cells share."""

    def __init__(
        self,
        *args: Any,
        device: Any = None,
        weight_storage: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        # Named for torch.nn.utils.skip_init, which asks the signature for it.
        if device is not None:
            kwargs["device"] = device
        super().__init__(*args, **kwargs)
        self._init_storage(self.weight_ih, weight_storage)

    def _kind(self) -> int:
        """The cell's code."""
        raise NotImplementedError

    def _pack_now(self) -> None:
        self._packed_for(self.weight_ih, self.weight_hh, (), 1)

    def _packed_for(
        self, weight_ih: Tensor, weight_hh: Tensor, inputs: tuple[Any, ...], rows: int
    ) -> Tensor | None:
        """The packed weights for a call with these inputs, of so many `rows`."""
        cache = self._packed_weights((weight_ih, weight_hh), inputs)
        if cache is None:
            return None
        return self._packed_form(cache, 0, 1, rows, (weight_ih, weight_hh, None), self._kind())

    def _step(self, x: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step of a batch."""
        p: dict[str, Any] = self._parameters  # past nn.Module.__getattr__, 0.4 µs each
        try:
            weight_ih, weight_hh, bias_ih, bias_hh = (
                p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"],
            )  # fmt: skip
        except KeyError:  # what is parametrized is no parameter
            weight_ih, weight_hh = self.weight_ih, self.weight_hh
            bias_ih, bias_hh = self.bias_ih, self.bias_hh
        packed = None
        if not self.training:
            packed = self._packed_for(weight_ih, weight_hh, (x, h, c), x.shape[0])
        return recurrent_cell(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, packed, self._kind())

    def _check_dims(self, *tensors: tuple[str, Tensor | None]) -> None:
        """ValueError for other than one or two dimensions."""
        for name, tensor in tensors:
            if tensor is not None and tensor.dim() not in (1, 2):
                raise ValueError(
                    f"{type(self).__name__}: Expected {name} to be 1D or 2D, got "
                    f"{tensor.dim()}D instead"
                )

    def _one_state(self, x: Tensor, h: Tensor | None) -> Tensor:
        """A step of a cell whose state is h alone."""
        if x.dim() == 2 and (h is None or h.dim() == 2):
            return self._step(x, h, None)[0]
        self._check_dims(("input", x), ("hidden", h))
        if x.dim() == 2:
            return self._step(x, h, None)[0]
        h = None if h is None else h.unsqueeze(0)
        return self._step(x.unsqueeze(0), h, None)[0].squeeze(0)

    def extra_repr(self) -> str:
        """torch.nn's, with the option that it lacks."""
        return super().extra_repr() + self._storage_repr()


class RNNCell(_Cell, torch.nn.RNNCell):
    """One step of an Elman network, with everything that torch.nn.RNNCell has.

    Args:
        input_size, hidden_size: features of the input and of the state.
        bias: whether to add two learned biases.
        nonlinearity: "tanh" or "relu".
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.
        weight_storage: as :class:`nnarch.nn.RNN` has it.

    Raises:
        ValueError: a dtype without kernels.
    """

    def _kind(self) -> int:
        return kinds.RNN_RELU if self.nonlinearity == "relu" else kinds.RNN_TANH

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The state [B, H] after ``input [B, I]`` and the state `hx`; or [H], [I]."""
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._one_state(input, hx)


class GRUCell(_Cell, torch.nn.GRUCell):
    """One step of a GRU, with everything that torch.nn.GRUCell has.

    The state is kept for the backward pass: where a gradient is wanted, ``h = h * mask`` rather
    than ``h *= mask``, which raises in the backward. The same holds for LSTMCell and RNNCell.

    Args:
        input_size, hidden_size, bias, device, dtype, weight_storage: as :class:`RNNCell` has them.

    Raises:
        ValueError: a dtype without kernels.
    """

    def _kind(self) -> int:
        return kinds.GRU

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The state [B, H] after ``input [B, I]`` and the state `hx`; or [H], [I]."""
        return self._one_state(input, hx)


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """One step of an LSTM, with everything that torch.nn.LSTMCell has.

    Args:
        input_size, hidden_size, bias, device, dtype, weight_storage: as :class:`RNNCell` has them.

    Raises:
        ValueError: a dtype without kernels.
    """

    def _kind(self) -> int:
        return kinds.LSTM

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """h and c [B, H] after ``input [B, I]`` and the state ``hx = (h, c)``; or [H], [I]."""
        h, c = (None, None) if hx is None else hx
        if input.dim() == 2 and (h is None or h.dim() == 2) and (c is None or c.dim() == 2):
            return self._step(input, h, c)
        self._check_dims(("input", input), ("hx[0]", h), ("hx[1]", c))
        if input.dim() == 2:
            return self._step(input, h, c)
        h, c = (None if t is None else t.unsqueeze(0) for t in (h, c))
        h, c = self._step(input.unsqueeze(0), h, c)
        return h.squeeze(0), c.squeeze(0)
