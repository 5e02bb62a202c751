"""GatedLinear and GatedFeedForward against the same two and three Linear modules of torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional as TF

import nnarch
from nnarch import nn


def plain(module: nn.GatedLinear, x: torch.Tensor) -> torch.Tensor:
    """What the module means, by torch."""
    act = {"silu": TF.silu, "gelu": TF.gelu, "relu": TF.relu, None: lambda z: z}[module.activation]
    gate, up = module.gate_proj, module.up_proj
    y = act(TF.linear(x, gate.weight, gate.bias)) * TF.linear(x, up.weight, up.bias)
    if isinstance(module, nn.GatedFeedForward):
        y = TF.linear(y, module.down_proj.weight, module.down_proj.bias)
    return y


@pytest.mark.parametrize("kind", [nn.GatedLinear, nn.GatedFeedForward])
@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", None])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_gradients(kind, activation, bias):
    module = kind(10, 14, bias=bias, activation=activation, dtype=torch.float64)
    x = torch.randn(3, 5, 10, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    y, z = module(x), plain(module, x)
    torch.testing.assert_close(y, z)
    mine = torch.autograd.grad(y.square().sum(), leaves)
    torch.testing.assert_close(mine, torch.autograd.grad(z.square().sum(), leaves))


def test_names_of_checkpoints():
    names = [f"{n}_proj.weight" for n in ("gate", "up", "down")]
    assert list(nn.GatedFeedForward(4, 6).state_dict()) == names


def test_packed_weights_follow_the_weights():
    module = nn.GatedFeedForward(16, 24).eval()
    x = torch.randn(7, 16)
    with torch.no_grad():
        with nnarch.trace() as trace:
            module(x)
        assert [e.algorithm for e in trace][-2:] == ["gated_gemm_packed", "gemm_packed"]
        module.up_proj.weight.mul_(2)
        torch.testing.assert_close(module(x), plain(module, x))
        module.gate_proj.weight = torch.nn.Parameter(torch.randn(24, 16))
        torch.testing.assert_close(module(x), plain(module, x))
    assert module._packed is not None
    module.train()
    assert module._packed is None


def test_copies():
    module = nn.GatedLinear(6, 8).eval()
    x = torch.randn(2, 6)
    with torch.no_grad():
        y = module(x)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x), y)
    assert "activation=silu" in repr(module)


@pytest.mark.parametrize("training", [False, True])
def test_compile(training):
    module = nn.GatedFeedForward(6, 8).train(training)
    x = torch.randn(2, 6, requires_grad=training)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    if training:
        compiled(x).sum().backward()
        assert x.grad is not None


def test_autocast():
    module, x = nn.GatedLinear(6, 8), torch.randn(2, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(module, x), rtol=0.05, atol=0.05)


def test_unknown_activation():
    with pytest.raises(ValueError, match="GatedLinear: activation must be one of"):
        nn.GatedLinear(3, 4, activation="swish")
