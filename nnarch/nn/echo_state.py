"""Echo-state networks: a fixed sparse reservoir, and a linear readout fitted in one go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nnarch import functional as F
from nnarch.nn.echo_state_arrays import Array, as_sequence, like
from nnarch.nn.echo_state_options import check_fit, check_network, per_input
from nnarch.nn.linear import Linear
from nnarch.nn.readout import Readout
from nnarch.nn.reservoir import Scaling, in_own_precision
from nnarch.nn.reservoir_stack import chunks, make_stack, reservoirs, run_in_chunks, run_stack


class EchoStateNetwork(nn.Module):
    """An echo-state network: reservoirs that are never trained, and a readout fitted in float64.

        network = nn.EchoStateNetwork(1, 1000, 1, leak=0.3).fit(series[:-1], series[1:])
        prediction = network.predict(other_series)
        future = network.generate(500)          # runs freely where the last call stopped

    Sequences are ``[T, features]`` or ``[T, B, features]`` (``[T]`` where there is one feature);
    NumPy in gives NumPy out. The readout is a plain linear layer ``readout`` on the states of all
    layers, so that it has ``(N + 1)·outputs`` parameters. Jaeger and Haas, 2004, Harnessing
    nonlinearity: predicting chaotic systems and saving energy in wireless communication; deep:
    Gallicchio, Micheli and Pedrelli, 2017, Deep reservoir computing.

    Args:
        inputs: I, features of the input; 0 for a network driven by its own output alone.
        units: N, neurons of a reservoir; a sequence of numbers makes a deep network, every layer
            of which reads the states of the one before.
        outputs: O, features of the output.
        connectivity, spectral_radius, leak, input_scaling, bias_scaling, activation: see
            :class:`Reservoir`.
        feedback_scaling: weights from the previous output into the (first) reservoir are uniform in
            ± this; 0 is a network without output feedback. While it is fitted, the true output is
            fed back.
        washout: steps at the start of every fitted sequence that the fit ignores.
        solver: "ridge" accumulates the Gram matrix and penalizes weights (never the bias); "lstsq"
            is least squares by an incremental QR factorization, which keeps twice the digits.
            Both keep memory bounded however long the sequence is.
        ridge: the penalty.
        noise: standard deviation of noise added to the neurons' inputs while fitting.
        input_to_readout: whether the readout reads the input (and what is fed back) too.
        bidirectional: a second stack of reservoirs reads the sequence backwards; the network then
            needs whole sequences and cannot run freely.
        seed: the same seed gives the same network.
        device, dtype: of weights and states. The fit itself is float64 always. torch.autocast
            leaves all of it alone: errors of a state go on for as long as the reservoir remembers.
    """

    def __init__(
        self,
        inputs: int,
        units: int | Sequence[int],
        outputs: int,
        *,
        connectivity: float = 0.01,
        spectral_radius: float = 0.9,
        leak: float = 1.0,
        input_scaling: Scaling = 1.0,
        bias_scaling: float = 0.0,
        feedback_scaling: float = 0.0,
        activation: str | None = "tanh",
        washout: int = 100,
        solver: Literal["ridge", "lstsq"] = "ridge",
        ridge: float = 1e-6,
        noise: float = 0.0,
        input_to_readout: bool = False,
        bidirectional: bool = False,
        seed: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (int(units),) if isinstance(units, Integral) else tuple(map(int, units))  # type: ignore[arg-type]
        check_network(inputs, sizes, outputs, washout, feedback_scaling, bidirectional)
        check_fit(solver, ridge, noise)
        self.inputs, self.outputs, self.washout = inputs, outputs, washout
        self.solver, self.ridge, self.noise, self.seed = solver, ridge, noise, seed
        self.feedback = feedback_scaling != 0
        self.input_to_readout, self.bidirectional = input_to_readout, bidirectional
        width = inputs + (outputs if self.feedback else 0)
        options: dict[str, Any] = {
            "connectivity": connectivity, "spectral_radius": spectral_radius, "leak": leak,
            "bias_scaling": bias_scaling, "activation": activation, "device": device,
            "dtype": dtype,
        }  # fmt: skip
        scaling = per_input(input_scaling, inputs)
        scaling += [feedback_scaling] * (width - inputs)
        # Seeds of layers: far apart for different networks, and different from each other.
        self.layers = make_stack(width, sizes, scaling, 1000 * seed, **options)
        self.backward_layers = None
        if bidirectional:
            self.backward_layers = make_stack(width, sizes, scaling, 1000 * seed + 500, **options)
        features = sum(sizes) * (2 if bidirectional else 1) + (width if input_to_readout else 0)
        # Not initialized there, which would draw from torch's global generator.
        readout = Linear(features, outputs, device="meta", dtype=dtype)
        self.readout = readout.to_empty(
            device=torch.get_default_device() if device is None else device
        )
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)
        self._fitted = False
        self._states: list[Tensor] | None = None
        self._output: Tensor | None = None
        self._unsaid = False  # whether generate begins with that output

    def _apply(self, fn: Any, recurse: bool = True) -> EchoStateNetwork:
        """What `.to()`, `.float()` and others do, also to where the last call stopped."""
        super()._apply(fn, recurse)
        if self._states is not None:
            self._states = [fn(s) for s in self._states]
        if self._output is not None:
            self._output = fn(self._output)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Where the last call stopped belongs to the weights that are replaced."""
        super()._load_from_state_dict(*args, **kwargs)
        self._states, self._output, self._unsaid = None, None, False

    # --------------------------------------------------------------------------------- sequences

    def _sequence(self, op: str, name: str, value: Array, width: int) -> Tensor:
        weight = self.readout.weight
        op = f"EchoStateNetwork.{op}"
        return as_sequence(op, name, value, width, device=weight.device, dtype=weight.dtype)

    def _states_before(self, op: str, batch: int, reset: bool) -> list[Tensor] | None:
        """What a sequence begins with: zeros (None), or where the last call stopped."""
        if reset or self._states is None:
            return None
        before = self._states[0].shape[0]
        if before != batch:
            raise ValueError(
                f"EchoStateNetwork.{op}: the last call had a batch of {before}, this one has "
                f"{batch}: it cannot go on from there"
            )
        return self._states

    def _features(
        self, x: Tensor, states: list[Tensor] | None, noise: float = 0.0
    ) -> Iterator[tuple[int, int, Tensor, list[Tensor]]]:
        """Chunk by chunk: its first and last step, the readout's input, the states after it."""
        runs = run_in_chunks(
            self.layers, self.backward_layers, x, states, self.readout.in_features, noise, self.seed
        )
        for first, end, kept, after in runs:
            if self.input_to_readout:
                kept = kept + [x[first:end]]
            yield first, end, kept[0] if len(kept) == 1 else torch.cat(kept, 2), after

    # --------------------------------------------------------------------------------- the public

    @in_own_precision
    @torch.no_grad()
    def fit(self, x: Array | None, y: Array, *, reset: bool = True) -> EchoStateNetwork:
        """Fit the readout to sequences.

        Args:
            x: ``[T, B, I]``, ``[T, I]`` or ``[T]``; None for a network without inputs. Rows of a
                batch are independent sequences.
            y: ``[T, B, O]``, ``[T, O]`` or ``[T]``, what the network shall say at each step.
            reset: whether it begins with a zero state rather than where the last call stopped.

        Returns:
            The network itself, which stands at the end of the sequence: :meth:`generate` goes on
            from there.

        Raises:
            ValueError: shapes that do not fit; no more steps than the washout; NaN in `y`.
        """
        x, target = self._inputs("fit", x, y, reset)
        steps = x.shape[0]
        if steps <= self.washout:
            raise ValueError(
                f"EchoStateNetwork.fit: x must have more steps than the washout, "
                f"{self.washout}; got {steps}"
            )
        if not bool(torch.isfinite(target[self.washout :]).all()):
            raise ValueError("EchoStateNetwork.fit: y must be finite after the washout")
        if x.shape[1] == 0:
            raise ValueError("EchoStateNetwork.fit: x has a batch of 0: there is nothing to fit")
        readout = Readout(self.readout.in_features, self.outputs, self.solver, self.ridge)
        states = self._states_before("fit", x.shape[1], reset)
        for first, end, features, after in self._features(x, states, self.noise):
            states = after
            skip = max(0, self.washout - first)
            if skip < end - first:
                readout.add(features[skip:], target[first + skip : end])
        weight, bias = readout.solve()
        self.readout.weight.copy_(weight)
        self.readout.bias.copy_(bias)
        self._fitted, self._states = True, states
        self._output, self._unsaid = target[-1], False
        return self

    def _inputs(
        self, op: str, x: Array | None, y: Array | None, reset: bool = True
    ) -> tuple[Tensor, Tensor]:
        """What drives the reservoir, fed-back outputs included, and the target."""
        if y is None:
            raise ValueError(f"EchoStateNetwork.{op}: y is missing")
        target = self._sequence(op, "y", y, self.outputs)
        if x is None:
            if self.inputs:
                raise ValueError(f"EchoStateNetwork.{op}: x is missing")
            u = target.new_empty((*target.shape[:2], 0))
        else:
            u = self._sequence(op, "x", x, self.inputs)
        if u.shape[:2] != target.shape[:2]:
            raise ValueError(
                f"EchoStateNetwork.{op}: x and y must have the same steps and batch, "
                f"got {tuple(u.shape[:2])} and {tuple(target.shape[:2])}"
            )
        if self.feedback:  # the output of the step before
            goes_on = self._states_before(op, target.shape[1], reset) is not None
            before = self._output if goes_on else None
            first = torch.zeros_like(target[:1]) if before is None else before[None]
            fed = torch.cat((first, target[:-1]))
            u = torch.cat((u, fed), 2)
        return u, target

    @in_own_precision
    @torch.no_grad()
    def predict(self, x: Array, *, reset: bool = True) -> Any:
        """The output at every step of a sequence.

        A network with output feedback feeds back what it says itself. Without gradients, in memory
        that does not grow with the states; :meth:`forward` has them.

        Args:
            x: ``[T, B, I]``, ``[T, I]`` or ``[T]``.
            reset: whether it begins with a zero state rather than where the last call stopped.

        Returns:
            ``[T, B, O]`` or ``[T, O]`` (``[T]`` for ``[T]`` where O is 1), of the kind of `x`.
        """
        self._require_fit("predict")
        u = self._sequence("predict", "x", x, self.inputs)
        states = self._states_before("predict", u.shape[1], reset)
        if self.feedback:
            if states is None:
                self._states = self._output = None
            y = self._free_run(u)
        else:
            y = self._read(u, states)
        return like(x, y, np.ndim(x) == 1, np.ndim(x) == 3)

    @in_own_precision
    def forward(self, x: Tensor) -> Tensor:
        """``[T, B, I]`` to ``[T, B, O]``: the readout's gradient flows, so it can be trained."""
        if self.feedback:
            raise ValueError("EchoStateNetwork: with output feedback, call predict or generate")
        return self._read(self._sequence("forward", "x", x, self.inputs), None)

    def _read(self, x: Tensor, states: list[Tensor] | None) -> Tensor:
        parts = []
        for _, _, features, after in self._features(x, states):
            states = after
            parts.append(self.readout(features))
        y = torch.cat(parts) if parts else x.new_empty((0, x.shape[1], self.outputs))
        if states is not None:
            self._states = [s.detach() for s in states]
        if len(y):
            self._output, self._unsaid = y[-1].detach(), False
        return y

    @in_own_precision
    @torch.no_grad()
    def warm_up(self, x: Array | None = None, y: Array | None = None) -> EchoStateNetwork:
        """Bring the network to the end of a sequence, from a zero state, for :meth:`generate`.

        Args:
            x: its inputs; None for a network without.
            y: its true outputs, which a network with feedback needs.
        """
        if self.feedback:
            if y is None:
                raise ValueError("EchoStateNetwork.warm_up: y is missing: its output is fed back")
            u, target = self._inputs("warm_up", x, y)
            states: list[Tensor] | None = None
            for first, end in chunks(u.shape[0], u.shape[1], self.readout.in_features):
                _, states = run_stack(self.layers, u[first:end], states, keep=False)
            self._states, self._output, self._unsaid = states, target[-1], False
        else:
            if x is None:
                raise ValueError("EchoStateNetwork.warm_up: x is missing")
            self._read(self._sequence("warm_up", "x", x, self.inputs), None)
            self._unsaid = True  # nobody has seen what it makes of the last input
        return self

    @in_own_precision
    @torch.no_grad()
    def generate(self, steps: int | None = None, x: Array | None = None) -> Any:
        """Run freely from where the last call (fit, predict, warm_up, generate) stopped.

        With feedback, the output goes on being fed back. Without, the output takes the place of the
        input, so the network must predict its own next input (``inputs == outputs``).

        Args:
            steps: T, how many; not needed where `x` has them.
            x: ``[T, B, I]`` or ``[T, I]``, the inputs of a network with feedback and inputs.

        Returns:
            ``[T, B, O]``, or ``[T, O]`` where the last call had no batch of several: NumPy, or a
            tensor where `x` is one.
        """
        self._require_fit("generate")
        if self.bidirectional:
            raise ValueError("EchoStateNetwork.generate: a bidirectional network needs the future")
        if self._states is None or self._output is None:
            raise ValueError("EchoStateNetwork.generate: call fit, predict or warm_up first")
        batch = self._output.shape[0]
        if self.feedback and self.inputs:
            if x is None:
                raise ValueError("EchoStateNetwork.generate: x is missing: the network has inputs")
            u = self._sequence("generate", "x", x, self.inputs)
            if steps not in (None, u.shape[0]) or u.shape[1] != batch:
                raise ValueError(
                    f"EchoStateNetwork.generate: x must have {steps or 'T'} steps of batch "
                    f"{batch}, got {tuple(u.shape)}"
                )
        else:
            if steps is None or steps < 0:
                raise ValueError(f"EchoStateNetwork.generate: steps must be >= 0, got {steps}")
            if not self.feedback and self.inputs != self.outputs:
                raise ValueError(
                    "EchoStateNetwork.generate: without feedback, outputs take the place of "
                    f"inputs: there must be as many, got {self.outputs} and {self.inputs}"
                )
            u = self._output.new_empty((steps, batch, 0))
        if self._unsaid and u.shape[0]:
            self._unsaid = False
            y = torch.cat((self._output[None], self._free_run(u[1:])))
        else:
            y = self._free_run(u)
        return like(x, y, False, batch > 1 or (x is not None and np.ndim(x) == 3))

    def _free_run(self, u: Tensor) -> Tensor:
        """Outputs fed back over ``u``'s steps, in native code where there is one layer."""
        layers, batch = reservoirs(self.layers), u.shape[1]
        layer = layers[0]
        if self._output is None or self._states is None:
            self._output = u.new_zeros(batch, self.outputs)
            self._states = [u.new_zeros(batch, r.units) for r in layers]
        if len(layers) == 1:
            y, last = F.reservoir_generate(
                u, self._output, layer.matrix, layer.w_in, self.readout.weight, self.readout.bias,
                layer.bias, self._states[0], leak=layer.leak, activation=layer.activation,
                packed=layer.packed(),
            )  # fmt: skip
            self._states = [last]
        else:
            y = u.new_empty((*u.shape[:2], self.outputs))
            output = self._output
            for t in range(u.shape[0]):
                step = torch.cat((u[t], output), 1)[None]
                kept, self._states = run_stack(self.layers, step, self._states)
                kept = kept + [step] if self.input_to_readout else kept
                output = y[t] = self.readout(torch.cat(kept, 2))[0]
        if u.shape[0]:
            self._output = y[-1].clone()
        return y

    def _require_fit(self, op: str) -> None:
        if not self._fitted and not bool(self.readout.weight.any()):
            raise ValueError(f"EchoStateNetwork.{op}: call fit first, or load a fitted state_dict")

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        return f"feedback={self.feedback}, washout={self.washout}, solver={self.solver!r}"
