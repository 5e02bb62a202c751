"""Forecasts of time series: recurrent layers over the past, a linear map to the next values.

Source: Gers, Eck and Schmidhuber, 2001, Applying LSTM to Time Series Predictable through
Time-Window Approaches.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor
from torch.nn import Module

import nnarch.nn
from nnarch.models.cells import PAPERS, recurrent
from nnarch.models.registry import register_model


class Forecaster(Module):
    """Recurrent layers over a window, a linear map of the last output to the values after it.

    Args:
        cell: "rnn", "lstm" or "gru".
        features: values of each step.
        horizon: steps to forecast.
        hidden: size.
        layers: recurrent layers.
        dropout: between layers.
        nn: the layer namespace.

    Raises:
        ValueError: unknown cell.
    """

    def __init__(
        self,
        cell: str = "lstm",
        *,
        features: int = 1,
        horizon: int = 1,
        hidden: int = 64,
        layers: int = 1,
        dropout: float = 0.0,
        nn: ModuleType = nnarch.nn,
    ) -> None:
        super().__init__()
        self.horizon, self.features = horizon, features
        self.recurrent = recurrent(cell, nn, features, hidden, layers, dropout=dropout)
        self.output = nn.Linear(hidden, horizon * features)

    def forward(self, series: Tensor) -> Tensor:
        """The values ``[B, horizon, features]`` that follow ``series [B, T, features]``."""
        y, _ = self.recurrent(series.transpose(0, 1))
        return self.output(y[-1]).unflatten(1, (self.horizon, self.features))


_FACTS = {"input_size": (100, 1), "num_classes": 1}
_GERS = "Gers et al., 2001, Applying LSTM to Time Series Predictable through Time-Window Approaches"


@register_model(**_FACTS, paper=PAPERS["rnn"], parameters=4_353, macs=416_064)
def rnn_forecaster(**options: Any) -> Forecaster:
    """An Elman network; `options` are those of :class:`Forecaster`."""
    return Forecaster("rnn", **options)


@register_model(**_FACTS, paper=_GERS, parameters=17_217, macs=1_664_064)
def lstm_forecaster(**options: Any) -> Forecaster:
    """An LSTM; `options` are those of :class:`Forecaster`."""
    return Forecaster("lstm", **options)


@register_model(**_FACTS, paper=PAPERS["gru"], parameters=12_929, macs=1_248_064)
def gru_forecaster(**options: Any) -> Forecaster:
    """A GRU; `options` are those of :class:`Forecaster`."""
    return Forecaster("gru", **options)
