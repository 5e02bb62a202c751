"""What attention's arguments must be, and what is said where they are not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch.kernels.dropout.seed import check_dropout
from nnarch.library import check_device, check_same, check_tensor


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    *_: Any,
    op: str = "attention",
) -> None:
    """Raise TypeError or ValueError for arguments that do not fit together."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{op}: {name} must be [batch, heads, length, head_dim], got {tuple(tensor.shape)}"
            )
        check_same(op, name, tensor, query, "query")
    batch, heads, length, depth = query.shape
    _expect(op, "key", key, (batch, key.shape[1], key.shape[2], depth))
    _expect(op, "value", value, (batch, key.shape[1], key.shape[2], value.shape[3]))
    if heads != 0 and (key.shape[1] == 0 or heads % key.shape[1]):
        raise ValueError(
            f"{op}: the query's heads ({heads}) must be a multiple of the key's ({key.shape[1]})"
        )
    _check_mask(op, mask, query, (batch, heads, length, key.shape[2]))
    _check_lengths(op, key_lengths, query)
    check_dropout(op, seed, dropout_p, query)


def check_attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    *_: Any,
) -> None:
    """The same of the backward, whose further tensors have the forward's outputs' shapes."""
    op = "attention_backward"
    check_attention(query, key, value, mask, key_lengths, seed, dropout_p, op=op)
    size = (*query.shape[:3], value.shape[3])
    for name, tensor in (("grad", grad), ("out", out)):
        check_tensor(op, name, tensor)
        check_same(op, name, tensor, query, "query")
        _expect(op, name, tensor, size)
    for name, row in (("lse", lse), ("grad_lse", grad_lse)):
        if row is not None:
            _check_row(op, name, row, query)


def check_attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    dropout_p: float,
    *_: Any,
    op: str = "attention_weights",
) -> None:
    """The same of the weights, which need no values."""
    check_attention(query, key, key, mask, key_lengths, seed, dropout_p, op=op)
    _check_row(op, "lse", lse, query)


def check_attention_weights_backward(grad: Tensor, *rest: Any) -> None:
    """The same of their backward."""
    op, query, key, averaged = "attention_weights_backward", rest[0], rest[1], rest[-2]
    check_attention_weights(*rest, op=op)
    check_tensor(op, "grad", grad)
    check_same(op, "grad", grad, query, "query")
    batch, heads, length, _ = query.shape
    _expect(op, "grad", grad, (batch, 1 if averaged else heads, length, key.shape[2]))


def lse_dtype(query: Tensor) -> torch.dtype:
    """The dtype of log-sum-exps: float64 beside float64, else float32."""
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _check_row(op: str, name: str, row: Tensor, query: Tensor) -> None:
    check_tensor(op, name, row)
    check_device(op, name, row, query, "query")
    if row.dtype != lse_dtype(query):
        raise TypeError(f"{op}: {name} must be {lse_dtype(query)}, got {row.dtype}")
    _expect(op, name, row, tuple(query.shape[:3]))


def _expect(op: str, name: str, tensor: Tensor, size: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != size:
        raise ValueError(f"{op}: {name} must have shape {size}, got {tuple(tensor.shape)}")


def _check_mask(op: str, mask: Any, query: Tensor, size: tuple[int, ...]) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: mask must be a tensor, got {type(mask).__name__}")
    if mask.dtype not in (torch.bool, query.dtype):
        raise TypeError(
            f"{op}: mask must be bool (True: may see) or {query.dtype} as query, got {mask.dtype}"
        )
    check_device(op, "mask", mask, query, "query")
    fits = mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, size, strict=True))
    if not fits:
        raise ValueError(f"{op}: mask must broadcast to {size}, got shape {tuple(mask.shape)}")


def _check_lengths(op: str, lengths: Any, query: Tensor) -> None:
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"{op}: key_lengths must be an int64 tensor, got {got}")
    check_device(op, "key_lengths", lengths, query, "query")
    _expect(op, "key_lengths", lengths, (query.shape[0],))
