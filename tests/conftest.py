"""Shared test set-up."""

from __future__ import annotations

import os
import sys

import pytest
import torch


def _import_torchvision() -> None:
    """Import torchvision beside a torch for which its compiled operators were not built.

    It registers fake functions for two of those operators while it is imported, and fails where
    they do not exist. Declared first, they satisfy it; nothing here calls them. timm and parts of
    transformers import torchvision and need the same.
    """
    try:
        import torchvision
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        global _torchvision_operators  # the registration ends with the object
        _torchvision_operators = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _torchvision_operators.define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import torchvision  # noqa: F401


if os.environ.get("TRITON_INTERPRET") != "1":  # takes seconds, and no interpreted kernel needs it
    _import_torchvision()


# Files whose tests are a test process each, some of them minutes long.
_WHOLE_PROCESSES = {"test_interpreted.py", "test_simulated.py", "test_numba_recurrent.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those first: as the last ones they would run one by one while all other cores wait."""
    items.sort(key=lambda item: item.path.name not in _WHOLE_PROCESSES)


@pytest.fixture
def default_precision_after():
    """Gives the process back as it was."""
    import nnarch

    yield
    nnarch.set_precision("high")


@pytest.fixture
def highest_precision(default_precision_after):
    """The direct kernels alone, which have to be as accurate as torch's."""
    import nnarch

    nnarch.set_precision("highest")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same random numbers, alone or in a full run."""
    torch.manual_seed(0)
