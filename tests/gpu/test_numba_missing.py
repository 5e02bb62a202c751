"""Where Numba cannot be imported, whatever its import raises."""

from __future__ import annotations

import contextlib
import importlib
import sys

import pytest

from nnarch import library
from nnarch.kernels.gpu import numba_support


@pytest.fixture(autouse=True)
def _broken_numba(monkeypatch):
    @contextlib.contextmanager
    def broken():
        raise AttributeError("module 'numpy' has no attribute 'row_stack'")
        yield

    caches = (numba_support._import_numba, numba_support._warn_once)
    monkeypatch.setattr(numba_support, "_removed_from_numpy", broken)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("family", ["reservoir", "recurrent"])
def test_kernels_raise_import_error(family, monkeypatch):
    """Which an operation's dispatch answers with the reference implementation."""
    name = f"nnarch.kernels.{family}.numba_kernel"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"AttributeError: module 'numpy' has no .*row_stack"):
        importlib.import_module(name)


def test_one_warning_says_what_runs_instead():
    with pytest.warns(library.FallbackWarning, match="a kernel a step: Numba cannot be imported"):
        assert not numba_support.has_numba("a kernel a step")
    assert not numba_support.has_numba("a kernel a step")  # a second one would be an error here
