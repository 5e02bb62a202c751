"""A linear readout fitted in float64, from sequences of any length, chunk by chunk."""

from __future__ import annotations

import torch
from torch import Tensor


class Readout:
    """Accumulates features and targets, and solves for weights and bias.

    "ridge" keeps the Gram matrix of the features, ``(F+1)²`` numbers, whose condition is the square
    of the features' own. "lstsq" keeps the triangular factor of [features, 1, targets] instead and
    loses nothing; a chunk costs twice as much. The products and factorizations are torch's (BLAS
    and LAPACK): fitting a readout is not a kernel of ours.

    Args:
        features: F.
        outputs: O.
        solver: "ridge" or "lstsq".
        ridge: added to the diagonal of the Gram matrix, the bias left out.
    """

    def __init__(self, features: int, outputs: int, solver: str, ridge: float) -> None:
        if solver not in ("ridge", "lstsq"):
            raise ValueError(f"Readout: solver must be 'ridge' or 'lstsq', got {solver!r}")
        if not ridge >= 0:
            raise ValueError(f"Readout: ridge must be at least 0, got {ridge}")
        self.features, self.outputs, self.solver, self.ridge = features, outputs, solver, ridge
        self._sum: Tensor | None = None  # Gram matrix of [features, 1, targets], or its factor

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Take in a chunk: ``[..., F]`` and ``[..., O]``."""
        x = features.reshape(-1, self.features).double()
        y = targets.reshape(-1, self.outputs).double()
        rows = torch.cat((x, x.new_ones(len(x), 1), y), 1)
        if self.solver == "ridge":
            gram = rows.T @ rows
            self._sum = gram if self._sum is None else self._sum.add_(gram)
        else:
            stacked = rows if self._sum is None else torch.cat((self._sum, rows))
            self._sum = torch.linalg.qr(stacked, mode="r").R

    def solve(self) -> tuple[Tensor, Tensor]:
        """Weights ``[O, F]`` and bias ``[O]`` in float64.

        Raises:
            ValueError: nothing was added, or NaN or infinity was.
        """
        if self._sum is None:
            raise ValueError("Readout: nothing to fit: add features first")
        if not bool(torch.isfinite(self._sum).all()):
            raise ValueError("Readout: features and targets must be finite; the input may hold NaN")
        n = self.features + 1
        left, right = self._sum[:n, :n], self._sum[:n, n:]
        if self.solver == "ridge":
            diagonal = torch.full((n,), self.ridge, dtype=left.dtype, device=left.device)
            diagonal[-1] = 0
            left = left + torch.diag(diagonal)
            factor, failed = torch.linalg.cholesky_ex(left)
            if not int(failed):
                return self._split(torch.cholesky_solve(right, factor))
        # A factor with fewer rows than columns has fewer equations than unknowns: minimum norm.
        return self._split(torch.linalg.lstsq(left.cpu(), right.cpu(), driver="gelsd").solution)

    @staticmethod
    def _split(solution: Tensor) -> tuple[Tensor, Tensor]:
        return solution[:-1].T, solution[-1]
