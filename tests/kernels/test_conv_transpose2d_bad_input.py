"""What conv_transpose2d refuses: errors that name the argument, what was expected and what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nnarch import functional as F

X, W = torch.ones(2, 6, 5, 5), torch.ones(6, 4, 3, 3)
V4, V5 = torch.ones(4), torch.ones(5)
TALL = torch.ones(1, 1, 1, 1).expand(1, 1, 2**62, 1)


def call(*args: Any, **kwargs: Any) -> Tensor:
    return F.conv_transpose2d(*args, **kwargs)


@pytest.mark.parametrize(
    ("error", "message", "bad"),
    [
        (TypeError, "x .*list", lambda: call([1.0], W)),
        (TypeError, "weight .*NoneType", lambda: call(X, None)),
        (TypeError, "x .*int32", lambda: call(X.int(), W)),
        (TypeError, "weight .*float32.*float64", lambda: call(X, W.double())),
        (ValueError, "weight .*meta.*cpu|cpu.*meta", lambda: call(X.to("meta"), W)),
        (ValueError, r"x .*4-D.*\(5, 5\)", lambda: call(X[0, 0], W)),
        (ValueError, r"weight .*4-D.*\(4, 3, 3\)", lambda: call(X, W[0])),
        (ValueError, "x has 6 channels, but weight has 5", lambda: call(X, W[:5])),
        (ValueError, "no channels", lambda: call(X, W[:, :0])),
        (ValueError, "no channels", lambda: call(X[:, :0], W[:0])),
        (ValueError, "kernel size", lambda: call(X, W[:, :, :0])),
        (ValueError, "must have pixels", lambda: call(X[:, :, :0], W)),
        (ValueError, "nothing is left .*padding .*4", lambda: call(X, W, padding=4)),
        (ValueError, r"stride .*\(0, 0\)", lambda: call(X, W, stride=0)),
        (TypeError, "stride .*1.5", lambda: call(X, W, stride=1.5)),
        (ValueError, "stride must be 2", lambda: call(X, W, stride=(1, 1, 1))),
        (ValueError, "stride .*below", lambda: call(X, W, stride=2**62)),
        (ValueError, "padding .*-1", lambda: call(X, W, padding=-1)),
        (TypeError, "padding .*'same'", lambda: call(X, W, padding="same")),
        (ValueError, "output_padding .*-1", lambda: call(X, W, output_padding=-1)),
        (ValueError, "output_padding .*smaller", lambda: call(X, W, output_padding=1)),
        (ValueError, "output_padding .*smaller", lambda: call(X, W, None, 2, 0, (0, 2))),
        (ValueError, "dilation .*0", lambda: call(X, W, dilation=0)),
        (ValueError, "groups=4 ", lambda: call(X, W, groups=4)),
        (ValueError, "groups .*0", lambda: call(X, W, groups=0)),
        (TypeError, "groups .*2.0", lambda: call(X, W, groups=2.0)),
        (ValueError, r"bias .*\(4,\).*\(5,\)", lambda: call(X, W, V5)),
        (TypeError, "bias .*float64", lambda: call(X, W, V4.double())),
        (ValueError, r"scale .*\(4, 1\)", lambda: call(X, W, scale=V4[:, None])),
        (ValueError, "residual .*2, 4, 7, 7.*2, 6", lambda: call(X, W, residual=X)),
        (ValueError, "activation .*mish", lambda: call(X, W, activation="mish")),
        (ValueError, "packed", lambda: call(X, W, packed=V4)),
        (TypeError, "packed .*list", lambda: call(X, W, packed=[1.0])),
        (ValueError, r"bias .*\(6,\)", lambda: call(X, W[:, :1], V5, groups=6)),
        (ValueError, "groups=6 .*|channels", lambda: call(X[:, :5], W[:, :1], groups=6)),
        (ValueError, "size overflows", lambda: call(TALL, torch.ones(1, 20, 1, 1), stride=8)),
    ],
)  # fmt: skip
def test_bad_input(error, message, bad):
    with pytest.raises(error, match="conv_transpose2d: .*" + message.replace("|", "|.*")):
        bad()


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        ("layout must be 0 to 7", lambda w: F.pack_conv_transpose2d_weight(w, layout=8)),
        ("groups must divide", lambda w: F.pack_conv_transpose2d_weight(w, groups=4)),
        ("weight must be 4-D", lambda w: F.pack_conv_transpose2d_weight(w[0])),
        ("stride must be at least 1", lambda w: F.pack_conv_transpose2d_weight(w, 0)),
        ("float64", lambda w: F.pack_conv_transpose2d_weight(w.double(), layout=4)),
        ("one group", lambda w: F.pack_conv_transpose2d_weight(w, groups=2, layout=7)),
    ],
)
def test_bad_packing(message, bad):
    with pytest.raises(ValueError, match=message):
        bad(W)
