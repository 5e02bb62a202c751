"""The scikit-learn estimator: its contract, and that it is the network."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn")

from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, TimeSeriesSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from nnarch.estimators import EchoStateRegressor

SERIES = np.sin(0.2 * np.arange(700)) * np.cos(0.07 * np.arange(700))
X, Y = SERIES[:-1, None], SERIES[1:]


def small(**options):
    return EchoStateRegressor(50, connectivity=0.1, ridge=1e-8, washout=30, **options)


def test_scikit_learns_own_checks():
    """All but those that shuffle rows: ours are steps of a sequence."""
    order = "the rows of X are steps of one sequence"
    results = check_estimator(
        small(),
        expected_failed_checks={
            "check_methods_sample_order_invariance": order,
            "check_methods_subset_invariance": order,
        },
        on_skip=None,
        on_fail=None,
    )
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert not failed, failed
    assert sum(r["status"] == "passed" for r in results) >= 30


def test_it_learns_and_scores():
    model = small().fit(X[:500], Y[:500])
    assert model.score(X, Y) > 0.99
    assert model.predict(X).shape == (699,) and model.n_features_in_ == 1
    two = small().fit(X[:500], np.stack([Y[:500], -Y[:500]], 1))
    assert two.predict(X[:9]).shape == (9, 2)


def test_the_same_seed_gives_the_same_model():
    a, b = small(random_state=4).fit(X, Y), small(random_state=4).fit(X, Y)
    assert np.array_equal(a.predict(X), b.predict(X))
    assert not np.array_equal(a.predict(X), small(random_state=5).fit(X, Y).predict(X))
    assert np.array_equal(pickle.loads(pickle.dumps(a)).predict(X), a.predict(X))


def test_random_state_that_draws():
    a, b = (small(random_state=np.random.RandomState(7)).fit(X, Y) for _ in range(2))
    assert np.array_equal(a.predict(X), b.predict(X))
    shared = np.random.RandomState(7)
    c, d = (small(random_state=shared).fit(X, Y) for _ in range(2))
    assert np.array_equal(a.predict(X), c.predict(X))
    assert not np.array_equal(c.predict(X), d.predict(X))


def test_pipelines_and_searches():
    pipeline = make_pipeline(StandardScaler(), small())
    search = GridSearchCV(
        pipeline, {"echostateregressor__leak": [0.3, 1.0]}, cv=TimeSeriesSplit(2)
    ).fit(X, Y)
    assert search.best_score_ > 0.9
    assert clone(small(leak=0.2)).leak == 0.2


def test_bad_parameters_are_refused_by_fit():
    with pytest.raises(ValueError, match="leak must be"):
        small(leak=2.0).fit(X, Y)
    with pytest.raises(ValueError, match="solver must be"):
        small(solver="svd").fit(X, Y)
