"""Time-series forecaster: the next values of a series from those before.

Source: Hewamalage, Bergmeir and Bandara, 2019, Recurrent Neural Networks for Time Series
Forecasting: Current Status and Future Directions; their "stacked" architecture, which predicts the
whole horizon at once from the last state.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module

import nnarch.nn
from nnarch.models.recurrent import recurrent_layer
from nnarch.models.registry import register_model


class Forecaster(Module):
    """Recurrent layers, and a linear layer on the last output.

    Args:
        cell: "lstm", "gru" or "rnn".
        features: values of a step.
        horizon: steps to predict.
        hidden: features of the state.
        layers: recurrent layers.
        dropout: probability of a zero between layers, in training.
        nn: the layer namespace.

    Raises:
        ValueError: unknown cell.
    """

    def __init__(
        self,
        cell: str = "lstm",
        *,
        features: int = 1,
        horizon: int = 24,
        hidden: int = 64,
        layers: int = 2,
        dropout: float = 0.0,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        between = dropout if layers > 1 else 0.0
        self.rnn = recurrent_layer(cell, nn)(features, hidden, layers, dropout=between)
        self.head = nn.Linear(hidden, horizon * features)
        self.horizon = horizon

    def forward(self, series: Tensor) -> Tensor:
        """The next ``[horizon, B, features]`` after ``series [T, B, features]``."""
        y, _ = self.rnn(series)
        return self.head(y[-1]).unflatten(1, (self.horizon, -1)).transpose(0, 1)


_FACTS = {
    "paper": "Hewamalage, Bergmeir and Bandara, 2019, Recurrent Neural Networks for Time Series "
    "Forecasting: Current Status and Future Directions",
    "input_size": (96, 1),
    "num_classes": 24,
    "batch_dim": 1,
}


@register_model(**_FACTS, parameters=51_992, macs=4_744_704)
def lstm_forecaster(**options: Any) -> Forecaster:
    """LSTM; `options` are those of :class:`Forecaster`."""
    return Forecaster("lstm", **options)


@register_model(**_FACTS, parameters=39_384, macs=3_558_912)
def gru_forecaster(**options: Any) -> Forecaster:
    """GRU; `options` are those of :class:`Forecaster`."""
    return Forecaster("gru", **options)


@register_model(**_FACTS, parameters=14_168, macs=1_187_328)
def rnn_forecaster(**options: Any) -> Forecaster:
    """Elman network; `options` are those of :class:`Forecaster`."""
    return Forecaster("rnn", **options)
