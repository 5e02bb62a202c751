"""conv1d and conv_transpose1d against torch: the addresses of a signal, not the products again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import DTYPES, VIEWS, compare, equal_to_torch, name_of, small_integers
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F

# x, weight, then stride, padding, dilation, groups
CONVS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    "pointwise": ((2, 17, 9), (19, 17, 1), (1, 0, 1, 1)),
    "3": ((2, 18, 13), (20, 18, 3), (1, 1, 1, 1)),
    "stride 2": ((1, 18, 13), (20, 18, 4), (2, 1, 1, 1)),
    "same": ((2, 9, 11), (7, 9, 3), (1, "same", 1, 1)),
    "same, even kernel": ((2, 9, 11), (7, 9, 4), (1, "same", 1, 1)),
    "same, dilated": ((2, 9, 11), (7, 9, 2), (1, "same", 3, 1)),
    "valid": ((2, 9, 11), (7, 9, 4), (1, "valid", 1, 1)),
    "dilated": ((2, 9, 31), (7, 9, 3), ((3,), (2,), (4,), 1)),
    "groups": ((2, 12, 11), (18, 4, 3), (1, 1, 1, 3)),
    "depthwise": ((2, 12, 11), (24, 1, 5), (2, 2, 1, 12)),
    "waveform": ((2, 1, 400), (16, 1, 25), (4, 11, 1, 1)),
    "long": ((2, 5, 150), (17, 5, 3), (1, 1, 1, 1)),
    "long, in two blocks": ((1, 3, 701), (15, 3, 3), (1, 1, 1, 1)),
    "long, stride": ((2, 3, 700), (15, 3, 10), (5, 2, 1, 1)),
    "long, dilated stride": ((1, 4, 900), (29, 4, 4), (3, 7, 2, 1)),
    "long, step past the kernel": ((1, 2, 900), (3, 2, 2), (7, 0, 1, 1)),
    "long, more padding than signal": ((1, 2, 9), (3, 2, 3), (1, 70, 1, 1)),
    "one sample": ((3, 9, 1), (5, 9, 3), (1, 1, 1, 1)),
    "no batch": ((0, 9, 8), (5, 9, 3), (1, 1, 1, 1)),
    "unbatched": ((9, 8), (5, 9, 3), (1, 1, 1, 1)),
}
# x, weight, then stride, padding, output padding, groups, dilation
TRANSPOSED: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    "4, stride 2": ((2, 17, 9), (17, 19, 4), (2, 1, 0, 1, 1)),
    "3": ((2, 17, 9), (17, 19, 3), (1, 1, 0, 1, 1)),
    "output padding": ((2, 17, 9), (17, 19, 3), (2, 1, 1, 1, 1)),
    "more output padding than stride": ((2, 17, 5), (17, 18, 3), ((2,), (1,), (3,), 1, (4,))),
    "waveform": ((2, 16, 33), (16, 1, 25), (4, 11, 1, 1, 1)),
    "groups": ((2, 12, 7), (12, 10, 4), (2, 1, 0, 3, 1)),
    "depthwise": ((2, 12, 7), (12, 1, 4), (2, 1, 0, 12, 1)),
    "one sample": ((3, 9, 1), (9, 20, 4), (1, 0, 0, 1, 1)),
    "no batch": ((0, 9, 8), (9, 20, 3), (1, 1, 0, 1, 1)),
    "unbatched": ((9, 8), (9, 20, 4), (2, 1, 0, 1, 1)),
}
ALL = [("conv1d", name) for name in CONVS] + [("conv_transpose1d", name) for name in TRANSPOSED]


def prepared(op: str, name: str, dtype: torch.dtype = torch.float32):
    """Ours, torch's, and the tensors that both take by name."""
    x, weight, steps = (CONVS if op == "conv1d" else TRANSPOSED)[name]
    channels = weight[0] if op == "conv1d" else weight[1] * steps[3]
    tensors = {
        "input": torch.randn(x, dtype=dtype),
        "weight": torch.randn(weight, dtype=dtype) / weight[0] ** 0.5,
        "bias": torch.randn(channels, dtype=dtype),
    }
    ours, theirs = getattr(F, op), getattr(TF, op)
    return (
        lambda input, weight, bias: ours(input, weight, bias, *steps),
        lambda input, weight, bias: theirs(input, weight, bias, *steps),
        tensors,
    )


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(("op", "name"), ALL)
def test_forward_and_gradients(op, name, dtype):
    ours, theirs, tensors = prepared(op, name, dtype)
    grad = torch.randn_like(ours(**tensors))
    y = compare(ours, theirs, tensors, grad, ulps=16 if dtype == torch.float32 else None)
    assert y.is_contiguous()


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(("op", "name"), ALL)
def test_views(op, name, view):
    ours, theirs, tensors = prepared(op, name)
    grad = VIEWS[view](small_integers(ours(**tensors)))
    strange = {key: VIEWS[view](small_integers(t)) for key, t in tensors.items()}
    equal_to_torch(ours, theirs, strange, grad)


