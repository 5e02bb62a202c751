"""What echo-state networks are given: arrays of any layout, inside autocast or not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnarch import nn


def sine(steps: int) -> np.ndarray:
    t = np.arange(steps)[:, None] * 0.2
    return np.sin(t) * np.cos(1.55 * t)


def network() -> nn.EchoStateNetwork:
    return nn.EchoStateNetwork(1, 60, 1, washout=9, connectivity=0.1, dtype=torch.float64)


def test_arrays_of_any_order_of_bytes_and_steps():
    x = sine(300)
    expected = network().fit(x[::-1].copy(), x[::-1].copy()).predict(x[::-1].copy())
    for view in (x[::-1], x[::-1].astype(">f8")):
        np.testing.assert_array_equal(network().fit(view, view).predict(view), expected)


@pytest.mark.parametrize("options", [{}, {"units": (30, 20)}, {"noise": 1e-3}], ids=str)
def test_autocast_leaves_it_alone(options):
    x = sine(300)
    plain = nn.EchoStateNetwork(1, **({"units": 30} | options), outputs=1).fit(x[:-1], x[1:])
    with torch.autocast("cpu", torch.bfloat16):
        inside = nn.EchoStateNetwork(1, **({"units": 30} | options), outputs=1)
        inside.fit(x[:-1], x[1:])
        np.testing.assert_array_equal(inside.predict(x), plain.predict(x))
        states, _ = inside.layers[0](torch.randn(5, 2, 1, dtype=torch.bfloat16))
        assert states.dtype == torch.float32
    np.testing.assert_array_equal(inside.generate(5), plain.generate(5))


def test_numbers_of_numpy_are_numbers():
    network = nn.EchoStateNetwork(1, np.int64(20), 1, input_scaling=np.float32(0.5))
    assert network.readout.in_features == 20
