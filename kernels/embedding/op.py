"""embedding: schemas, autograd, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library

from . import checks, reference

_GPU = "nnarch.kernels.embedding.triton_kernel"


def _check(
    tokens: Tensor, weight: Tensor, padding_idx: int, sparse: bool, scale_grad_by_freq: bool
) -> None:
    checks.table("embedding", "weight", weight)
    checks.indices("embedding", "input", tokens, weight)


def _check_grad(
    grad: Tensor, tokens: Tensor, rows: int, padding_idx: int, scale: float, by_frequency: bool
) -> None:
    op = "embedding_grad"
    library.check_tensor(op, "grad", grad)
    checks.indices(op, "tokens", tokens, rows=rows)
    library.check_device(op, "tokens", tokens, grad, of="grad")
    if rows < 0:
        raise ValueError(f"{op}: rows must not be negative, got {rows}")
    if grad.dim() != tokens.dim() + 1 or grad.shape[:-1] != tokens.shape:
        raise ValueError(
            f"{op}: grad must be [..., C] for tokens [...], got {tuple(grad.shape)} and "
            f"{tuple(tokens.shape)}"
        )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, weight, ctx.padding_idx, ctx.sparse, ctx.by_frequency = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(tokens)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (tokens,) = ctx.saved_tensors
    if ctx.sparse:
        d_weight = sparse_gradient(grad, tokens, ctx.rows, ctx.padding_idx)
    else:
        d_weight = embedding_grad(grad, tokens, ctx.rows, ctx.padding_idx, 1.0, ctx.by_frequency)
    return None, d_weight, None, None, None


def sparse_gradient(grad: Tensor, tokens: Tensor, rows: int, padding_idx: int) -> Tensor:
    """The rows of `grad` as an uncoalesced sparse [rows, C], without those of padding_idx."""
    flat, values = tokens.reshape(-1).long(), grad.reshape(tokens.numel(), grad.shape[-1])
    if padding_idx >= 0:
        kept = flat != padding_idx
        flat, values = flat[kept], values[kept]
    size = (rows, grad.shape[-1])
    return torch.sparse_coo_tensor(flat[None], values, size, check_invariants=False)


def _setup_grad(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tokens, _, ctx.padding_idx, ctx.scale, ctx.by_frequency = inputs
    ctx.save_for_backward(tokens)


def _grad_backward(ctx: Any, gradgrad: Tensor) -> tuple[Tensor | None, ...]:
    (tokens,) = ctx.saved_tensors
    if ctx.by_frequency:
        raise NotImplementedError(
            "nnarch::embedding_grad is not differentiable with scale_grad_by_freq "
            "(once_differentiable)"
        )
    d_grad = embedding_op(tokens, gradgrad, -1, False, False)
    if ctx.scale != 1.0:
        d_grad = d_grad * ctx.scale
    if ctx.padding_idx >= 0:
        d_grad = d_grad.masked_fill((tokens == ctx.padding_idx)[..., None], 0)
    return d_grad, None, None, None, None, None


embedding_op = library.declare(
    "embedding(Tensor tokens, Tensor weight, int padding_idx, bool sparse, "
    "bool scale_grad_by_freq) -> Tensor",
    reference=reference.embedding,
    fake=lambda tokens, weight, *_: weight.new_empty((*tokens.shape, weight.shape[1])),
    check=_check,
    gpu=f"{_GPU}:embedding",
    setup_context=_setup,
    backward=_backward,
)

embedding_grad = library.declare(
    "embedding_grad(Tensor grad, Tensor tokens, int rows, int padding_idx, float scale, "
    "bool by_frequency) -> Tensor",
    reference=reference.embedding_grad,
    fake=lambda grad, tokens, rows, *_: grad.new_empty((rows, grad.shape[-1])),
    check=_check_grad,
    gpu=f"{_GPU}:embedding_grad",
    setup_context=_setup_grad,
    backward=_grad_backward,
)


def padding_row(op: str, padding_idx: int | None, rows: int) -> int:
    """padding_idx as a row from 0 on; -1 for None."""
    if padding_idx is None:
        return -1
    if not -rows <= padding_idx < rows:
        raise ValueError(
            f"{op}: padding_idx must be a row of weight, from {-rows} to {rows - 1}, "
            f"got {padding_idx}"
        )
    return padding_idx % rows


@arrays.public
def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a table: weight[input]. The signature of :func:`torch.nn.functional.embedding`.

    Args:
        input: int64 or int32 of any shape, from 0 to V - 1.
        weight: [V, C].
        padding_idx: a row that gets no gradient; negative ones count from the end.
        max_norm: rows that are read and whose norm is larger are scaled down to it first, in place.
        norm_type: of that norm.
        scale_grad_by_freq: divide a row's gradient by how often it was read.
        sparse: whether the gradient of `weight` is a sparse tensor.

    Returns:
        [..., C], contiguous. The dense gradient is the same, bit for bit, for any number of
        threads.

    Raises:
        IndexError: an index outside the table.
        ValueError, TypeError: arguments that do not fit together; the message names them.
    """
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        checks.table("embedding", "weight", weight)
    row = padding_row("embedding", padding_idx, weight.shape[0])
    if sparse and scale_grad_by_freq:
        raise ValueError("embedding: sparse gradients cannot be combined with scale_grad_by_freq")
    if max_norm is not None:
        _check(input, weight, row, sparse, scale_grad_by_freq)
        if arrays.is_read_only(weight):
            raise ValueError("embedding: max_norm scales rows of weight: it must not be read-only")
        with torch.no_grad():
            # Rarely used, and it visits only the rows that are read.
            torch.embedding_renorm_(weight.detach(), input.contiguous(), max_norm, norm_type)
    return embedding_op(input, weight, row, sparse, scale_grad_by_freq)