@pytest.mark.parametrize(
    ("op", "name"), [("conv1d", "stride 2"), ("conv_transpose1d", "output padding")]
)
def test_gradcheck(op, name):
    ours, _, tensors = prepared(op, name, torch.float64)
    leaves = [t.requires_grad_() for t in tensors.values()]
    assert torch.autograd.gradcheck(ours_of(ours, tensors), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(ours_of(ours, tensors), leaves, fast_mode=True)


def ours_of(function, tensors):
    """`function` of positional tensors."""
    return lambda *values: function(**dict(zip(tensors, values, strict=True)))


def test_the_epilogue():
    x, weight, scale, shift = (torch.randn(*s) for s in ((2, 6, 9), (4, 6, 3), (4,), (4,)))
    residual = torch.randn(2, 4, 9)
    y = F.conv1d(
        x, weight, padding=1, scale=scale, shift=shift, residual=residual, activation="relu"
    )
    z = TF.conv1d(x, weight, padding=1) * scale[:, None] + shift[:, None] + residual
    torch.testing.assert_close(y, z.relu(), rtol=1e-5, atol=1e-5)
    y = F.conv_transpose1d(
        x, weight.transpose(0, 1), padding=1, scale=scale, residual=residual, activation="silu"
    )
    z = TF.conv_transpose1d(x, weight.transpose(0, 1), padding=1) * scale[:, None] + residual
    torch.testing.assert_close(y, TF.silu(z), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "gelu", ("leaky_relu", 0.1)])
@pytest.mark.parametrize("length", [64, 100, 300])
def test_the_epilogue_of_long_signals(activation, length):
    x, weight = torch.randn(2, 6, length), torch.randn(31, 6, 3)
    bias, scale, shift = torch.randn(31), torch.randn(31), torch.randn(31)
    residual = torch.randn(2, 31, length)

    def expected(*more):
        z = TF.conv1d(x, weight, bias, padding=1)
        for vector in more:
            z = vector(z)
        return (
            F.activation(z, activation)
            if isinstance(activation, str)
            else (z if activation is None else TF.leaky_relu(z, 0.1))
        )

    with nnarch.trace() as trace:
        y = F.conv1d(x, weight, bias, padding=1, activation=activation)
    assert [event.algorithm for event in trace] == ["signal"]
    torch.testing.assert_close(y, expected(), rtol=1e-5, atol=1e-5)
    y = F.conv1d(
        x, weight, bias, padding=1, scale=scale, shift=shift, residual=residual,
        activation=activation,
    )  # fmt: skip
    z = expected(lambda z: z * scale[:, None], lambda z: z + shift[:, None] + residual)
    torch.testing.assert_close(y, z, rtol=1e-5, atol=2e-5)


def test_long_signals_keep_what_is_not_finite():
    x = torch.randn(1, 3, 100)
    x[0, 1, 50], x[0, 2, 80] = torch.nan, torch.inf
    y = F.conv1d(x, torch.ones(5, 3, 3), padding=1, activation="relu")
    assert y.isnan().nonzero()[:, 2].unique().tolist() == [49, 50, 51]
    assert y.isinf().nonzero()[:, 2].unique().tolist() == [79, 80, 81]


