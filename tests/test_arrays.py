"""NumPy, CuPy and other DLPack arrays in place of tensors: the same kind back, nothing copied."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as TF

from nnarch import arrays
from nnarch import functional as F

RANDOM = np.random.default_rng(0)


def array(*size: int, dtype: type = np.float32) -> np.ndarray:
    return RANDOM.standard_normal(size).astype(dtype)


X, W, B = array(2, 6, 9, 8), array(4, 6, 3, 3), array(4)
MEAN, VAR = array(6), np.abs(array(6)) + 0.5
ROWS, MATRIX = array(5, 7), array(3, 7)
INDICES = torch.arange(9 * 8).view(9, 8).expand(2, 6, 9, 8)  # of the unpooled pixels
HEADS = (array(2, 3, 5, 8), array(2, 3, 7, 8), array(2, 3, 7, 6))
TOKENS = np.array([[0, 4], [2, 2], [1, 3]])
CLASSES = torch.tensor([0, 2, 1, 1, 0])


def _log_sums(q):
    """Of attention's rows, float32 for halves."""
    dtype = torch.float64 if str(q.dtype).endswith("float64") else torch.float32
    return torch.ones(q.shape[:3], dtype=dtype)


def _tokens(like: Any) -> Any:
    """Rows of a table, as the kind of array that the table is."""
    return TOKENS if isinstance(like, np.ndarray) else torch.from_numpy(TOKENS)


def _in_dtype(x: Any, loss: Any) -> Any:
    """A float32 loss of half types in the dtype of `x`."""
    return loss.astype(x.dtype) if isinstance(loss, np.ndarray) else loss.to(x.dtype)


# The public functions, each with the arrays that it takes.
CALLS = {
    "conv2d": (F.conv2d, (X, W, B)),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=6), (X, array(6, 1, 3, 3))),
    "linear": (F.linear, (ROWS, MATRIX, array(3))),
    "activation": (lambda x: F.activation(x, "silu"), (X,)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (X,)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2), (X,)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 2), (X,)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), (X,)),
    "batch_norm": (F.batch_norm, (X, MEAN, VAR)),
    "conv1d": (F.conv1d, (X[:, :, 0], W[:, :, 0], B)),
    "conv_transpose1d": (F.conv_transpose1d, (X[:, :, 0], array(6, 4, 3), B)),
    "conv_transpose2d": (F.conv_transpose2d, (X, array(6, 4, 3, 3), B)),
    "depthwise_separable_conv2d": (
        F.depthwise_separable_conv2d,
        (X, array(6, 1, 3, 3), array(4, 6, 1, 1)),
    ),
    "capsule_routing": (F.capsule_routing, (array(3, 7, 4), array(5, 7, 2, 4))),
    "conv_capsule_routing2d": (
        F.conv_capsule_routing2d,
        (array(2, 3, 4, 6, 5), array(5, 3, 3, 3, 2, 4)),
    ),
    "squash": (F.squash, (X,)),
    "layer_norm": (lambda x: F.layer_norm(x, (7,)), (ROWS,)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (7,), w), (ROWS, array(7))),
    "cross_entropy": (
        lambda x: F.cross_entropy(x, CLASSES, reduction="none"),
        (ROWS,),
    ),
    "linear_cross_entropy": (
        lambda x, w: _in_dtype(x, F.linear_cross_entropy(x, w, CLASSES, reduction="none")),
        (ROWS, MATRIX),
    ),
    "attention": (F.attention, HEADS),
    "attention_weights": (lambda q, k: F.attention_weights(q, k, _log_sums(q)), HEADS[:2]),
    "scaled_dot_product_attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        HEADS,
    ),
    "dropout": (lambda x: F.dropout(x, 0.3, training=False), (ROWS,)),
    "embedding": (lambda w: F.embedding(_tokens(w), w), (ROWS,)),
    "embedding_layer_norm": (
        lambda w, p: F.embedding_layer_norm(_tokens(w), w, p),
        (ROWS, array(2, 7)),
    ),
    "gated_activation": (F.gated_activation, (ROWS, array(5, 7))),
    "gated_linear": (F.gated_linear, (ROWS, MATRIX, array(3, 7))),
    "local_response_norm": (lambda x: F.local_response_norm(x, 3), (X,)),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2), (X,)),
    "upsample": (lambda x: F.upsample(x, (5, 7), mode="bilinear"), (X,)),
    "max_unpool2d": (lambda x: F.max_unpool2d(x, INDICES, 2), (X,)),
    "lstm_layer": (lambda *a: F.lstm_layer(*a)[0], (array(4, 2, 3), array(20, 3), array(20, 5))),
    "gru_layer": (lambda *a: F.gru_layer(*a)[0], (array(4, 2, 3), array(15, 3), array(15, 5))),
    "rnn_layer": (lambda *a: F.rnn_layer(*a)[0], (array(4, 2, 3), array(5, 3), array(5, 5))),
    "lstm_cell": (
        lambda x, h, c, *w: F.lstm_cell(x, (h, c), *w)[0],
        (array(2, 3), array(2, 5), array(2, 5), array(20, 3), array(20, 5)),
    ),
    "gru_cell": (F.gru_cell, (array(2, 3), array(2, 5), array(15, 3), array(15, 5))),
    "rnn_cell": (F.rnn_cell, (array(2, 3), array(2, 5), array(5, 3), array(5, 5))),
    "reservoir_scan": (
        lambda x, w, w_in: F.reservoir_scan(x, w, w_in)[0],
        (array(4, 2, 3), array(5, 5), array(5, 3)),
    ),
    "reservoir_generate": (
        lambda x, y, w, w_in, w_out: F.reservoir_generate(x, y, w, w_in, w_out)[0],
        (array(4, 2, 3), array(2, 1), array(5, 5), array(5, 4), array(1, 5)),
    ),
}
every_call = pytest.mark.parametrize("call", CALLS)


