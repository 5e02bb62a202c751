"""Attention's weights on the GPU, and their gradients: launchers.

A weight is exp(score - log-sum-exp), so each has its gradient by itself: dS = W·dW, and what a
log-sum-exp gets is -Σ dS, which attention's own backward takes from there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides
from nnarch.kernels.gpu.tiles import Tile, pick

from . import reference
from .triton_backward import KEY_VALUE, KEY_VALUE_MASKED, QUERY, QUERY_MASKED
from .triton_call import Call
from .triton_tables import TileRow, attention_table, narrowed
from .triton_weights_kernels import (
    _attention_weights_bwd_k_kernel,
    _attention_weights_bwd_q_kernel,
    _attention_weights_kernel,
)


def _shared(m: int, n: int, stages: int) -> int:
    return stages * (m + n)


_ROWS: dict[str, list[TileRow]] = dict(
    half=[(64, 64, 4, 2, 0, 256, 256), (64, 32, 4, 2, 256, 256, 256)],
    tf32=[(64, 64, 8, 1, 256, 256, 0), (64, 32, 8, 1, 256, 256, 0)],
    tf32x3=[(64, 32, 8, 1, 256, 256, 0)],
    ieee=[(64, 32, 8, 1, 256, 256, 256), (32, 32, 4, 1, 256, 256, 256)],
)
WEIGHTS = attention_table("attention_weights", _shared, 0, **_ROWS)
WEIGHTS_MASKED = attention_table(
    "attention_weights_masked",
    _shared,
    0,
    **narrowed(_ROWS, half={(64, 64, 4, 2): (0, (0, 256), 256)}),
)


def weights(call: Call, lse: Tensor, averaged: bool) -> Tensor:
    """Launch attention_weights; nothing is empty."""
    heads = 1 if averaged else call.heads
    out = call.query.new_empty((call.batch, heads, call.length, call.keys))
    _sum_tiles(call, lse, None, out, 1 / call.heads if averaged else 1.0)
    return out


def _sum_tiles(call: Call, lse: Tensor, grad: Tensor | None, out: Tensor, factor: float) -> None:
    """Weights, or with `grad` the gradients of their scores, added up to the shape of `out`."""
    products, problem = call.products(0, math.inf)
    del products["DEPTH"]
    out_batch, out_heads, rows, columns = out.shape
    one_row, one_column = rows != call.length, columns != call.keys
    arguments = {
        **call.arguments(out, *() if grad is None else (grad,)),
        **{"lse_ptr": lse, "out_ptr": out, "factor": factor, "B": call.batch},
        **{"OUT_B": out_batch, "OUT_H": out_heads},
        **{"ONE_ROW": one_row, "ONE_COLUMN": one_column},
        **gradient_arguments(grad),
        **products,
    }

    def run(tile: Tile) -> None:
        tiles_m = 1 if one_row else cdiv(call.length, tile["BLOCK_M"])
        tiles_n = 1 if one_column else cdiv(call.keys, tile["BLOCK_N"])
        grid = flat_grid(out_batch * out_heads * tiles_m * tiles_n)
        launch(_attention_weights_kernel, grid, arguments, tile)

    run(pick(WEIGHTS_MASKED if call.masked else WEIGHTS, problem, run))


def gradient_arguments(grad: Tensor | None) -> dict[str, object]:
    """Pointer and strides of the weights' gradient; that of a mean is the same for all heads."""
    named = named_strides("w", "bhmn", grad)
    if grad is not None and grad.shape[1] == 1:
        named["stride_wh"] = 0
    return {"grad_ptr": grad, **named}


def weights_backward(
    call: Call, grad: Tensor, lse: Tensor, averaged: bool, wants_mask: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch attention_weights_backward; nothing is empty."""
    dq, d_lse = query_gradient(call, grad, lse, averaged)
    dk = key_gradient(call, grad, lse, averaged)
    d_mask = call.query.new_empty(0)
    if call.mask is not None and wants_mask:
        d_mask = mask_gradient(call, grad, lse, averaged, call.mask)
    return dq, dk, d_lse, d_mask


def mask_gradient(call: Call, grad: Tensor, lse: Tensor, averaged: bool, mask: Tensor) -> Tensor:
    """dS, added over the dimensions in which the mask has one value. `mask` is the call's."""
    d_mask = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    _sum_tiles(call, lse, grad, d_mask, _factor(call, averaged))
    return d_mask


def query_gradient(call: Call, grad: Tensor, lse: Tensor, averaged: bool) -> tuple[Tensor, Tensor]:
    """dQ, and the log-sum-exps' gradient."""
    dq = reference.new_output(call.query, call.query)
    d_lse = torch.empty(lse.shape, dtype=lse.dtype, device=lse.device)
    products, problem = call.products(0, math.inf)
    arguments = {
        **call.arguments(grad),
        **{"lse_ptr": lse, "dq_ptr": dq, "d_lse_ptr": d_lse, "factor": _factor(call, averaged)},
        **gradient_arguments(grad),
        **named_strides("dq", "bhmd", dq),
        **products,
    }

    def run(tile: Tile) -> None:
        programs = cdiv(call.length, tile["BLOCK_M"]) * call.batch * call.heads
        launch(_attention_weights_bwd_q_kernel, flat_grid(programs), arguments, tile)

    run(pick(QUERY_MASKED if call.masked else QUERY, problem, run))
    return dq, d_lse


def key_gradient(call: Call, grad: Tensor, lse: Tensor, averaged: bool) -> Tensor:
    """dK."""
    dk = reference.new_output(call.key, call.key)
    products, problem = call.products(0, math.inf)
    arguments = {
        **call.arguments(grad),
        **{"lse_ptr": lse, "dk_ptr": dk, "factor": _factor(call, averaged)},
        **gradient_arguments(grad),
        **named_strides("dk", "bhnd", dk),
        **products,
    }

    def run(tile: Tile) -> None:
        programs = cdiv(call.keys, tile["BLOCK_N"]) * call.batch * call.groups
        launch(_attention_weights_bwd_k_kernel, flat_grid(programs), arguments, tile)

    run(pick(KEY_VALUE_MASKED if call.masked else KEY_VALUE, problem, run))
    return dk


def _factor(call: Call, averaged: bool) -> float:
    """What a weight's gradient counts for a head."""
    return 1 / call.heads if averaged else 1.0