def test_packed_weights_of_long_signals():
    x, weight = torch.randn(1, 20, 100), torch.randn(18, 20, 4)
    packed = F.pack_conv2d_weight(weight.unsqueeze(2))
    assert torch.equal(F.conv1d(x, weight, packed=packed), F.conv1d(x, weight))
    with pytest.raises((ValueError, RuntimeError), match="packed"):
        F.conv1d(x, weight, packed=packed[1:].clone())


def test_packed_weights():
    x, weight = torch.randn(2, 20, 9), torch.randn(20, 18, 4)
    packed = F.pack_conv_transpose2d_weight(weight.unsqueeze(2), (1, 2), 1, 1)
    y = F.conv_transpose1d(x, weight, None, 2, 1, packed=packed)
    assert torch.equal(y, F.conv_transpose1d(x, weight, None, 2, 1))
    packed = F.pack_conv2d_weight(weight.unsqueeze(2).transpose(0, 1))
    y = F.conv1d(x, weight.transpose(0, 1), packed=packed)
    assert torch.equal(y, F.conv1d(x, weight.transpose(0, 1)))


def test_numpy_arrays():
    x, weight = np.ones((1, 2, 5), np.float32), np.ones((3, 2, 3), np.float32)
    assert isinstance(F.conv1d(x, weight), np.ndarray)
    assert F.conv_transpose1d(x, weight.transpose(1, 0, 2), stride=2).shape == (1, 3, 11)


X, W, V = torch.ones(2, 6, 9), torch.ones(4, 6, 3), torch.ones(5)
X4 = X[:, :4]


@pytest.mark.parametrize(
    ("error", "message", "bad"),
    [
        (TypeError, "conv1d: x .*list", lambda: F.conv1d([1.0], W)),
        (TypeError, "conv1d: x .*int32", lambda: F.conv1d(X.int(), W)),
        (ValueError, r"conv1d: x must be 2-D or 3-D.*\(9,\)", lambda: F.conv1d(X[0, 0], W)),
        (ValueError, "conv1d: weight must be 3-D", lambda: F.conv1d(X, W[0])),
        (ValueError, "conv1d: weight has 5 .*6", lambda: F.conv1d(X, W[:, :5])),
        (ValueError, "conv1d: stride .*one number", lambda: F.conv1d(X, W, stride=(1, 2))),
        (ValueError, "conv1d: stride .*0", lambda: F.conv1d(X, W, stride=0)),
        (TypeError, "conv1d: dilation .*1.5", lambda: F.conv1d(X, W, dilation=1.5)),
        (ValueError, "conv1d: padding .*full", lambda: F.conv1d(X, W, padding="full")),
        (ValueError, "conv1d: padding 'same'", lambda: F.conv1d(X, W, stride=2, padding="same")),
        (ValueError, r"conv1d: bias .*\(4,\)", lambda: F.conv1d(X, W, V)),
        (ValueError, "conv1d: groups=4", lambda: F.conv1d(X, W, groups=4)),
        (ValueError, "conv1d: residual", lambda: F.conv1d(X, W, residual=X)),
        (ValueError, "conv1d: activation", lambda: F.conv1d(X, W, activation="mish")),
        (ValueError, "conv1d: bias", lambda: F.conv1d(X, W[:, :1].repeat(3, 1, 1), V, groups=6)),
        (ValueError, "conv_transpose1d: x has 6", lambda: F.conv_transpose1d(X, W)),
        (ValueError, "conv_transpose1d: nothing", lambda: F.conv_transpose1d(X4, W, padding=9)),
        (ValueError, "conv_transpose1d: output_padding",
         lambda: F.conv_transpose1d(X4, W, output_padding=1)),
        (TypeError, "conv_transpose1d: padding .*'same'",
         lambda: F.conv_transpose1d(X4, W, padding="same")),
    ],
)  # fmt: skip
def test_bad_input(error, message, bad):
    with pytest.raises(error, match=message):
        bad()