def test_every_public_function_is_here():
    about_weights = {name for name in F.__all__ if name.startswith("pack_")}
    about_weights |= {"conv2d_tile", "conv_transpose2d_layout", "recurrent_pairs"}
    assert set(F.__all__) - about_weights <= set(CALLS)


@every_call
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_numpy_in_numpy_out(call, dtype):
    function, arguments = CALLS[call]
    arguments = [a.astype(dtype) for a in arguments]
    y = function(*arguments)
    truth = function(*map(torch.from_numpy, arguments))
    assert type(y) is np.ndarray and y.dtype == dtype
    assert np.array_equal(y, truth.numpy())


@every_call
@pytest.mark.parametrize(
    "view",
    [
        lambda a: np.ascontiguousarray(a.T).T,
        lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
        lambda a: np.ascontiguousarray(np.flip(a)).reshape(a.shape)[::-1],
    ],
    ids=["transposed", "strided", "negative strides"],
)
def test_strides(call, view):
    function, arguments = CALLS[call]
    if call == "linear":  # strides choose the order of its sums: whole numbers, exact in any
        arguments = [np.rint(4 * a) for a in arguments]
    views = [view(a) for a in arguments]
    dense = [np.ascontiguousarray(v) for v in views]
    assert np.array_equal(function(*views), function(*dense))


@every_call
def test_read_only(call):
    """Constants, memory maps and broadcasts: no warning, no write."""
    function, arguments = CALLS[call]
    frozen = [a.copy() for a in arguments]
    for a in frozen:
        a.flags.writeable = False
    assert np.array_equal(function(*frozen), function(*arguments))


def test_several_results():
    y, indices = F.max_pool2d(X, 2, return_indices=True)
    truth = TF.max_pool2d(torch.from_numpy(X), 2, return_indices=True)
    assert np.array_equal(y, truth[0].numpy())
    assert np.array_equal(indices, truth[1].numpy())


def test_arrays_among_the_options():
    residual = array(2, 4, 7, 6)
    y = F.conv2d(x=X, weight=W, scale=B, residual=residual, activation="relu")
    z = TF.conv2d(*map(torch.from_numpy, (X, W))).numpy() * B[:, None, None] + residual
    np.testing.assert_allclose(y, np.maximum(z, 0), rtol=1e-4, atol=1e-4)


def test_nothing_is_copied():
    """The operation sees the arrays' own memory, and the result is the operation's own."""
    seen: list[int] = []
    result = torch.empty(5, 3)

    @arrays.public
    def spy(x, weight):
        seen.extend((x.data_ptr(), weight.data_ptr()))
        return result

    y = spy(ROWS, MATRIX)
    assert seen == [ROWS.ctypes.data, MATRIX.ctypes.data]
    assert y.ctypes.data == result.data_ptr()


def test_the_result_outlives_its_tensor():
    kept = [F.linear(ROWS, MATRIX) for _ in range(50)]
    assert all(np.array_equal(kept[0], y) for y in kept)


def test_no_graph_is_recorded():
    weight = torch.nn.Parameter(torch.from_numpy(MATRIX.copy()))
    assert type(F.linear(ROWS, weight)) is np.ndarray


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_empty(shape):
    assert F.linear(np.empty(shape, np.float32), MATRIX).shape == (*shape[:-1], 3)


# ---------------------------------------------------------------------------- updates in place


