"""What Numba kernels share: compiling for GPUs that are not here, and cooperative grids."""

from __future__ import annotations

import math
import os

import pytest

pytest.importorskip("numba_cuda", reason="needs numba-cuda")
if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("the simulator compiles nothing", allow_module_level=True)

from numba import cuda, float32, int64

from nnarch.kernels.gpu import numba_support


@cuda.jit(device=True)
def _twice(x):
    return 2 * math.tanh(x)


@cuda.jit
def _barrier_kernel(x, count):
    shared = cuda.shared.array(256, dtype=float32)
    i = cuda.grid(1)
    shared[cuda.threadIdx.x] = x[i % count]
    cuda.cg.this_grid().sync()
    x[i % count] = _twice(shared[255 - cuda.threadIdx.x])


@pytest.mark.parametrize("capability", numba_support.CAPABILITIES)
def test_compiles_a_kernel_with_a_device_function_and_a_barrier(capability):
    ptx = numba_support.compile_to_ptx(_barrier_kernel, (float32[::1], int64), capability)
    assert f".target sm_{capability[0]}{capability[1]}" in ptx and "cudaCGSynchronize" in ptx
    if numba_support.assembler() is None:
        pytest.skip("no ptxas: triton is not installed")
    usage = numba_support.assemble(ptx, capability)
    assert 0 < usage.registers <= 255 and usage.spilled == 0 and usage.shared == 1024


def test_code_that_does_not_assemble_is_refused():
    if numba_support.assembler() is None:
        pytest.skip("no ptxas: triton is not installed")
    with pytest.raises(RuntimeError, match="ptxas for sm_90"):
        numba_support.assemble("no code", (9, 0))


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        ({"threads": 256, "registers": 32}, 8 * 132),  # 2048 threads a processor
        ({"threads": 256, "registers": 64}, 4 * 132),  # 65536 registers
        ({"threads": 32, "registers": 16}, 32 * 132),  # 32 blocks
        ({"threads": 256, "registers": 32, "shared_bytes": 100 << 10}, 2 * 132),  # 228 KiB
        ({"threads": 1024, "registers": 65}, 0),  # does not fit at all
        ({"threads": 256, "registers": 32, "processors": 10}, 80),
    ],
)
def test_how_many_blocks_are_resident(options, blocks):
    assert numba_support.cooperative_grid_limit((9, 0), **options) == blocks
