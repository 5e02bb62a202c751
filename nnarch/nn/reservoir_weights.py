"""Random weights of reservoirs, and the spectral radius of a sparse matrix."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

_DENSE = 400  # up to here all eigenvalues of a dense matrix take less time than ARPACK's largest


def sparse_reservoir(
    units: int, connectivity: float, radius: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """A random recurrent matrix of a given spectral radius, as compressed rows in float64.

    Every row has ``round(connectivity · units)`` nonzeros (at least one), uniform in ±1 before they
    are scaled, in random columns.

    Returns:
        values ``[nonzeros]`` in float64, columns ``[nonzeros]`` and row starts ``[units + 1]`` in
        int32.

    Raises:
        ValueError: units, connectivity or radius out of range.
    """
    if units < 1:
        raise ValueError(f"Reservoir: units must be at least 1, got {units}")
    if not 0 < connectivity <= 1:
        raise ValueError(
            f"Reservoir: connectivity must be above 0 and at most 1, got {connectivity}"
        )
    if not radius >= 0:
        raise ValueError(f"Reservoir: spectral_radius must be at least 0, got {radius}")
    count = max(1, round(connectivity * units))
    parts = []
    for first in range(0, units, 256):  # rows at a time: no dense N·N matrix
        keys = torch.rand(min(256, units - first), units, generator=generator)
        parts.append(keys.topk(count, 1).indices.sort(1).values)
    columns = torch.cat(parts).flatten().to(torch.int32)
    rows = torch.arange(0, units * count + 1, count, dtype=torch.int32)
    values = torch.rand(units * count, generator=generator, dtype=torch.float64) * 2 - 1
    largest = spectral_radius(values, columns, rows)
    return values * (radius / largest if largest > 0 else 0.0), columns, rows


def input_weights(
    units: int, inputs: int, scaling: float | Sequence[float], generator: torch.Generator
) -> Tensor:
    """``[units, inputs]``, uniform in ±scaling, in float64."""
    weights = torch.rand(units, inputs, generator=generator, dtype=torch.float64) * 2 - 1
    return weights * torch.as_tensor(scaling, dtype=torch.float64)


def spectral_radius(values: Tensor, columns: Tensor, rows: Tensor) -> float:
    """The largest absolute eigenvalue of a sparse square matrix in compressed rows.

    By ARPACK, where scipy is installed; otherwise, and for small matrices, from all eigenvalues of
    the dense matrix. Power iteration would not do: the largest eigenvalues of a random matrix are
    complex pairs of almost equal size, between which it does not settle.
    """
    n = rows.numel() - 1
    if n > _DENSE:
        largest = _arpack(values, columns, rows)
        if largest is not None:
            return largest
    row = torch.repeat_interleave(torch.arange(n), rows.diff().long())  # torch's CSR tensors warn
    dense = torch.zeros(n, n, dtype=torch.float64)
    dense.index_put_((row, columns.long()), values.double(), accumulate=True)
    return float(torch.linalg.eigvals(dense).abs().max())


def _arpack(values: Tensor, columns: Tensor, rows: Tensor) -> float | None:
    try:
        sparse = importlib.import_module("scipy.sparse")
        linalg = importlib.import_module("scipy.sparse.linalg")
    except ImportError:
        return None
    n = rows.numel() - 1
    matrix = sparse.csr_matrix(
        (values.double().numpy(), columns.numpy(), rows.numpy()), shape=(n, n)
    )
    start = torch.ones(n, dtype=torch.float64).numpy()  # the same every time
    try:
        # Several at once: the largest few are close, and ARPACK may find the second one first.
        found = linalg.eigs(
            matrix, k=6, ncv=60, which="LM", v0=start, tol=1e-9, maxiter=50 * n,
            return_eigenvectors=False,
        )  # fmt: skip
    except (linalg.ArpackNoConvergence, linalg.ArpackError):
        return None
    return float(abs(found).max())
