"""Estimators for scikit-learn: what `Pipeline`, `cross_val_score` and `GridSearchCV` take."""

from nnarch.estimators.echo_state import EchoStateRegressor

__all__ = ["EchoStateRegressor"]
