"""Bad arguments: an error that names the function, the argument, what was expected and what came.

Never a crash, never a wrong answer; and a failed call leaves its inputs as they were.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nnarch
from nnarch import functional as F

X, W, DW = torch.ones(2, 6, 8, 8), torch.ones(4, 6, 3, 3), torch.ones(6, 1, 3, 3)
V4, V5, V6 = torch.ones(4), torch.ones(5), torch.ones(6)
A, B = torch.ones(9, 6), torch.ones(4, 6)  # linear's x and weight
ONE, HUGE = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1).expand(1, 1, 2**63 - 1, 1)
FP8 = torch.float8_e4m3fn

BAD = [
    # conv2d: tensors
    (TypeError, "conv2d: x .*list", lambda: F.conv2d([1.0], W)),
    (TypeError, "conv2d: weight .*NoneType", lambda: F.conv2d(X, None)),
    (TypeError, "conv2d: weight .*ndarray", lambda: F.conv2d(X, np.ones((4, 6, 3, 3)))),
    (TypeError, "conv2d: x .*int32", lambda: F.conv2d(X.int(), W)),
    (TypeError, "conv2d: x .*complex64", lambda: F.conv2d(X.to(torch.complex64), W)),
    (TypeError, "conv2d: x .*sparse", lambda: F.conv2d(X.to_sparse(), W)),
    (TypeError, "conv2d: weight .*float32.*float64", lambda: F.conv2d(X, W.double())),
    (ValueError, "conv2d: weight .*meta.*cpu", lambda: F.conv2d(X.to("meta"), W)),
    (ValueError, r"conv2d: x .*4-D.*\(8, 8\)", lambda: F.conv2d(X[0, 0], W)),
    (ValueError, r"conv2d: weight .*4-D.*\(6, 3, 3\)", lambda: F.conv2d(X, W[0])),
    (ValueError, "conv2d: weight has 5 .*6", lambda: F.conv2d(X, W[:, :5])),
    (ValueError, "conv2d: weight .*no output channels", lambda: F.conv2d(X, W[:0])),
    (ValueError, "conv2d: .*kernel.*0", lambda: F.conv2d(X, W[:, :, :0])),
    (ValueError, "conv2d: the kernel of 9×3 .*larger", lambda: F.conv2d(X, torch.ones(4, 6, 9, 3))),
    (TypeError, "conv2d: x .*float8", lambda: F.conv2d(X.to(FP8), W.to(FP8))),
    (TypeError, "conv2d: x .*_mkldnn", lambda: F.conv2d(torch.ones(2, 6, 8, 8).to_mkldnn(), W)),
    (ValueError, "conv2d: size overflows", lambda: F.conv2d(HUGE, ONE, padding=1)),
    (ValueError, "conv2d: size overflows", lambda: F.conv2d(ONE, HUGE.transpose(0, 2))),
    # conv2d: numbers
    (ValueError, r"conv2d: stride .*\(0, 0\)", lambda: F.conv2d(X, W, stride=0)),
    (TypeError, "conv2d: stride .*1.5", lambda: F.conv2d(X, W, stride=1.5)),
    (TypeError, "conv2d: stride .*None", lambda: F.conv2d(X, W, stride=None)),
    (TypeError, "conv2d: stride .*'2'", lambda: F.conv2d(X, W, stride="2")),
    (ValueError, "conv2d: stride must be 2", lambda: F.conv2d(X, W, stride=(1, 1, 1))),
    (ValueError, "conv2d: stride .*below", lambda: F.conv2d(X, W, stride=2**62)),
    (ValueError, "conv2d: stride .*below", lambda: F.conv2d(X, W, stride=2**70)),
    (ValueError, "conv2d: padding .*-1", lambda: F.conv2d(X, W, padding=-1)),
    (ValueError, "conv2d: padding .*full", lambda: F.conv2d(X, W, padding="full")),
    (TypeError, "conv2d: padding .*None", lambda: F.conv2d(X, W, padding=None)),
    (ValueError, "conv2d: padding .*1, 2 or 4", lambda: F.conv2d(X, W, padding=(1, 1, 1))),
    (ValueError, "conv2d: padding .*below", lambda: F.conv2d(X, W, padding=2**62)),
    (ValueError, "'same' needs stride 1", lambda: F.conv2d(X, W, stride=2, padding="same")),
    (ValueError, "conv2d: dilation .*0", lambda: F.conv2d(X, W, dilation=0)),
    (ValueError, "conv2d: dilation .*below", lambda: F.conv2d(X, W, dilation=2**40)),
    (ValueError, "conv2d: groups=4 ", lambda: F.conv2d(X, W, groups=4)),
    (ValueError, "conv2d: groups .*0", lambda: F.conv2d(X, W, groups=0)),
    (TypeError, "conv2d: groups .*2.0", lambda: F.conv2d(X, W, groups=2.0)),
    # conv2d: epilogue
    (ValueError, r"conv2d: bias .*\(4,\).*\(5,\)", lambda: F.conv2d(X, W, V5)),
    (TypeError, "conv2d: bias .*float", lambda: F.conv2d(X, W, 3.0)),
    (TypeError, "conv2d: bias .*float64", lambda: F.conv2d(X, W, V4.double())),
    (ValueError, r"conv2d: scale .*\(4, 1\)", lambda: F.conv2d(X, W, scale=V4[:, None])),
    (ValueError, r"conv2d: shift .*\(6,\)", lambda: F.conv2d(X, W, shift=V6)),
    (ValueError, "conv2d: residual .*2, 4, 6, 6.*2, 6", lambda: F.conv2d(X, W, residual=X)),
    (TypeError, "conv2d: residual .*float", lambda: F.conv2d(X, W, residual=1.0)),
    (ValueError, "conv2d: activation .*mish", lambda: F.conv2d(X, W, activation="mish")),
    (TypeError, "conv2d: activation .*1", lambda: F.conv2d(X, W, activation=1)),
    (ValueError, "conv2d: alpha .*-1", lambda: F.conv2d(X, W, activation=("leaky_relu", -1))),
    (ValueError, "conv2d: packed", lambda: F.conv2d(X, W, packed=V4)),
    (TypeError, "conv2d: packed .*list", lambda: F.conv2d(X, W, packed=[1.0])),
    (ValueError, "conv2d: packed .*meta", lambda: F.conv2d(X, W, packed=V4.to("meta"))),
    # depthwise
    (ValueError, "depthwise_conv2d: packed", lambda: F.conv2d(X, DW, groups=6, packed=V4)),
    (ValueError, r"depthwise_conv2d: bias .*6.*5", lambda: F.conv2d(X, DW, V5, groups=6)),
    (ValueError, "depthwise_conv2d: stride", lambda: F.conv2d(X, DW, stride=0, groups=6)),
    # linear
    (TypeError, "linear: x .*int", lambda: F.linear(3, B)),
    (ValueError, "linear: x ", lambda: F.linear(A[0, 0], B)),
    (ValueError, "linear: .*weight", lambda: F.linear(A, B[0])),
    (ValueError, r"linear: .*\(5\).*\(6\)", lambda: F.linear(A[:, :5], B)),
    (TypeError, "linear: x .*int64", lambda: F.linear(A.long(), B)),
    (TypeError, "linear: weight .*float16", lambda: F.linear(A, B.half())),
    (ValueError, r"linear: bias .*\(4,\).*\(6,\)", lambda: F.linear(A, B, V6)),
    (ValueError, "linear: residual", lambda: F.linear(A, B, residual=V4)),
    (ValueError, "linear: activation .*prelu", lambda: F.linear(A, B, activation="prelu")),
    (ValueError, "linear: packed", lambda: F.linear(A, B, packed=V4)),
    (ValueError, "linear: packed .*meta", lambda: F.linear(A, B, packed=V4.to("meta"))),
    (TypeError, "linear: x .*nested", lambda: F.linear(torch.nested.nested_tensor([A, A]), B)),
    # packing
    (ValueError, "conv2d_pack: weight .*4-D", lambda: F.pack_conv2d_weight(B)),
    (ValueError, "conv2d_pack: .*groups", lambda: F.pack_conv2d_weight(W, 3)),
    (TypeError, "pack_conv2d_weight: groups .*2.0", lambda: F.pack_conv2d_weight(W, 2.0)),
    (ValueError, "conv2d_pack: tile .*3", lambda: F.pack_conv2d_weight(W, tile=3)),
    (ValueError, "conv2d_pack: tile .*got 4", lambda: F.pack_conv2d_weight(W[:, :, :2], tile=4)),
    (ValueError, "conv2d_tile: x must be 4-D", lambda: F.conv2d_tile(W, (3, 8, 8))),
    (ValueError, "linear_pack: weight .*2-D", lambda: F.pack_linear_weight(W)),
    # activation
    (ValueError, "activation: .*mish", lambda: F.activation(X, "mish")),
    (TypeError, "activation: x .*float", lambda: F.activation(3.0, "relu")),
    (TypeError, "activation: x .*int32", lambda: F.activation(X.int(), "relu")),
    (ValueError, "activation: .*alpha", lambda: F.activation(X, "relu", alpha=0.1)),
    (TypeError, "activation: alpha .*'x'", lambda: F.activation(X, "leaky_relu", alpha="x")),
    # pooling
    (TypeError, "max_pool2d: input .*NoneType", lambda: F.max_pool2d(None, 2)),
    (ValueError, r"max_pool2d: input .*\(8, 8\)", lambda: F.max_pool2d(X[0, 0], 2)),
    (ValueError, "max_pool2d: kernel.*0", lambda: F.max_pool2d(X, 0)),
    (TypeError, "max_pool2d: kernel_size .*2.0", lambda: F.max_pool2d(X, 2.0)),
    (ValueError, "max_pool2d: pad.*2", lambda: F.max_pool2d(X, 2, padding=2)),
    (ValueError, "max_pool2d: .*11", lambda: F.max_pool2d(X, 11)),
    (ValueError, "max_pool2d: dilation.*0", lambda: F.max_pool2d(X, 2, dilation=0)),
    (TypeError, "max_pool2d: input .*int32", lambda: F.max_pool2d(X.int(), 2)),
    (ValueError, "avg_pool2d: stride.*0", lambda: F.avg_pool2d(X, 2, 0)),
    (ValueError, "avg_pool2d: divisor.*0", lambda: F.avg_pool2d(X, 2, divisor_override=0)),
    (ValueError, "avg_pool2d: pad.*-1", lambda: F.avg_pool2d(X, 2, padding=-1)),
    (ValueError, "adaptive_avg_pool2d: output_size.*-1", lambda: F.adaptive_avg_pool2d(X, -1)),
    (TypeError, "adaptive_avg_pool2d: output_size.*7", lambda: F.adaptive_avg_pool2d(X, "7")),
    (TypeError, "adaptive_max_pool2d: input .*int", lambda: F.adaptive_max_pool2d(3, 1)),
    # normalization
    (ValueError, "batch_norm: running_mean", lambda: F.batch_norm(X, None, None)),
    (ValueError, "batch_norm: running_mean .*6.*5", lambda: F.batch_norm(X, V5, V6)),
    (ValueError, "batch_norm: weight .*6.*5", lambda: F.batch_norm(X, V6, V6, V5)),
    (ValueError, "more than 1 value", lambda: F.batch_norm(V6[None], None, None, training=True)),
    (ValueError, "residual .*6", lambda: F.batch_norm(X, V6, V6, residual=V6)),
    (TypeError, "batch_norm: input .*int32", lambda: F.batch_norm(X.int(), V6, V6)),
    (TypeError, "batch_norm: running_mean .*list", lambda: F.batch_norm(X, [0.0] * 6, V6)),
    (TypeError, "batch_norm: weight .*float", lambda: F.batch_norm(X, V6, V6, 1.0)),
    (ValueError, "batch_norm: bias .*meta", lambda: F.batch_norm(X, V6, V6, None, V6.to("meta"))),
    (TypeError, "batch_norm: momentum .*None", lambda: F.batch_norm(X, V6, V6, momentum=None)),
    (ValueError, "batch_norm: eps .*-1", lambda: F.batch_norm(X, V6, V6, training=True, eps=-1)),
    # backends
    (ValueError, "use_backend: name .*tpu", lambda: nnarch.use_backend("tpu").__enter__()),
]
ROWS = [pytest.param(*row, id=row[1]) for row in BAD]
# Only native kernels read packed weights; the other backends ignore them.
REFERENCE_ROWS = [
    row for row in ROWS if "pack" not in str(row.id) and "overflows" not in str(row.id)
]


@pytest.mark.parametrize(("error", "message", "call"), ROWS)
def test_bad_input(error, message, call):
    with torch.no_grad(), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("error", "message", "call"), ROWS)
def test_bad_input_where_a_gradient_is_wanted(error, message, call):
    tensors = [t for t in (X, W, DW, A, B) if t.is_floating_point()]
    for t in tensors:
        t.requires_grad_()
    try:
        with pytest.raises(error, match=message):
            call()
    finally:
        for t in tensors:
            t.requires_grad_(False)


@pytest.mark.parametrize(("error", "message", "call"), REFERENCE_ROWS)
def test_bad_input_of_the_reference(error, message, call):
    with nnarch.use_backend("reference"), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_bad_epilogue_where_a_gradient_is_wanted(activation):
    """Whether the epilogue runs fused or apart."""
    x = X.clone().requires_grad_()
    for name, value in (("scale", V5), ("shift", V5), ("residual", X)):
        with pytest.raises(ValueError, match=name):
            F.conv2d(x, W, activation=activation, **{name: value})
    with pytest.raises(TypeError, match="conv2d: bias"):
        F.conv2d(x, W, 3.0, activation=activation)


def test_a_failed_call_leaves_its_inputs():
    x, mean, var = torch.randn(2, 6, 8, 8), torch.randn(6), torch.rand(6)
    kept = [t.clone() for t in (x, mean, var)]
    for bad in ({"weight": V5}, {"residual": V6}):
        with pytest.raises(ValueError):
            F.batch_norm(x, mean, var, training=True, **bad)
    for t, before in zip((x, mean, var), kept, strict=True):
        assert torch.equal(t, before)


@pytest.mark.parametrize("call", [lambda x: F.linear(x, B), lambda x: F.activation(x, "relu")])
def test_freed_memory_is_an_error(call):
    x = torch.ones(9, 6)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed"):
        call(x)


def test_more_memory_than_there_is():
    with pytest.raises(RuntimeError, match="not enough memory: a tensor of 4611686018427387904 b"):
        F.linear(torch.ones(1, 1).expand(2**60, 1), torch.ones(1, 1))


def test_geometry_as_torch_takes_it():
    """NumPy's integers, and sequences of one number."""
    expected = torch.nn.functional.conv2d(X, W, stride=2, padding=1)
    for two, one in ((np.int64(2), np.int64(1)), ([2], [1]), ((2,), (1,)), ([2, 2], [1, 1])):
        y = F.conv2d(X, W, stride=two, padding=one, dilation=one)
        torch.testing.assert_close(y, expected)
