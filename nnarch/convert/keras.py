"""Weights of Keras's recurrent layers, in its order, to and from torch's.

============  ============================================  =====================================
layer         Keras                                         torch
============  ============================================  =====================================
all           kernel [I, G·H], recurrent_kernel [H, G·H]    weight_ih [G·H, I], weight_hh [G·H, H]
SimpleRNN     bias [H]                                      bias_ih [H], bias_hh [H], added
LSTM          gates i, f, c, o; bias [4H]                   gates i, f, g, o (the same four);
                                                            bias_ih, bias_hh, added
GRU           gates z, r, h; bias [2, 3H]: of the input,    gates r, z, n; bias_ih, bias_hh
              of the state
============  ============================================  =====================================

Keras's Bidirectional layer has the forward layer's arrays first, then the backward layer's.

A GRU of Keras fits torch's formula, ``n = tanh(W·x + b + r·(U·h + b'))``, only where it was built
with ``reset_after=True``, its default; with False it resets h before the product and is another
network. Both update gates weigh the old state: ``h' = z·h + (1 - z)·n``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from nnarch.convert.checkpoint import load_weights

Recurrent = RNNBase | RNNCellBase

# For each gate of torch, in its order, the place of that gate in Keras.
_GATES = {"RNN": (0,), "LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}


def load_keras_recurrent(module: Recurrent, weights: Sequence[Any]) -> None:
    """Copy a Keras recurrent layer's weights into `module`, all or none.

    Args:
        module: an RNN, LSTM or GRU, or one of their cells, of nnarch.nn or torch.nn.
        weights: arrays as ``keras_layer.get_weights()`` gives them: kernel, recurrent_kernel, and
            bias where the layer has one; of a Bidirectional layer those of both directions; for
            several layers one after another. A GRU must be one with ``reset_after=True``.

    Raises:
        ValueError: other arrays than `module` needs; the message says which, and `module` is left
            as it was.
        TypeError: `module` is no recurrent layer, or has parameters that Keras's have not.
    """
    suffixes = _suffixes("load_keras_recurrent", module)
    each = 3 if module.bias else 2
    if len(weights) != each * len(suffixes):
        raise ValueError(
            f"load_keras_recurrent: {type(module).__name__} needs {each * len(suffixes)} arrays "
            f"({each} for each of {len(suffixes)}), got {len(weights)}"
        )
    found: dict[str, Tensor] = {}
    for k, suffix in enumerate(suffixes):
        part = [np.asarray(w) for w in weights[k * each : (k + 1) * each]]
        found |= {name + suffix: t for name, t in _from_keras(_family(module), part).items()}
    load_weights(module, found, source="the Keras layer")


def keras_recurrent_weights(module: Recurrent) -> list[np.ndarray]:
    """The weights of `module` as ``keras_layer.set_weights()`` takes them.

    Args:
        module: as :func:`load_keras_recurrent` takes it.

    Returns:
        Arrays in that function's order. Where Keras has one bias, it is the sum of torch's two.

    Raises:
        TypeError: `module` is no recurrent layer, or has parameters that Keras's have not.
    """
    state = {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}
    arrays = []
    for suffix in _suffixes("keras_recurrent_weights", module):
        family = _family(module)
        to_keras = np.argsort(_GATES[family]).tolist()
        named = ["weight_ih", "weight_hh"] + (["bias_ih", "bias_hh"] if module.bias else [])
        part = [_reorder(state[name + suffix], to_keras) for name in named]
        arrays += [np.ascontiguousarray(matrix.T) for matrix in part[:2]]
        if module.bias:
            arrays.append(np.stack(part[2:]) if family == "GRU" else part[2] + part[3])
    return arrays


def _from_keras(family: str, arrays: list[np.ndarray]) -> dict[str, Tensor]:
    """One layer in one direction: its parameters by torch's names."""
    order = _GATES[family]
    for name, array in zip(("kernel", "recurrent_kernel"), arrays, strict=False):
        if array.ndim != 2 or array.shape[1] % len(order):
            raise ValueError(
                f"load_keras_recurrent: {name} must be [features, {len(order)} * units], got "
                f"{array.shape}"
            )
    found = {
        "weight_ih": _reorder(arrays[0].T, order),
        "weight_hh": _reorder(arrays[1].T, order),
    }
    if len(arrays) == 3:
        found |= _biases(family, arrays[2], order)
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in found.items()}


def _biases(family: str, bias: np.ndarray, order: Sequence[int]) -> dict[str, np.ndarray]:
    if family != "GRU":
        if bias.ndim != 1:
            raise ValueError(f"load_keras_recurrent: bias must have 1 dimension, got {bias.shape}")
        return {"bias_ih": _reorder(bias, order), "bias_hh": np.zeros_like(bias)}
    if bias.ndim != 2 or len(bias) != 2:
        raise ValueError(
            f"load_keras_recurrent: a GRU's bias must be [2, 3 * units], got {bias.shape}; with "
            "reset_after=False, which has one bias, Keras computes another function than torch"
        )
    return {"bias_ih": _reorder(bias[0], order), "bias_hh": _reorder(bias[1], order)}


def _reorder(rows: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """Blocks of rows, one a gate, in another order."""
    blocks = np.split(rows, len(order))
    return np.concatenate([blocks[place] for place in order])


def _family(module: Recurrent) -> str:
    for family in _GATES:
        if isinstance(module, (getattr(torch.nn, family), getattr(torch.nn, family + "Cell"))):
            return family
    raise AssertionError(type(module))


def _suffixes(function: str, module: Any) -> list[str]:
    """What follows the parameters' names, for each layer and direction."""
    if not isinstance(module, (RNNBase, RNNCellBase)):
        raise TypeError(
            f"{function}: module must be an RNN, LSTM or GRU or a cell of them, got "
            f"{type(module).__name__}"
        )
    names = list(module.state_dict())
    known = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    foreign = [name for name in names if not name.startswith(known)]
    if foreign:
        raise TypeError(f"{function}: Keras has nothing like {foreign[0]}")
    return [name.removeprefix("weight_ih") for name in names if name.startswith("weight_ih")]
