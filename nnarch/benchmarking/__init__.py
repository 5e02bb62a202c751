"""Benchmarks of nnarch against what a user would otherwise run: `run` does it all."""

from nnarch.benchmarking.case import Case, Target
from nnarch.benchmarking.results import Row
from nnarch.benchmarking.runner import run

__all__ = ["Case", "Row", "Target", "run"]
