"""Keras's recurrent weights, against its formulas written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nnarch.nn as nn
from nnarch.convert import keras_recurrent_weights, load_keras_recurrent

IN, UNITS, BATCH, TIME = 3, 4, 2, 5
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def keras_weights(name, features=IN, bias=True):
    """Random weights in the shapes of ``get_weights()``."""
    gates = GATES[name]
    shapes = [(features, gates * UNITS), (UNITS, gates * UNITS)]
    if bias:
        shapes.append((2, gates * UNITS) if name == "GRU" else (gates * UNITS,))
    return [np.random.default_rng(i + features).normal(size=s) for i, s in enumerate(shapes)]


def keras_layer(name, weights, x):
    """Keras's layer: outputs [T, B, units]. Its cells' own lines, gate after gate."""
    kernel, recurrent = weights[:2]
    no_bias = np.zeros((2, GATES[name] * UNITS) if name == "GRU" else GATES[name] * UNITS)
    bias = weights[2] if len(weights) == 3 else no_bias
    h = c = np.zeros((x.shape[1], UNITS))
    outputs = []
    for step in x:
        if name == "RNN":
            h = np.tanh(step @ kernel + h @ recurrent + bias)
        elif name == "LSTM":
            z = step @ kernel + h @ recurrent + bias
            i, f, g, o = np.split(z, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            of_x = step @ kernel + bias[0]
            of_h = h @ recurrent + bias[1]
            x_z, x_r, x_h = np.split(of_x, 3, axis=1)
            h_z, h_r, h_h = np.split(of_h, 3, axis=1)
            z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
            h = z * h + (1 - z) * np.tanh(x_h + r * h_h)
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize("namespace", [nn, torch.nn], ids=["nnarch", "torch"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", GATES)
def test_layers_and_cells_compute_what_keras_does(name, bias, namespace):
    weights = keras_weights(name, bias=bias)
    x = np.random.default_rng(9).normal(size=(TIME, BATCH, IN))
    expected = torch.from_numpy(keras_layer(name, weights, x))
    layer = getattr(namespace, name)(IN, UNITS, bias=bias, dtype=torch.float64)
    load_keras_recurrent(layer, weights)
    torch.testing.assert_close(layer(torch.from_numpy(x))[0].detach(), expected)
    cell = getattr(namespace, name + "Cell")(IN, UNITS, bias=bias, dtype=torch.float64)
    load_keras_recurrent(cell, weights)
    state = cell(torch.from_numpy(x[0]))
    first = state[0] if name == "LSTM" else state
    torch.testing.assert_close(first.detach(), expected[0])


@pytest.mark.parametrize("name", GATES)
def test_stacked_bidirectional_layers(name):
    """Keras: Bidirectional(layer) after Bidirectional(layer), outputs side by side."""
    parts = [keras_weights(name, features) for features in (IN, IN, 2 * UNITS, 2 * UNITS)]
    for i, part in enumerate(parts):
        part[0] = part[0] + i  # no two alike
    x = np.random.default_rng(9).normal(size=(TIME, BATCH, IN))
    expected = x
    for forward, backward in (parts[:2], parts[2:]):
        expected = np.concatenate(
            [
                keras_layer(name, forward, expected),
                keras_layer(name, backward, expected[::-1])[::-1],
            ],
            axis=2,
        )
    layer = getattr(nn, name)(IN, UNITS, 2, bidirectional=True, dtype=torch.float64)
    load_keras_recurrent(layer, [array for part in parts for array in part])
    torch.testing.assert_close(
        layer(torch.from_numpy(x))[0].detach(), torch.from_numpy(np.ascontiguousarray(expected))
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", GATES)
def test_round_trip(name, bias):
    weights = keras_weights(name, bias=bias) + keras_weights(name, UNITS, bias)
    layer = getattr(nn, name)(IN, UNITS, 2, bias=bias, dtype=torch.float64)
    load_keras_recurrent(layer, weights)
    back = keras_recurrent_weights(layer)
    assert len(back) == len(weights)
    for array, original in zip(back, weights, strict=True):
        assert array.flags.c_contiguous
        np.testing.assert_array_equal(array, original)


def test_two_biases_of_torch_are_added():
    layer = nn.LSTM(IN, UNITS)
    bias = keras_recurrent_weights(layer)[2]
    np.testing.assert_array_equal(bias, (layer.bias_ih_l0 + layer.bias_hh_l0).detach().numpy())


def test_refusals():
    gru = nn.GRU(IN, UNITS)
    before = {name: value.clone() for name, value in gru.state_dict().items()}
    weights = keras_weights("GRU")
    with pytest.raises(ValueError, match="reset_after=False"):
        load_keras_recurrent(gru, [*weights[:2], weights[2][0]])
    with pytest.raises(ValueError, match="GRU needs 3 arrays"):
        load_keras_recurrent(gru, weights[:2])
    with pytest.raises(ValueError, match=r"kernel must be \[features, 3 \* units\], got \(3, 11\)"):
        load_keras_recurrent(gru, [weights[0][:, :11], *weights[1:]])
    with pytest.raises(ValueError, match="weight_ih_l0 is 12×2, the model has 12×3"):
        load_keras_recurrent(gru, [weights[0][:2], *weights[1:]])
    with pytest.raises(ValueError, match="bias must have 1 dimension"):
        lstm = keras_weights("LSTM")
        load_keras_recurrent(nn.LSTM(IN, UNITS), [*lstm[:2], lstm[2][None]])
    with pytest.raises(TypeError, match="Keras has nothing like weight_hr_l0"):
        keras_recurrent_weights(nn.LSTM(IN, UNITS, proj_size=2))
    with pytest.raises(TypeError, match="Keras has nothing like weight_peephole_l0"):
        load_keras_recurrent(nn.LSTM(IN, UNITS, peephole=True), weights)
    with pytest.raises(
        TypeError, match="must be an RNN, LSTM or GRU or a cell of them, got Linear"
    ):
        load_keras_recurrent(nn.Linear(2, 3), weights)
    assert all(torch.equal(gru.state_dict()[name], value) for name, value in before.items())
