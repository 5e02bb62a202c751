"""The recurrent layers that are measured; a part of :mod:`nnarch.benchmarking.cases`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

from nnarch.benchmarking.case import Case, Target

# Gates, and the class of torch.nn.
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
_LENGTHS = tuple(20 + 81 * i // 32 for i in range(32))[::-1]  # U[20, 100], sorted


class Sequences(nn.Module):
    """A recurrent layer of a namespace on [T, B, H]; its output alone.

    Args:
        namespace: ``torch.nn`` or another with the same layers.
        kind: "LSTM", "GRU" or "RNN".
        hidden: the size of input and state.
        layers: one on another.
        lengths: of the sequences, falling, where they are packed.
    """

    def __init__(
        self, namespace: Any, kind: str, hidden: int, layers: int = 1, lengths: Any = None
    ) -> None:
        super().__init__()
        self.layer = getattr(namespace, kind)(hidden, hidden, layers)
        self.lengths = lengths

    def forward(self, x: Tensor) -> Tensor:
        """[T, B, H], or the rows that belong to a sequence."""
        if self.lengths is None:
            return self.layer(x)[0]
        return self.layer(_packed(x, self.lengths))[0].data


def _packed(x: Tensor, lengths: Any) -> rnn.PackedSequence:
    return rnn.pack_padded_sequence(x, torch.tensor(lengths, device="cpu"))


def _by_function(batch: int, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The layers by their functions, from the parameters of torch's module; as nnarch.nn's modules
    do, weights are packed for steps of `batch` sequences."""
    from nnarch import functional
    from nnarch.kernels.recurrent import kinds

    assert isinstance(module, Sequences)
    layer, lengths = module.layer, module.lengths
    function, kind = {
        "LSTM": (functional.lstm_layer, kinds.LSTM),
        "GRU": (functional.gru_layer, kinds.GRU),
        "RNN_TANH": (functional.rnn_layer, kinds.RNN_TANH),
    }[layer.mode]
    weights = [list(group) for group in layer.all_weights]

    def pack(weight_ih: Tensor, weight_hh: Tensor, *_: Tensor) -> Tensor | None:
        pairs = functional.recurrent_pairs(weight_ih, weight_hh, batch, kind=kind)
        return functional.pack_recurrent_weights(weight_ih, weight_hh, kind=kind, pairs=pairs)

    packed = [None if module.training else pack(*w) for w in weights]

    def run(x: Tensor) -> Tensor:
        sizes = None
        if lengths is not None:
            x, sizes, *_ = _packed(x, lengths)
        for w, ready in zip(weights, packed, strict=True):
            x = function(x, *w, batch_sizes=sizes, packed=ready)[0]
        return x

    return run


def sequence(
    kind: str,
    hidden: int,
    batch: int,
    steps: int,
    *,
    layers: int = 1,
    lengths: Any = None,
    **options: Any,
) -> Case:
    """A recurrent layer whose input is as wide as its state."""
    backward = options.get("backward", False)
    rows = steps * batch if lengths is None else sum(lengths)
    gates = _GATES[kind]
    name = f"{kind.lower()}_{hidden}_b{batch}_t{steps}"
    return Case(
        name + f"_l{layers}" * (layers > 1) + "_packed" * bool(lengths) + "_fb" * backward,
        "recurrent" + " fwd+bwd" * backward,
        lambda nn: Sequences(nn, kind, hidden, layers, lengths),
        (steps, batch, hidden),
        label=f"{kind} {hidden} B{batch} T{steps}"
        + f" {layers} layers" * (layers > 1)
        + " packed" * bool(lengths)
        + " fwd+bwd" * backward,
        ours=functools.partial(_by_function, batch),
        flops=2 * rows * gates * hidden * 2 * hidden * layers,
        tolerance=1e-4 if backward else 1e-5,
        **options,
    )


def recurrents() -> Iterable[Case]:
    """PERFORMANCE.md's shapes, forward, and forward and backward."""
    large, single = Target(1.07, 1.2), Target(1.4, 1.8)
    yield sequence("LSTM", 256, 1, 100, target=single)
    yield sequence("LSTM", 512, 1, 100, target=single, quick=True)
    yield sequence("LSTM", 512, 16, 100, target=large, quick=True)
    yield sequence("LSTM", 1024, 64, 25, target=large)
    yield sequence("LSTM", 128, 32, 512, target=Target(1.3, 1.5))
    yield sequence("LSTM", 512, 16, 100, layers=2, target=large)
    yield sequence("LSTM", 256, 32, 100, lengths=_LENGTHS, target=large)
    for kind in ("RNN", "GRU"):
        yield sequence(kind, 512, 1, 100, target=Target(1.8, 2.2))
        yield sequence(kind, 512, 16, 100, target=Target(1.4, 1.6))
    yield sequence("LSTM", 512, 16, 100, backward=True, target=Target(1.1, 1.25))
    yield sequence("LSTM", 256, 32, 100, lengths=_LENGTHS, backward=True, target=Target(1.6, 2.5))
    for kind in ("RNN", "GRU"):
        yield sequence(kind, 512, 16, 100, backward=True, target=Target(1.2, 1.4))
