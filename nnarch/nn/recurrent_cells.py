"""Recurrent cells: one step a call, for loops that a program writes itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase

from nnarch import functional as F
from nnarch.kernels.recurrent import kinds
from nnarch.nn.recurrent import RecurrentWeights


class _Cell(RecurrentWeights, RNNCellBase):
    """What the cells share."""

    def __init__(
        self, *args: Any, weight_storage: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_storage(self.weight_ih, weight_storage)

    def _kind(self) -> int:
        """The cell's code."""
        raise NotImplementedError

    def _arguments(self, x: Tensor, *states: Tensor | None) -> tuple[tuple, Tensor | None]:
        """Weights and biases, and the packed weights for a call with these inputs."""
        # Past nn.Module.__getattr__; what is parametrized is no entry of _parameters.
        parameters = self._parameters
        weight_ih, weight_hh = parameters.get("weight_ih"), parameters.get("weight_hh")
        weight_ih = self.weight_ih if weight_ih is None else weight_ih
        weight_hh = self.weight_hh if weight_hh is None else weight_hh
        packed = None
        cache = self._packed_weights((weight_ih, weight_hh), (x, *states))
        if cache is not None:
            packed = cache.get(0, self._pack_recurrent, weight_ih, weight_hh, None, self._kind())
        return (weight_ih, weight_hh, self.bias_ih, self.bias_hh), packed

    def _pack_now(self) -> None:
        self._arguments(self.weight_ih.new_empty(0))

    def _check_dims(self, *tensors: tuple[str, Tensor]) -> bool:
        """Whether there is a batch; ValueError for other than one or two dimensions."""
        for name, tensor in tensors:
            if tensor.dim() not in (1, 2):
                raise ValueError(
                    f"{type(self).__name__}: Expected {name} to be 1D or 2D, got "
                    f"{tensor.dim()}D instead"
                )
        return tensors[0][1].dim() == 2

    def _one_state(self, step: Any, x: Tensor, h: Tensor | None, **options: Any) -> Tensor:
        """A step of a cell whose state is h alone."""
        named = [("input", x)] if h is None else [("input", x), ("hidden", h)]
        batched = self._check_dims(*named)
        if not batched:
            x, h = x.unsqueeze(0), None if h is None else h.unsqueeze(0)
        weights, packed = self._arguments(x, h)
        y = step(x, *weights, h0=h, packed=packed, **options)[0]
        return y if batched else y.squeeze(0)

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
        return self._one_state(F.rnn_layer, input, hx, nonlinearity=self.nonlinearity)


class GRUCell(_Cell, torch.nn.GRUCell):
    """One step of a GRU, with everything that torch.nn.GRUCell has.

    Args:
        input_size, hidden_size, bias, device, dtype, weight_storage: as :class:`RNNCell` has them.

    Raises:
        ValueError: a dtype without kernels.
    """

    def _kind(self) -> int:
        return kinds.GRU

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The state [B, H] after ``input [B, I]`` and the state `hx`; or [H], [I]."""
        return self._one_state(F.gru_layer, input, hx)


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
        named = [("input", input)]
        if h is not None and c is not None:
            named += [("hx[0]", h), ("hx[1]", c)]
        x, batched = input, self._check_dims(*named)
        if not batched:
            x = x.unsqueeze(0)
            h, c = (None if t is None else t.unsqueeze(0) for t in (h, c))
        weights, packed = self._arguments(x, h, c)
        h, _, c = F.lstm_layer(x, *weights, h0=h, c0=c, packed=packed)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))
