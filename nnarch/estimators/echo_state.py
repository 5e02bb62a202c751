"""An echo-state network as a scikit-learn regressor."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:  # pragma: no cover
    raise ImportError("nnarch.estimators needs scikit-learn (pip install scikit-learn)") from error

from nnarch.nn.echo_state import EchoStateNetwork


class EchoStateRegressor(RegressorMixin, BaseEstimator):
    """An echo-state network that scikit-learn can fit, score and search over.

    The rows of X are the steps of one sequence, in order: cross-validate with ``TimeSeriesSplit``
    and never shuffle. It computes in float64.

    Args:
        units: neurons of the reservoir, or a tuple of them for a deep network.
        connectivity, spectral_radius, leak, input_scaling, bias_scaling, activation, solver, ridge,
            noise, input_to_readout, bidirectional: see :class:`nnarch.nn.EchoStateNetwork`.
        washout: steps at the start of a sequence that the fit ignores. Fewer where X is short: at
            most a tenth of its rows.
        random_state: seed of the weights, or a ``numpy.random.RandomState`` that every fit draws
            one from; None is 0, so that two fits agree.

    Attributes:
        network_: the fitted :class:`nnarch.nn.EchoStateNetwork`.
        n_features_in_: features of X.
    """

    def __init__(
        self,
        units: int | tuple[int, ...] = 500,
        *,
        connectivity: float = 0.01,
        spectral_radius: float = 0.9,
        leak: float = 1.0,
        input_scaling: float = 1.0,
        bias_scaling: float = 0.1,
        activation: str | None = "tanh",
        washout: int = 100,
        solver: str = "ridge",
        ridge: float = 1e-6,
        noise: float = 0.0,
        input_to_readout: bool = True,
        bidirectional: bool = False,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.units = units
        self.connectivity = connectivity
        self.spectral_radius = spectral_radius
        self.leak = leak
        self.input_scaling = input_scaling
        self.bias_scaling = bias_scaling
        self.activation = activation
        self.washout = washout
        self.solver = solver
        self.ridge = ridge
        self.noise = noise
        self.input_to_readout = input_to_readout
        self.bidirectional = bidirectional
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> EchoStateRegressor:
        """Fit the readout.

        Args:
            X: ``[steps, features]``.
            y: ``[steps]`` or ``[steps, outputs]``.
        """
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        self._flat = y.ndim == 1
        target = np.asarray(y, np.float64).reshape(len(y), -1)
        options = {
            name: value
            for name, value in self.get_params(deep=False).items()
            if name not in ("units", "washout", "random_state")
        }
        self.network_ = EchoStateNetwork(
            X.shape[1],
            self.units,
            target.shape[1],
            washout=min(self.washout, len(X) // 10),
            seed=self._seed(),
            dtype=torch.float64,
            **options,
        )
        self.network_.fit(X, target)
        return self

    def _seed(self) -> int:
        if isinstance(self.random_state, np.random.RandomState):
            return int(self.random_state.randint(2**31 - 1))
        return 0 if self.random_state is None else int(self.random_state)

    def predict(self, X: Any) -> np.ndarray:
        """The outputs of a sequence that starts with a zero state, ``[steps]`` as `y` was."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        y = self.network_.predict(X)
        return y[:, 0] if self._flat else y

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
