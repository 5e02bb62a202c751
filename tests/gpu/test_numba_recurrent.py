"""The persistent scan in Numba-CUDA: simulated in a process of its own, compiled, and its bound."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from alone import run_pytest

pytest.importorskip("numba.cuda", reason="needs numba-cuda")
pytest.importorskip("triton", reason="needs triton")
from nnarch.kernels.gpu import numba_support
from nnarch.kernels.gpu.targets import TARGETS
from nnarch.kernels.recurrent import kinds, numba_scan

HERE = Path(__file__).parent


def test_simulated():
    """Triton's interpreter runs the input's product in the same process."""
    output = run_pytest(
        str(HERE / "simulated_recurrent.py"),
        environment={"NUMBA_ENABLE_CUDASIM": "1", "TRITON_INTERPRET": "1"},
    )
    assert re.search(r"\d+ passed", output) and "skipped" not in output, output


@pytest.mark.parametrize("capability", numba_support.CAPABILITIES, ids=str)
@pytest.mark.parametrize("kind, batch", [(0, 1), (1, 8), (2, 1), (2, 8), (3, 4)])
def test_compiled(kind, batch, capability):
    """No spill, no local memory, no double precision, and registers that a block of it can have."""
    from numba import boolean, float32, int64

    from nnarch.kernels.recurrent.numba_kernel import persistent_kernel

    vector, matrix = float32[::1], float32[:, ::1]
    signature = (
        *(matrix, matrix, vector, matrix, int64[::1], float32[:, :, ::1]),
        *(matrix, matrix, matrix, matrix, int64, boolean),
    )
    ptx = numba_support.compile_to_ptx(persistent_kernel(kind, batch), signature, capability)
    assert ".f64" not in ptx and ".local" not in ptx
    assert "cudaCGSynchronize" in ptx  # the barrier of the grid
    products = kinds.GATES[kind] * batch
    assert ptx.count("fma.rn.f32") >= products  # the loop over sequences and gates is unrolled
    if numba_support.assembler() is None:
        pytest.skip("needs ptxas")
    usage = numba_support.assemble(ptx, capability)
    assert usage.spilled == 0
    assert usage.registers <= numba_scan.MOST_REGISTERS
    assert numba_support.cooperative_grid_limit(
        capability, threads=numba_scan.THREADS, registers=numba_scan.MOST_REGISTERS
    )


@pytest.mark.parametrize("name", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("hidden", [65, 256, 768, 801])
def test_plans_cover_all_units_and_fit(kind, hidden, name):
    target = TARGETS[name]
    plan = numba_scan.plan(kind, 4, hidden, target, target.processors)
    assert (plan.blocks - 1) * plan.units < hidden <= plan.blocks * plan.units
    assert plan.blocks <= target.processors
    assert plan.shared_bytes <= target.shared_bytes
    assert plan.batch * plan.units <= plan.threads


@pytest.mark.parametrize(
    "sequences, hidden, processors, message",
    [
        (9, 256, 132, "takes 8 sequences, got 9"),
        (1, 4096, 132, r"needs 128 blocks of \d+ bytes .* holds 0"),
        (8, 512, 4, "needs 1024 cells a block on 4 processors, 256 exist"),
    ],
)
def test_past_the_bound_the_error_has_the_numbers(sequences, hidden, processors, message):
    with pytest.raises(ValueError, match=message):
        numba_scan.plan(kinds.LSTM, sequences, hidden, TARGETS["sm_90"], processors)
