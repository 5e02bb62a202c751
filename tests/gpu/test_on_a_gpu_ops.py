"""On a real GPU: every declared operation runs on its own backend and agrees with its reference."""

import pytest
import torch
from on_a_gpu import DEVICE, MARKS
from op_samples import all_ops, outputs, run, samples
from torch import Tensor

import nnarch
from nnarch import library

pytestmark = MARKS

# Weights are packed for the CPU alone (kernels/recurrent/README.md): without a GPU kernel.
CPU_ONLY = {"recurrent_pack"}
# Triton's kernels have no float64, and samples of these operations are in float32 already.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def exact_products():
    """torch rounds the operands of float32 convolutions to TF32 unless asked, and so do kernels."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    yield
    conv.fp32_precision = before


def moved(name, args):
    """The arguments on the GPU, but for those that stay on the CPU by definition."""
    names = [argument.name for argument in library.OPS[name].overload._schema.arguments]
    return [
        a.to(DEVICE) if isinstance(a, Tensor) and n != "batch_sizes" else a
        for n, a in zip(names, args, strict=True)
    ]


def test_what_has_no_kernel_is_known():
    assert {n for n in all_ops() if library.OPS[n].gpu is None} == CPU_ONLY


@pytest.mark.parametrize("name", [n for n in all_ops() if n not in CPU_ONLY])
def test_every_operation(name):
    op = library.OPS[name]
    backend = op.gpu_backend if DEVICE == "cuda" else "cpu"
    for args in samples(name):
        with nnarch.trace() as record:
            mine = outputs(run(name, *moved(name, args)))
        assert {e.backend for e in record} == {backend}
        if name.endswith("_pack"):
            continue  # packed weights have the order that their kernel reads
        for a, b in zip(mine, outputs(op.reference(*args)), strict=True):
            assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, DEVICE)
            tolerance = TOLERANCE.get(a.dtype, 1e-6)
            torch.testing.assert_close(
                a.cpu(), b, rtol=tolerance, atol=tolerance, check_stride=False
            )
