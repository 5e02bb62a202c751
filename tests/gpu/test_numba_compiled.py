"""Numba kernels compiled for GPUs that are not here: they assemble, without spills."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("numba_cuda", reason="needs numba-cuda")
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from nnarch.kernels.gpu import numba_support
from nnarch.kernels.reservoir import numba_kernel, numba_scan


@pytest.mark.parametrize("capability", numba_support.CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_reservoir(dtype, capability):
    found = numba_kernel.kernels(dtype)
    shared = numba_support.compile_to_ptx(found.shared, found.signature_shared, capability)
    grid = numba_support.compile_to_ptx(found.grid, found.signature_grid, capability)
    assert "cudaCGSynchronize" in grid and "cudaCGSynchronize" not in shared
    if numba_support.assembler() is None:
        pytest.skip("no ptxas: triton is not installed")
    usage = numba_support.assemble(shared, capability)
    assert usage.spilled == 0 and usage.registers * numba_kernel.SHARED_THREADS <= 65536
    usage = numba_support.assemble(grid, capability)
    assert usage.spilled == 0
    # The cooperative launch is legal: at least one block a processor is resident.
    blocks = numba_support.cooperative_grid_limit(
        capability,
        threads=numba_kernel.GRID_THREADS,
        registers=usage.registers,
        shared_bytes=usage.shared,
        processors=1,
    )
    assert blocks >= 1
    numba_scan.check_grid(blocks, blocks)
    with pytest.raises(ValueError, match="cooperative grid"):
        numba_scan.check_grid(blocks + 1, blocks)
