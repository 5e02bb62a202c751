"""On a real GPU: where torch's settings ask for TF32, as they do for convolutions by default."""

import pytest
import torch
from tolerances import assert_as_accurate

from nnarch import functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# An operand keeps 10 bits behind its first. Were the others dropped and not rounded, each factor of
# a product would be off by 2⁻¹⁰ at most. An H100 had 7.2e-4 where torch had 2.7e-4: ours seem to
# be dropped, torch's rounded.
TF32 = 2.0**-9

OPERATIONS = {
    "conv": (torch.backends.cudnn.conv, F.conv2d, (2, 64, 14, 14), (96, 64, 3, 3)),
    "linear": (torch.backends.cuda.matmul, F.linear, (130, 256), (70, 256)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_error_is_that_of_tf32(name, monkeypatch):
    setting, operation, size, weight_size = OPERATIONS[name]
    x, weight = torch.randn(size), torch.randn(weight_size)
    truth = operation(x.double(), weight.double())
    monkeypatch.setattr(setting, "fp32_precision", "tf32")
    error = (operation(x.cuda(), weight.cuda()).cpu() - truth).norm() / truth.norm()
    assert 1e-5 < error < TF32
    monkeypatch.setattr(setting, "fp32_precision", "ieee")
    got = operation(x.cuda(), weight.cuda()).cpu()
    assert_as_accurate(got, truth.float(), truth, ulps=16)
