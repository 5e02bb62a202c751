"""Recurrent layers: torch.nn's modules around whole-sequence kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from nnarch import functional as F
from nnarch.kernels.recurrent import kinds
from nnarch.nn.recurrent_weights import RecurrentWeights

_KINDS = {
    "RNN_TANH": kinds.RNN_TANH,
    "RNN_RELU": kinds.RNN_RELU,
    "LSTM": kinds.LSTM,
    "GRU": kinds.GRU,
}


class _Recurrent(RecurrentWeights, RNNBase):
    """The forward pass that the layers share: batches, packed sequences, layers, directions."""

    _run_layer: Callable[..., tuple[Tensor, ...]]

    def __init__(
        self, *args: Any, weight_storage: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._init_storage(self.weight_ih_l0, weight_storage)  # type: ignore[arg-type]

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run over whole sequences.

        Args:
            input: [T, B, I], or [B, T, I] with ``batch_first``, or [T, I], or a PackedSequence.
            hx: the state before them, as torch.nn's layer takes it; None is zeros.

        Returns:
            The outputs, laid out as the input, and the state after the last step.
        """
        if isinstance(input, PackedSequence):
            return self._run_packed(input, hx)
        batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        if not batched and input.dim() != 2:
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        states = self._states(hx)
        if any(state.dim() != input.dim() for state in states):
            raise RuntimeError(
                f"For {'batched 3' if batched else 'unbatched 2'}-D input, hx should also be "
                f"{input.dim()}-D but got {', '.join(f'{s.dim()}-D' for s in states)} tensors"
            )
        if not batched:
            input, states = input.unsqueeze(batch_dim), [s.unsqueeze(1) for s in states]
        self._check(input, states, None)
        x = input.transpose(0, 1) if self.batch_first else input
        if x.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        y, states = self._scan(x, states, None)
        if self.batch_first:
            y = y.transpose(0, 1)
        if not batched:
            y, states = y.squeeze(batch_dim), [s.squeeze(1) for s in states]
        return y, self._state(states)

    def _run_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        x, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is not None:  # a caller's states lie in his order of the sequences
            hx = self.permute_hidden(hx, sorted_indices)  # type: ignore[arg-type]
        states = self._states(hx)
        self._check(x, states, batch_sizes)
        y, states = self._scan(x, states, batch_sizes)
        state = self.permute_hidden(self._state(states), unsorted_indices)
        return PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices), state

    def _states(self, hx: Any) -> Sequence[Tensor]:
        """The given states, each [layers · directions, B, size]; none where they are zeros."""
        return () if hx is None else (hx,)

    def _state(self, states: Sequence[Tensor]) -> Any:
        """States as the layer returns them."""
        return states[0]

    def _check(self, x: Tensor, states: Sequence[Tensor], batch_sizes: Tensor | None) -> None:
        if states:
            self.check_forward_args(x, self._state(states), batch_sizes)
        else:
            self.check_input(x, batch_sizes)

    def _scan(
        self, x: Tensor, starts: Sequence[Tensor], batch_sizes: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """All layers over ``x [T, B, I]``, or the rows of a packed sequence."""
        count = len(self._all_weights)
        weights = [self._weights(k) for k in range(count)]
        options = [self._options(k) for k in range(count)]
        inputs = (x, *starts, *options[0].values())
        packed = self._packed_layers(weights, inputs, x if batch_sizes is None else batch_sizes)
        starts = [start.unbind() for start in starts]  # type: ignore[misc]
        ends: list[Sequence[Tensor]] = []
        directions = 2 if self.bidirectional else 1
        for last in range(directions - 1, count, directions):
            outputs = []
            for k in range(last + 1 - directions, last + 1):
                y, *end = self._run_layer(
                    x, weights[k], [start[k] for start in starts],
                    batch_sizes=batch_sizes, reverse=bool(k % directions), packed=packed[k],
                    **options[k],
                )  # fmt: skip
                outputs.append(y)
                ends.append(end)
            # Operations return fresh memory, so two directions are copied once to lie side by side.
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout and self.training and last + 1 < count:
                x = torch.dropout(x, self.dropout, True)
        if self.mode != "LSTM" and directions == 1 and torch.is_grad_enabled() and x.requires_grad:
            x = x.clone()  # the backward reads it: as torch.nn's, what is returned may be written
        if count == 1:
            return x, [end.unsqueeze(0) for end in ends[0]]
        return x, [torch.stack(end) for end in zip(*ends, strict=True)]

    def _weights(self, k: int) -> tuple[Tensor | None, ...]:
        """weight_ih, weight_hh, bias_ih, bias_hh and weight_hr of layer and direction `k`."""
        parameters = self._parameters
        # What is parametrized is no entry of _parameters.
        found = [parameters.get(n, None) if n in parameters else getattr(self, n)
                 for n in self._all_weights[k]]  # fmt: skip
        weight_hr = found.pop() if self.proj_size else None
        biases = found[2:] if self.bias else (None, None)
        return (*found[:2], *biases, weight_hr)

    def _options(self, k: int) -> dict[str, Any]:
        """Further arguments of layer and direction `k`."""
        return {}

    def _packed_layers(
        self,
        weights: list[tuple[Tensor | None, ...]],
        inputs: tuple[Any, ...],
        steps: Tensor | None,
    ) -> Sequence[Tensor | None]:
        """The packed weights of every layer and direction.

        Args:
            weights: of each.
            inputs: what else of the call may want a gradient.
            steps: x as [T, B, I], or how many sequences last to each step; None for any.
        """
        packable = tuple(w[i] for w in weights for i in (0, 1, 4) if w[i] is not None)
        cache = self._packed_weights(packable, inputs)
        if cache is None:
            return (None,) * len(weights)
        rows = 1
        if steps is not None and steps.numel() > 0:
            rows = steps.shape[1] if steps.dim() == 3 else int(steps[0])
        kind, count = _KINDS[self.mode], len(weights)
        return [
            self._packed_form(cache, k, count, rows, (ih, hh, hr), kind)  # type: ignore[arg-type]
            for k, (ih, hh, _, _, hr) in enumerate(weights)
        ]

    def _pack_now(self) -> None:
        self._packed_layers([self._weights(k) for k in range(len(self._all_weights))], (), None)

    def __getstate__(self) -> dict[str, Any]:
        state = RNNBase.__getstate__(self)
        state.pop("_packed", None)
        return state

    def extra_repr(self) -> str:
        """torch.nn's, with the options that it lacks."""
        return super().extra_repr() + self._storage_repr()


class RNN(_Recurrent, torch.nn.RNN):
    """Elman layers with the constructor, parameters and state_dict of torch.nn.RNN.

    Args:
        input_size, hidden_size: features of the input and of the state.
        num_layers: layers, each on the outputs of the one before.
        nonlinearity: "tanh" or "relu".
        bias: whether to add two learned biases.
        batch_first: whether inputs and outputs are [B, T, …] instead of [T, B, …].
        dropout: probability of a zero between layers, in training.
        bidirectional: whether to run from both ends, outputs side by side.
        device, dtype: of the parameters; float16, bfloat16, float32 or float64.
        weight_storage: torch.bfloat16 keeps the packed weights of the state, which eval mode uses
            where no gradient is wanted, in half the bytes: faster where reading them bounds a step
            (small batches), with the accuracy of bfloat16 weights. The parameters stay float32.

    Raises:
        ValueError: an argument that torch.nn.RNN refuses, or a dtype without kernels.
    """

    def _run_layer(
        self, x: Tensor, weights: Any, starts: Sequence[Tensor], **options: Any
    ) -> tuple[Tensor, ...]:
        h0 = starts[0] if starts else None
        return F.rnn_layer(x, *weights[:4], h0=h0, nonlinearity=self.nonlinearity, **options)


class GRU(_Recurrent, torch.nn.GRU):
    """Gated recurrent units with the constructor, parameters and state_dict of torch.nn.GRU.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype, weight_storage: as :class:`RNN` has them.

    Raises:
        ValueError: an argument that torch.nn.GRU refuses, or a dtype without kernels.

    Source: Cho and others, 2014, Learning Phrase Representations using RNN Encoder-Decoder.
    """

    def _run_layer(
        self, x: Tensor, weights: Any, starts: Sequence[Tensor], **options: Any
    ) -> tuple[Tensor, ...]:
        return F.gru_layer(x, *weights[:4], h0=starts[0] if starts else None, **options)


class LSTM(_Recurrent, torch.nn.LSTM):
    """Long short-term memory with the constructor, parameters and state_dict of torch.nn.LSTM.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device,
            dtype, weight_storage: as :class:`RNN` has them.
        proj_size: size of the output where it is a projection of the state; 0 is none.
        peephole: whether gates see the cell, through ``weight_peephole_l{k} [3, hidden_size]`` (of
            the gates i, f, o), which torch.nn has not.

    Raises:
        ValueError: an argument that torch.nn.LSTM refuses, or a dtype without kernels.

    Source: Hochreiter and Schmidhuber, 1997, Long Short-Term Memory; Gers and Schmidhuber, 2000,
    Recurrent Nets that Time and Count; Sak and others, 2014, Long Short-Term Memory Based
    Recurrent Neural Network Architectures.
    """

    peephole = False

    def __init__(self, *args: Any, peephole: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if peephole:
            self.peephole = True
            self._add_parameters("weight_peephole", (3, self.hidden_size))
            self.reset_parameters()

    def _add_parameters(self, name: str, shape: tuple[int, ...]) -> None:
        """A parameter for every layer and direction, named as torch.nn names them."""
        like: Any = self.weight_ih_l0
        for k in range(len(self._all_weights)):
            value = torch.empty(shape, dtype=like.dtype, device=like.device)
            self.register_parameter(name + self._suffix(k), torch.nn.Parameter(value))

    def _suffix(self, k: int) -> str:
        """What follows the names of layer and direction `k`: "_l0", "_l0_reverse", "_l1", …"""
        return self._all_weights[k][0].removeprefix("weight_ih")

    def _options(self, k: int) -> dict[str, Any]:
        if not self.peephole:
            return {}
        return {"peephole": getattr(self, "weight_peephole" + self._suffix(k))}

    def _run_layer(
        self, x: Tensor, weights: Any, starts: Sequence[Tensor], **options: Any
    ) -> tuple[Tensor, ...]:
        h0, c0 = starts or (None, None)
        return F.lstm_layer(x, *weights[:4], h0=h0, c0=c0, weight_hr=weights[4], **options)

    def _states(self, hx: Any) -> Sequence[Tensor]:
        return () if hx is None else tuple(hx)

    def _state(self, states: Sequence[Tensor]) -> Any:
        return tuple(states)

    def extra_repr(self) -> str:
        """torch.nn.LSTM's, with the options that it lacks."""
        return super().extra_repr() + (", peephole=True" if self.peephole else "")


class LayerNormLSTM(LSTM):
    """An LSTM with layer normalization inside its steps, which torch.nn has not.

    ``W_ih·x`` and ``W_hh·h`` are normalized over all four gates before they are added, the new cell
    on its way into the output. Gains start at one, the other new parameters at zero.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype, weight_storage, peephole: as :class:`LSTM` has them. Biases are added
            after normalization.
        eps: added to variances.

    Attributes:
        norm_ih_weight_l[k], norm_ih_bias_l[k]: [4 · hidden_size], of the input's product.
        norm_hh_weight_l[k], norm_hh_bias_l[k]: [4 · hidden_size], of the state's product.
        norm_c_weight_l[k], norm_c_bias_l[k]: [hidden_size], of the cell.

    Raises:
        ValueError: an argument that torch.nn.LSTM refuses, or a dtype without kernels.

    Source: Ba, Kiros and Hinton, 2016, Layer Normalization, equations 20 to 22.
    """

    _makes_pairs = False  # both products are normalized apart

    def __init__(self, *args: Any, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps
        for name in _NORMS:
            gates = 1 if name.startswith("norm_c") else 4
            self._add_parameters(name, (gates * self.hidden_size,))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform weights and biases as torch.nn's; gains one, and no shift."""
        super().reset_parameters()
        for name, parameter in self.named_parameters():
            if name.startswith("norm"):
                torch.nn.init.constant_(parameter, float("weight" in name))

    def _options(self, k: int) -> dict[str, Any]:
        suffix = self._suffix(k)
        rows = torch.cat([getattr(self, name + suffix) for name in _NORMS])
        norm = rows.view(kinds.NORM_ROWS, self.hidden_size)
        return {**super()._options(k), "norm": norm, "eps": self.eps}

    def extra_repr(self) -> str:
        """torch.nn.LSTM's, with the options that it lacks."""
        return super().extra_repr() + (f", eps={self.eps}" if self.eps != 1e-5 else "")


# In the order of the operation's `norm`.
_NORMS = (
    "norm_ih_weight",
    "norm_ih_bias",
    "norm_hh_weight",
    "norm_hh_bias",
    "norm_c_weight",
    "norm_c_bias",
)
