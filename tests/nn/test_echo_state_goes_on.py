"""Echo-state networks that go on from where the last call stopped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from echo_state_cases import network, sine

from nnarch import nn


def _free_run_by_hand(net, state, output, steps):
    layer, said = net.layers[0], []
    for _ in range(steps):
        states, state = layer(torch.as_tensor(output)[None], state)
        output = net.readout(states[0])
        said.append(output.detach())
    return torch.stack(said)


def test_generate_feeds_the_output_back():
    series = sine(600)
    net = network().fit(series[:599], series[1:])
    net.warm_up(series[:300])
    state, first = net._states[0].clone(), net._output.clone()
    expected = torch.cat((first[None], _free_run_by_hand(net, state, first, 9)))
    got = net.generate(10)
    np.testing.assert_allclose(got, expected[:, 0].numpy(), rtol=1e-9, atol=1e-12)
    whole = net.warm_up(series[:300]).generate(30)
    net.warm_up(series[:300])
    parts = np.concatenate([net.generate(10), net.generate(20)])
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-12)
    # The first value is the prediction for the step after the last input.
    np.testing.assert_allclose(whole[0], net.predict(series[:300])[-1])


def test_generate_after_fit_goes_on_from_the_series_end():
    series = sine(1200)
    net = network(solver="lstsq").fit(series[:999], series[1:1000])
    np.testing.assert_allclose(net.generate(20), series[1000:1020], atol=0.02)


def test_predict_can_go_on():
    series = sine(400)
    net = network().fit(series[:-1], series[1:])
    whole = net.predict(series)
    parts = np.concatenate([net.predict(series[:150]), net.predict(series[150:], reset=False)])
    np.testing.assert_allclose(parts, whole, rtol=1e-9, atol=1e-12)


def test_loaded_weights_begin_anew():
    """What was left of the last call belongs to the weights that were replaced."""
    series = sine(300)
    net = network().fit(series[:-1], series[1:])
    net.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match="call fit, predict or warm_up first"):
        net.generate(3)


@pytest.mark.parametrize("feedback", [0.0, 0.5])
def test_another_batch_cannot_go_on(feedback):
    one, two = torch.rand(20, 1, 2, dtype=torch.float64), torch.rand(20, 2, 2, dtype=torch.float64)
    net = nn.EchoStateNetwork(2, 30, 2, washout=5, feedback_scaling=feedback, dtype=torch.float64)
    net.fit(one, one)
    message = "the last call had a batch of 1, this one has 2"
    with pytest.raises(ValueError, match="fit: " + message):
        net.fit(two, two, reset=False)
    with pytest.raises(ValueError, match="predict: " + message):
        net.predict(two, reset=False)
    net.fit(one, one, reset=False)


def test_fit_goes_on_with_the_output_that_was_fed_back():
    """Two fits in a row leave the states of one over both parts."""
    series = torch.sin(torch.arange(302.0) / 5)
    options = {"feedback_scaling": 0.7, "washout": 0, "connectivity": 0.2}
    whole = nn.EchoStateNetwork(0, 30, 1, **options).fit(None, series)
    parts = nn.EchoStateNetwork(0, 30, 1, **options).fit(None, series[:300])
    parts.fit(None, series[300:], reset=False)
    torch.testing.assert_close(parts._states, whole._states)
    with pytest.raises(ValueError, match="a batch of 1, this one has 2"):
        parts.fit(None, torch.randn(5, 2, 1), reset=False)


def test_states_follow_the_module():
    x = torch.randn(120, 1, dtype=torch.float64)
    network = nn.EchoStateNetwork(1, 20, 1, washout=10, dtype=torch.float64).fit(x[:-1], x[1:])
    assert network.float().generate(5).dtype == np.float32
    assert not network.predict(x.float()).requires_grad
