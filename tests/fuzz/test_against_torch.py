"""Random shapes, strides, views and arguments: what torch computes, or an error where it has one.

Legal and illegal arguments are drawn alike. Where torch raises, nnarch must raise ValueError or
TypeError; where torch computes, nnarch must compute the same, gradients included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import dtypes, fuzz, integers_in, pairs, reals_in
from torch import Tensor
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F

ACTIVATIONS = st.sampled_from([None, "relu", "relu6"])  # exact on integers


def _results(function: Callable[..., Tensor], tensors: list[Tensor | None]) -> list[Tensor]:
    """The output, and the gradients of the tensors for an output gradient of integers."""
    leaves = [t.detach().requires_grad_() if t is not None else None for t in tensors]
    y = function(*leaves)
    grad = (torch.arange(y.numel()) % 5 - 2).to(y.dtype).view(y.shape)
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def _same(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    *tensors: Tensor | None,
    tolerance: float = 0.0,
) -> None:
    try:
        expected = _results(theirs, list(tensors))
    except (RuntimeError, ValueError, TypeError):
        with pytest.raises((ValueError, TypeError)):
            _results(ours, list(tensors))
        return
    torch.testing.assert_close(
        _results(ours, list(tensors)), expected, rtol=tolerance, atol=tolerance
    )
    with torch.no_grad():  # the other call path
        torch.testing.assert_close(ours(*tensors), expected[0], rtol=tolerance, atol=tolerance)


@contextmanager
def _precision(level: str) -> Iterator[None]:
    nnarch.set_precision(level)
    try:
        yield
    finally:
        nnarch.set_precision("high")


def _activate(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else getattr(TF, activation)(y)


# ----------------------------------------------------------------------------- convolution, linear


@fuzz
@given(st.data())
def test_conv2d(data):
    draw = data.draw
    groups = draw(st.integers(1, 3))
    c = draw(st.integers(1, 12)) * groups
    k = draw(st.integers(1, 12)) * groups + draw(st.sampled_from([0] * 9 + [1]))
    h, w, r, s = (draw(st.integers(1, high)) for high in (12, 13, 4, 4))
    n, dtype = draw(st.integers(0, 3)), draw(dtypes)
    geometry = (draw(pairs(0, 3)), draw(pairs(0, 3)), draw(pairs(1, 3)), groups)
    x = draw(integers_in(n, c, h, w, dtype=dtype))
    weight = draw(integers_in(k, c // groups, r, s, dtype=dtype))
    bias = draw(st.none() | integers_in(k, dtype=dtype))
    kind = draw(ACTIVATIONS)
    with _precision("highest"):  # sums of products are exact on these integers, Winograd's are not
        _same(
            lambda x, w, b: F.conv2d(x, w, b, *geometry, activation=kind),
            lambda x, w, b: _activate(TF.conv2d(x, w, b, *geometry), kind),
            x, weight, bias,
        )  # fmt: skip


@fuzz
@given(st.data())
def test_conv2d_where_winograd_serves(data):
    """On integers a wrong address is off by 1 at least; rounding stays far below a tenth.

    No activation: where a sum is exactly 0, rounding decides about relu's derivative.
    """
    draw = data.draw
    groups = draw(st.integers(1, 2))
    c, k = (draw(st.integers(8, 40)) * groups for _ in range(2))
    h, w = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    geometry = (1, draw(pairs(0, 3)), 1, groups)
    x = draw(integers_in(draw(st.integers(1, 3)), c, h, w, dtype=torch.float32))
    weight = draw(integers_in(k, c // groups, 3, 3, dtype=torch.float32))
    bias = draw(st.none() | integers_in(k, dtype=torch.float32))
    with _precision(draw(st.sampled_from(["high", "medium"]))):
        _same(
            lambda x, w, b: F.conv2d(x, w, b, *geometry),
            lambda x, w, b: TF.conv2d(x, w, b, *geometry),
            x, weight, bias, tolerance=0.1,
        )  # fmt: skip


@fuzz
@given(st.data())
def test_depthwise(data):
    draw = data.draw
    n, c, multiplier = draw(st.integers(0, 2)), draw(st.integers(1, 37)), draw(st.integers(1, 3))
    h, w, r, s = (draw(st.integers(1, high)) for high in (15, 15, 7, 7))
    dtype = draw(dtypes)
    geometry = (draw(pairs(1, 3)), draw(pairs(0, 4)), draw(pairs(1, 2)), c)
    x = draw(integers_in(n, c, h, w, dtype=dtype))
    weight = draw(integers_in(c * multiplier, 1, r, s, dtype=dtype))
    bias = draw(st.none() | integers_in(c * multiplier, dtype=dtype))
    kind = draw(ACTIVATIONS)
    _same(
        lambda x, w, b: F.conv2d(x, w, b, *geometry, activation=kind),
        lambda x, w, b: _activate(TF.conv2d(x, w, b, *geometry), kind),
        x, weight, bias,
    )  # fmt: skip


@fuzz
@given(st.data())
def test_linear(data):
    draw = data.draw
    leading = draw(st.lists(st.integers(0, 9), max_size=3))
    if draw(st.booleans()):
        leading = [draw(st.integers(1, 600))]
    c, k = draw(st.integers(0, 70)), draw(st.integers(0, 70))
    dtype = draw(dtypes)
    x = draw(integers_in(*leading, c, dtype=dtype))
    weight = draw(integers_in(k, c + draw(st.sampled_from([0] * 9 + [1])), dtype=dtype))
    bias = draw(st.none() | integers_in(k, dtype=dtype))
    residual = draw(st.none() | integers_in(*leading, k, dtype=dtype))
    kind = draw(ACTIVATIONS)

    def theirs(x: Tensor, w: Tensor, b: Tensor | None, r: Tensor | None) -> Tensor:
        y = TF.linear(x, w, b)
        return _activate(y if r is None else y + r, kind)

    _same(
        lambda x, w, b, r: F.linear(x, w, b, residual=r, activation=kind),
        theirs, x, weight, bias, residual,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ pooling

_IMAGES = st.tuples(*(st.integers(low, high) for low, high in ((0, 3), (1, 20), (1, 14), (1, 15))))


@fuzz
@given(st.data())
def test_max_pool2d(data):
    draw = data.draw
    options = {
        "kernel_size": draw(pairs(1, 5)),
        "stride": draw(st.none() | pairs(0, 4)),
        "padding": draw(pairs(0, 2)),
        "dilation": draw(pairs(1, 3)),
        "ceil_mode": draw(st.booleans()),
    }
    x = draw(reals_in(*draw(_IMAGES)))
    assume(not _some_window_is_padding(x, options))
    _same(lambda x: F.max_pool2d(x, **options), lambda x: TF.max_pool2d(x, **options), x)


def _some_window_is_padding(x: Tensor, options: dict[str, Any]) -> bool:
    """Whether dilation and padding leave a window no input: torch's backward then writes anywhere.

    Ours drops that window's gradient (tests/kernels/test_pooling.py).
    """
    try:
        return bool((TF.max_pool2d(torch.zeros(1, 1, *x.shape[2:]), **options) < 0).any())
    except RuntimeError:
        return False


@fuzz
@given(st.data())
def test_max_pool2d_of_equal_numbers(data):
    """The first of several equal maxima wins, as in torch."""
    draw = data.draw
    kernel, stride, padding = draw(st.integers(1, 4)), draw(st.integers(1, 3)), 0
    x = draw(integers_in(*draw(_IMAGES), dtype=draw(dtypes)))
    arguments = (kernel, stride, padding)
    _same(lambda x: F.max_pool2d(x, *arguments), lambda x: TF.max_pool2d(x, *arguments), x)


@fuzz
@given(st.data())
def test_avg_pool2d(data):
    draw = data.draw
    options = {
        "kernel_size": draw(pairs(1, 5)),
        "stride": draw(st.none() | pairs(0, 4)),
        "padding": draw(pairs(0, 2)),
        "ceil_mode": draw(st.booleans()),
        "count_include_pad": draw(st.booleans()),
        "divisor_override": draw(st.none() | st.integers(-3, 9)),
    }
    x = draw(reals_in(*draw(_IMAGES)))
    _same(
        lambda x: F.avg_pool2d(x, **options),
        lambda x: TF.avg_pool2d(x, **options),
        x,
        tolerance=1e-12,
    )


@fuzz
@given(st.data())
def test_adaptive_pools(data):
    draw = data.draw
    size = draw(pairs(1, 16) | st.tuples(st.none(), st.integers(1, 9)))
    x = draw(reals_in(*draw(_IMAGES)))
    _same(
        lambda x: F.adaptive_avg_pool2d(x, size),
        lambda x: TF.adaptive_avg_pool2d(x, size),
        x,
        tolerance=1e-12,
    )
    _same(lambda x: F.adaptive_max_pool2d(x, size), lambda x: TF.adaptive_max_pool2d(x, size), x)


# ------------------------------------------------------------------------------------ normalization


@fuzz
@given(st.data())
def test_batch_norm(data):
    draw = data.draw
    spatial = draw(st.lists(st.integers(1, 9), max_size=3))
    size = (draw(st.integers(1, 5)), draw(st.integers(1, 35)), *spatial)
    training, affine = draw(st.booleans()), draw(st.booleans())
    channels = size[1]
    x = draw(reals_in(*size))
    weight, bias = (torch.randn(channels).double() if affine else None for _ in range(2))
    running = [torch.randn(channels).double(), torch.rand(channels).double() + 0.5]
    theirs_running, ours_running = ([t.clone() for t in running] for _ in range(2))
    count = math.prod(size) // channels
    _same(
        lambda x, w, b: F.batch_norm(x, *ours_running, w, b, training, 0.3, 1e-3),
        lambda x, w, b: TF.batch_norm(x, *theirs_running, w, b, training, 0.3, 1e-3),
        x, weight, bias,
        tolerance=1e-8,
    )  # fmt: skip
    if training and count > 1:  # ours ran once more, without gradients
        TF.batch_norm(x, *theirs_running, weight, bias, training, 0.3, 1e-3)
    torch.testing.assert_close(ours_running, theirs_running, rtol=1e-9, atol=1e-9)
