"""Every declared operation: opcheck, agreement with its reference, fallbacks."""

from __future__ import annotations

import copy

import pytest
import torch
from op_samples import all_ops, gradients, outputs, run, samples
from torch import Tensor

import nnarch
from nnarch import library
from nnarch.kernels.activation import kinds

OPS = all_ops()

# ------------------------------------------------------------------------------- every operation


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    """Schema, fake function and autograd registration agree with what the kernel does."""
    for args in samples(name):
        torch.library.opcheck(getattr(torch.ops.nnarch, name).default, args)


@pytest.mark.parametrize("name", OPS)
def test_native_agrees_with_the_reference(name):
    op = library.OPS[name]
    assert op.has_native, f"nnarch::{name} has no native kernel"
    if name.endswith("_pack"):
        pytest.skip("packed weights have the order that their kernel reads")
    for args in samples(name):
        mine, reference = outputs(run(name, *args)), outputs(op.reference(*args))
        for a, b in zip(mine, reference, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", OPS)
def test_inputs_are_left_alone(name):
    for args in samples(name):
        before = copy.deepcopy(args)
        run(name, *args)
        for a, b in zip(args, before, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors(name):
    for args in samples(name):
        if name.endswith("_pack"):
            continue  # the size follows the instruction set: only a trace can carry it
        meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
        for a, b in zip(outputs(run(name, *meta)), outputs(run(name, *args)), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("name", OPS)
def test_gradients_agree_with_the_reference(name):
    """The formula on native kernels against torch's own derivative of the definition.

    What has no gradient raises; it never returns nothing.
    """
    op = library.OPS[name]
    if name in ("batch_norm_backward", "layer_norm_backward"):
        pytest.skip("its statistics are functions of x: gradgradcheck in the family's own tests")
    for args in samples(name):
        try:
            mine = gradients(name, args)
        except NotImplementedError as error:
            assert name in str(error)
            continue
        assert any(g is not None for g in mine)
        truth = gradients(name, args, op.reference)
        for a, b in zip(mine, truth, strict=True):
            if a is not None:  # a second derivative may be zeros where torch sees no dependence
                b = torch.zeros_like(a) if b is None else b
                torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)
            else:
                assert b is None


@pytest.mark.parametrize("name", ["conv2d", "depthwise_conv2d", "linear"])
def test_a_fused_call_refuses_gradients_that_it_cannot_give(name):
    """The public functions never ask; who calls the operation itself gets no wrong number."""
    args = list(next(a for a in samples(name) if a[3] is not None and a[2] is not None))
    scale = args[3] = args[3].clone().requires_grad_()
    code = -2  # the activation
    with pytest.raises(NotImplementedError, match=f"nnarch::{name} .*gradient for scale"):
        args[code] = kinds.RELU
        run(name, *args).sum().backward()
    with pytest.raises(NotImplementedError, match=f"nnarch::{name} .*silu"):
        args[code] = kinds.SILU
        run(name, *args)
    assert scale.grad is None


# ------------------------------------------------------------------------------- the declaration


@pytest.fixture(scope="module")  # the dispatcher keeps what it was told
def throwaway():
    """An operation that only this file knows."""
    name = "test_throwaway"
    declared = library.declare(
        f"{name}(Tensor x) -> Tensor",
        reference=lambda x: x + 1,
        fake=lambda x: library.new_output(x, x.shape),
        gpu="nnarch.no_such_module:launch",
    )
    yield declared
    del library.OPS[name]


def test_fallback_warns_once_and_is_visible(throwaway):
    library._warn_fallback.cache_clear()
    x = torch.randn(3)
    warned = pytest.warns(nnarch.FallbackWarning, match="nnarch::test_throwaway")
    with warned as warnings, nnarch.trace() as t:
        y = throwaway(x)
    assert torch.equal(y, x + 1)
    assert warnings[0].filename == __file__  # whoever called, not what is between
    assert [entry.backend for entry in t] == ["reference"]
    throwaway(x)  # a second warning would be an error here (pyproject.toml)


def test_no_gradient_is_an_error_not_a_number(throwaway):
    library._warn_fallback.cache_clear()
    with pytest.warns(nnarch.FallbackWarning):
        y = throwaway(torch.randn(3, requires_grad=True))
    with pytest.raises(NotImplementedError, match="test_throwaway is not differentiable"):
        y.sum().backward()
