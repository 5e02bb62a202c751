"""The input layer of a Transformer in one pass: token + position + segment, LayerNorm, dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nnarch import arrays, library
from nnarch.kernels.dropout.op import dropout_op
from nnarch.kernels.dropout.seed import check_dropout, draw_seed

from . import checks, reference
from .op import embedding_grad, padding_row

_GPU = "nnarch.kernels.embedding.triton_kernel"
_OP = "embedding_sum"
_TABLES = (
    "Tensor tokens, Tensor weight, Tensor? position_weight, Tensor? positions, "
    "Tensor? segment_weight, Tensor? segments"
)


def _check_tables(
    op: str, tokens: Any, weight: Any, position_weight: Any, positions: Any,
    segment_weight: Any, segments: Any, offset: int,
) -> None:  # fmt: skip
    checks.table(op, "weight", weight)
    checks.indices(op, "tokens", tokens, weight)
    if position_weight is not None:
        checks.table(op, "position_weight", position_weight, weight)
        length = tokens.shape[-1] if tokens.dim() else 1
        if positions is not None:
            checks.indices(op, "positions", positions, position_weight)
            checks.like_tokens(op, "positions", positions, tokens)
        elif tokens.numel() and not 0 <= offset <= position_weight.shape[0] - length:
            raise checks.OutOfRange(
                f"{op}: position_weight must have a row for each of the positions {offset} to "
                f"{offset + length - 1}, got {position_weight.shape[0]} rows"
            )
    if segment_weight is not None:
        checks.table(op, "segment_weight", segment_weight, weight)
        if segments is None:
            raise ValueError(f"{op}: segments must be given with segment_weight")
        checks.indices(op, "segments", segments, segment_weight)
        checks.like_tokens(op, "segments", segments, tokens)


def _check(
    tokens: Any, weight: Any, position_weight: Any, positions: Any, segment_weight: Any,
    segments: Any, norm_weight: Any, norm_bias: Any, seed: Any, scale: float, offset: int,
    padding_idx: int, normalize: bool, eps: float, dropout_p: float,
) -> None:  # fmt: skip
    _check_tables(_OP, tokens, weight, position_weight, positions, segment_weight, segments, offset)
    checks.vector(_OP, "norm_weight", norm_weight, weight)
    checks.vector(_OP, "norm_bias", norm_bias, weight)
    check_dropout(_OP, seed, dropout_p, weight)


def _check_backward(
    grad: Any, tokens: Any, weight: Any, position_weight: Any, positions: Any,
    segment_weight: Any, segments: Any, norm_weight: Any, mean: Any, invstd: Any, seed: Any,
    scale: float, offset: int, dropout_p: float,
) -> None:  # fmt: skip
    op = "embedding_sum_backward"
    _check_tables(op, tokens, weight, position_weight, positions, segment_weight, segments, offset)
    library.check_tensor(op, "grad", grad)
    library.check_same(op, "grad", grad, weight, of="weight")
    if tuple(grad.shape) != (*tokens.shape, weight.shape[1]):
        raise ValueError(
            f"{op}: grad must have shape {(*tokens.shape, weight.shape[1])}, "
            f"got {tuple(grad.shape)}"
        )
    checks.vector(op, "norm_weight", norm_weight, weight)
    check_dropout(op, seed, dropout_p, weight)


def _statistic_type(weight: Tensor) -> torch.dtype:
    half = weight.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else weight.dtype


def _fake(tokens: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    normalize = rest[-3]
    y = weight.new_empty((*tokens.shape, weight.shape[1]))
    rows = tokens.numel() if normalize else 0
    mean, invstd = (weight.new_empty(rows, dtype=_statistic_type(weight)) for _ in range(2))
    return y, mean, invstd


def _fake_backward(grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    columns = grad.shape[-1]
    return grad.new_empty(grad.shape), grad.new_empty(columns), grad.new_empty(columns)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> int:
    *tensors, ctx.scale, ctx.offset, ctx.padding_idx, ctx.normalize, _, ctx.p = inputs
    _, mean, invstd = output
    ctx.set_materialize_grads(False)  # mean and invstd have none
    ctx.mark_non_differentiable(mean, invstd)
    ctx.save_for_backward(*tensors, *((mean, invstd) if ctx.normalize else (None, None)))
    return 1


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 15
    *tables, gamma, _, seed, mean, invstd = ctx.saved_tensors
    tokens, weight, position_weight, positions, segment_weight, segments = tables
    needs = ctx.needs_input_grad
    d_gamma = d_beta = None
    if ctx.normalize:
        dx, d_gamma, d_beta = embedding_sum_backward(
            grad, *tables, gamma, mean, invstd, seed, ctx.scale, ctx.offset, ctx.p
        )
    else:
        dx = grad if seed is None or ctx.p == 0 else dropout_op(grad, seed, ctx.p)
    d_weight = d_position = d_segment = None
    if needs[1]:
        d_weight = embedding_grad(dx, tokens, weight.shape[0], ctx.padding_idx, ctx.scale, False)
    if needs[2]:
        at = _positions(tokens, ctx.offset) if positions is None else positions
        d_position = embedding_grad(dx, at, position_weight.shape[0], -1, 1.0, False)
    if needs[4]:
        d_segment = embedding_grad(dx, segments, segment_weight.shape[0], -1, 1.0, False)
    return (
        None, d_weight, d_position, None, d_segment, None,
        d_gamma if needs[6] else None, d_beta if needs[7] else None, *(None,) * 7,
    )  # fmt: skip


def _positions(tokens: Tensor, offset: int) -> Tensor:
    length = tokens.shape[-1] if tokens.dim() else 1
    at = torch.arange(offset, offset + length, device=tokens.device)
    return at.expand(tokens.shape) if tokens.dim() else at[0]


embedding_sum_backward = library.declare(
    f"embedding_sum_backward(Tensor grad, {_TABLES}, Tensor? norm_weight, Tensor mean, "
    "Tensor invstd, Tensor? seed, float scale, int offset, float dropout_p) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.embedding_sum_backward,
    fake=_fake_backward,
    check=_check_backward,
    gpu=f"{_GPU}:embedding_sum_backward",
)

embedding_sum = library.declare(
    f"embedding_sum({_TABLES}, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed, "
    "float scale, int offset, int padding_idx, bool normalize, float eps, float dropout_p) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference.embedding_sum,
    fake=_fake,
    check=_check,
    gpu=f"{_GPU}:embedding_sum",
    setup_context=_setup,
    backward=_backward,
)


@arrays.public
def embedding_layer_norm(
    tokens: Tensor,
    token_weight: Tensor,
    position_weight: Tensor | None = None,
    segments: Tensor | None = None,
    segment_weight: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    offset: int = 0,
    padding_idx: int | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    normalize: bool = True,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """dropout(LayerNorm(scale·token + position + segment)) in one pass: BERT's input layer.

    With ``normalize=False`` it is GPT's, and the Transformer's with ``scale=√C``.

    Args:
        tokens: [..., S], int64 or int32.
        token_weight: [V, C].
        position_weight: [P, C] or None.
        segments: of the shape of `tokens`, or None.
        segment_weight: [G, C], where there are segments.
        positions: int64 or int32, broadcast to the shape of `tokens`; None for
            offset, offset + 1, … along its last dimension.
        offset: the first position, as decoding with a cache needs.
        padding_idx: a row of `token_weight` that gets no gradient.
        norm_weight, norm_bias: [C] each, or None.
        eps: added to the variance.
        normalize: whether there is a LayerNorm at all.
        scale: multiplies the token's row alone.
        dropout_p: probability of an element to be zeroed at the end.
        training: whether to drop anything.

    Returns:
        [..., S, C], contiguous. Gradients of the tables are the same, bit for bit, for any number
        of threads; only the first derivative exists.

    Raises:
        IndexError: an index outside its table.
        ValueError, TypeError: arguments that do not fit together; the message names them.

    Source: Devlin et al., 2018, BERT.
    """
    op = "embedding_layer_norm"
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p must be between 0 and 1, got {dropout_p!r}")
    if not normalize and (norm_weight is not None or norm_bias is not None):
        raise ValueError(f"{op}: norm_weight and norm_bias must be None where normalize is False")
    if positions is not None:
        if position_weight is None:
            raise ValueError(f"{op}: position_weight must be given with positions")
        positions = _broadcast(op, "positions", positions, tokens)
    if segments is not None and segment_weight is None:
        raise ValueError(f"{op}: segment_weight must be given with segments")
    if segments is not None:
        segments = _broadcast(op, "segments", segments, tokens)
    checks.table(op, "token_weight", token_weight)
    row = padding_row(op, padding_idx, token_weight.shape[0])
    drops = training and dropout_p > 0
    seed = draw_seed(token_weight) if drops else None
    y, _, _ = embedding_sum(
        tokens, token_weight, position_weight, positions, segment_weight, segments,
        norm_weight, norm_bias, seed, float(scale), offset, row, normalize, eps,
        float(dropout_p) if drops else 0.0,
    )  # fmt: skip
    return y


def _broadcast(op: str, name: str, at: Any, tokens: Tensor) -> Tensor:
    if not isinstance(at, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(at).__name__}")
    if at.shape == tokens.shape:
        return at
    try:
        return at.expand(tokens.shape)
    except RuntimeError:
        raise ValueError(
            f"{op}: {name} must broadcast to the shape of tokens, {tuple(tokens.shape)}, "
            f"got {tuple(at.shape)}"
        ) from None