def test_batch_norm_updates_running_statistics():
    mean, var = np.zeros(6, np.float32), np.ones(6, np.float32)
    expected = [torch.zeros(6), torch.ones(6)]
    F.batch_norm(X, mean, var, training=True)
    TF.batch_norm(torch.from_numpy(X), *expected, training=True)
    np.testing.assert_allclose(mean, expected[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(var, expected[1], rtol=1e-4)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("backwards", [False, True])
def test_batch_norm_cannot_update_what_is_read_only(which, backwards):
    statistics = [np.zeros(6, np.float32), np.ones(6, np.float32)]
    kept = [s.copy() for s in statistics]
    if backwards:  # torch has no negative strides: an update would go to a copy
        statistics[which] = statistics[which][::-1]
    else:
        statistics[which].flags.writeable = False
    with pytest.raises(ValueError, match=r"batch_norm: training updates .*not read-only"):
        F.batch_norm(X, *statistics, training=True)
    assert all(np.array_equal(a, b) for a, b in zip(statistics, kept, strict=True))


# ---------------------------------------------------------------------------------- other arrays


class Array:
    """An array of another library: memory, and DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


@pytest.fixture
def other_library(monkeypatch):
    """A module with arrays and from_dlpack, as CuPy is one."""
    module = types.ModuleType("other_library")
    module.from_dlpack = lambda exporter: Array(torch.from_dlpack(exporter))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "other_library", module)
    monkeypatch.setattr(Array, "__module__", "other_library.core")


def test_any_array_with_dlpack(other_library):
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    y = F.linear(Array(x), Array(weight))
    assert type(y) is Array
    assert torch.equal(y.tensor, F.linear(x, weight))


def test_the_first_argument_decides(other_library):
    x, weight = torch.randn(5, 7), torch.from_numpy(MATRIX)
    assert type(F.linear(Array(x), MATRIX)) is Array
    assert type(F.linear(ROWS, Array(weight))) is np.ndarray
    assert type(F.linear(ROWS, weight)) is np.ndarray


def test_the_first_argument_by_torchs_name():
    """torch calls it `input` in all functions; a network may name it."""
    x, weight = torch.randn(5, 7), torch.randn(3, 7)
    assert torch.equal(F.linear(input=x, weight=weight), F.linear(x, weight))
    x, weight = torch.randn(1, 2, 6, 6), torch.randn(4, 2, 3, 3)
    assert torch.equal(F.conv2d(input=x, weight=weight), F.conv2d(x=x, weight=weight))
    assert type(F.linear(input=ROWS, weight=MATRIX)) is np.ndarray
    with pytest.raises(TypeError, match="input"):
        F.linear(ROWS, input=ROWS, weight=MATRIX)


# ---------------------------------------------------------------------------------------- errors


class Foreign:
    """An array of a package that takes no DLPack back."""

    def __dlpack__(self, **_: object) -> None:
        raise AssertionError("asked for before it was clear that the result can go back")


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "linear: x .*DLPack, got list", lambda: F.linear([[1.0]], MATRIX)),
        (TypeError, "linear: weight .*tensor, got list", lambda: F.linear(ROWS, [[1.0]])),
        (TypeError, "linear: weight .*ndarray", lambda: F.linear(torch.ones(5, 7), MATRIX)),
        (TypeError, "linear: x .*int64", lambda: F.linear(ROWS.astype(np.int64), MATRIX)),
        (TypeError, "linear: weight .*float64", lambda: F.linear(ROWS, MATRIX.astype(float))),
        (TypeError, "linear: x .*byte order", lambda: F.linear(ROWS.astype(">f4"), MATRIX)),
        (TypeError, "linear: x .*object_", lambda: F.linear(ROWS.astype(object), MATRIX)),
        (TypeError, "linear: weight .*mask", lambda: F.linear(ROWS, np.ma.array(MATRIX))),
        (TypeError, "linear: .*weight", lambda: F.linear(ROWS)),
        (TypeError, "linear: the argument x is missing", lambda: F.linear(weight=MATRIX)),
        (TypeError, "linear: .*Foreign has DLPack.*no from_dlpack", lambda: F.linear(Foreign(), W)),
        (TypeError, "linear: .*scales", lambda: F.linear(ROWS, MATRIX, scales=B)),
        (ValueError, r"linear: bias .*\(3,\).*\(4,\)", lambda: F.linear(ROWS, MATRIX, B)),
        (TypeError, "pack_linear_weight: .*ndarray", lambda: F.pack_linear_weight(MATRIX)),
        (TypeError, "pack_conv2d_weight: .*ndarray", lambda: F.pack_conv2d_weight(W)),
    ],
)
def test_bad_arrays(error, message, call):
    with pytest.raises(error, match=message):
        call()
