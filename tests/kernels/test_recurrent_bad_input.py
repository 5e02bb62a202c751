"""Recurrent layers: arguments that do not fit, and samples for the tests over every operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recurrent_cases import KINDS, LSTM, arguments, define

from nnarch import functional as F
from nnarch.kernels.recurrent.op import pack_recurrent_weights, scan

X, W_IH, W_HH = torch.ones(5, 2, 3), torch.ones(16, 3), torch.ones(16, 4)
B16, H0 = torch.ones(16), torch.ones(2, 4)
BATCHES = torch.tensor([3, 2])

BAD = [
    (TypeError, "lstm: x .*int64", lambda: F.lstm_layer(X.long(), W_IH, W_HH)),
    (TypeError, "lstm: weight_ih .*float64", lambda: F.lstm_layer(X, W_IH.double(), W_HH)),
    (TypeError, "lstm: h0 .*float64", lambda: F.lstm_layer(X, W_IH, W_HH, h0=H0.double())),
    (ValueError, r"lstm: x must be .*\(3,\)", lambda: F.lstm_layer(X[0, 0], W_IH, W_HH)),
    (ValueError, "lstm: weight_ih must be .*4 . H", lambda: F.lstm_layer(X, W_IH[:15], W_HH)),
    (ValueError, "lstm: the last size of x", lambda: F.lstm_layer(X[..., :2], W_IH, W_HH)),
    (ValueError, "lstm: weight_hh .*16, 4", lambda: F.lstm_layer(X, W_IH, W_HH[:, :3])),
    (ValueError, "lstm: h0 .*2, 4", lambda: F.lstm_layer(X, W_IH, W_HH, h0=H0[:1])),
    (ValueError, "lstm: c0 .*2, 4", lambda: F.lstm_layer(X, W_IH, W_HH, c0=H0[:, :2])),
    (ValueError, "lstm: bias_hh .*16", lambda: F.lstm_layer(X, W_IH, W_HH, B16, B16[:4])),
    (ValueError, "lstm: peephole .*3, 4", lambda: F.lstm_layer(X, W_IH, W_HH, peephole=H0)),
    (ValueError, "lstm: norm .*18, 4", lambda: F.lstm_layer(X, W_IH, W_HH, norm=H0)),
    (ValueError, "gru: weight_ih must be .*3 . H", lambda: F.gru_layer(X, W_IH, W_HH)),
    (ValueError, "rnn: nonlinearity .*'gelu'",
     lambda: F.rnn_layer(X, W_HH[:, :3], W_HH, nonlinearity="gelu")),
    (ValueError, "lstm: batch_sizes must not grow",
     lambda: F.lstm_layer(X[:, 0], W_IH, W_HH, batch_sizes=BATCHES.flip(0))),
    (ValueError, "lstm: batch_sizes .*add up",
     lambda: F.lstm_layer(X[:4, 0], W_IH, W_HH, batch_sizes=BATCHES)),
    (ValueError, "lstm: batch_sizes must be .*int64",
     lambda: F.lstm_layer(X[:, 0], W_IH, W_HH, batch_sizes=BATCHES.int())),
    (ValueError, "recurrent_scan: kind",
     lambda: scan(X, None, None, W_IH, W_HH, *[None] * 7, 7, False, 0.0, False)),
    (ValueError, "recurrent_pack: kind", lambda: pack_recurrent_weights(W_IH, W_HH, kind=9)),
    (ValueError, "recurrent_pack: bfloat16",
     lambda: pack_recurrent_weights(W_IH.double(), W_HH.double(), kind=LSTM, bfloat16=True)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "call"), BAD, ids=range(len(BAD)))
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


# --------------------------------------------------------- for the tests over every operation


def _samples() -> list[tuple[Any, ...]]:
    lengths = [4, 3, 1]
    samples = []
    for kind in KINDS:
        plain = arguments(kind, (3, 2, 5, 6))
        samples.append((*plain, None, kind, False, 1e-5, True))
        ragged = arguments(kind, (4, 3, 5, 6), lengths=lengths)
        samples.append((*ragged, None, kind, True, 1e-5, True))
    full = arguments(LSTM, (3, 2, 5, 6), projection=4, peephole=True, norm=True)
    samples.append((*full, None, LSTM, False, 1e-5, True))
    return samples


def _backward_samples() -> list[tuple[Any, ...]]:
    samples = []
    for *inputs, _packed, kind, reverse, eps, _save in _samples():
        y, h, c, reserve = define(list(inputs), kind, reverse, True)
        grads = (torch.randn_like(y), torch.randn_like(h), torch.randn_like(c))
        wanted = sum((t is not None) << bit for bit, t in enumerate(inputs[:10]))
        last = grads[2] if kind == LSTM else None
        samples.append((*grads[:2], last, *inputs, y, reserve, kind, reverse, eps, wanted))
    return samples


def _pack_samples() -> list[tuple[Any, ...]]:
    return [
        (
            *(arguments(kind, (1, 1, 5, 6), projection=3 * (kind == LSTM))[i] for i in (3, 4, 7)),
            kind,
            False,
            False,
        )
        for kind in KINDS
    ]


SAMPLES = {
    "recurrent_scan": _samples,
    "recurrent_scan_backward": _backward_samples,
    "recurrent_pack": _pack_samples,
}
