"""Attention's backward on the GPU: scores again, tile by tile, from the forward's log-sum-exps.

With P the weights, dP = grad·Vᵀ and δ = Σ grad·out - grad_lse of each query: dS = P·(dP - δ). One
kernel goes through the queries that see a tile of keys, for dK = dSᵀ·Q and dV = Pᵀ·grad; one goes
through the keys of a tile of queries, for dQ = dS·K; one adds dS over what a mask is broadcast to.
Two passes over the scores instead of one cost 7 products where 5 would do, but each sum has one
owner and one order: no atomics, the same bits in every run.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nnarch.kernels.dropout.reference import survivor_scale, threshold
from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides
from nnarch.kernels.gpu.tiles import Problem, Tile, pick

from . import reference
from .triton_additive_mask import _attention_bwd_mask_kernel
from .triton_backward_kernels import (
    _attention_bwd_delta_kernel,
    _attention_bwd_kv_kernel,
    _attention_bwd_q_kernel,
)
from .triton_forward import (
    band_arguments,
    mask_arguments,
    padded,
    product_arguments,
)
from .triton_tiles import attention_table

KEY_VALUE = attention_table(
    "attention_key_value",
    lambda m, n, stages: 2 * (n + stages * m),
    64,
    half=[
        (64, 64, 4, 3, 0, (0, 64), 0, 1.33),
        (64, 64, 4, 2, 0, (64, 128), 0, 1.42),
        (32, 64, 4, 2, 0, 128, 0, 1.71),
        (32, 128, 8, 2, 64, 64, 0),
        (32, 64, 8, 2, 128, 128, 0),
        (32, 64, 8, 1, 128, 128, 64),
        (16, 64, 8, 1, 128, 256, 256),
        (16, 32, 4, 1, 256, 256, 256),
    ],
    tf32=[
        (32, 64, 8, 2, 0, 64, 0),
        (32, 64, 8, 1, 64, 64, 0),
        (16, 64, 8, 1, 64, 256, 0),
        (16, 32, 8, 1, 128, 256, 0),
        (16, 16, 8, 1, 256, 256, 0),
    ],
    tf32x3=[
        (32, 64, 8, 1, 0, (0, 128), 0),
        (32, 32, 8, 1, 64, 0, 0),
        (16, 64, 4, 1, 0, 64, 0),
        (16, 64, 8, 1, 0, (64, 128), 0),
        (16, 32, 8, 1, 128, 256, 0),
        (16, 16, 8, 1, 256, 256, 0),
    ],
    ieee=[
        (32, 32, 8, 1, 256, 256, 0),
        (16, 32, 8, 1, 256, 256, 256),
        (16, 16, 8, 1, 256, 256, 256),
    ],
)
QUERY = attention_table(
    "attention_query",
    lambda m, n, stages: 2 * (m + stages * n),
    64,
    half=[
        (64, 64, 4, 3, 0, 64, 0, 1.30),
        (64, 32, 4, 2, 0, 64, 0, 1.35),
        (64, 64, 4, 2, 0, 128, 0, 1.41),
        (128, 64, 8, 2, 64, 64, 64),
        (128, 32, 8, 2, 64, 128, 128),
        (64, 32, 8, 2, 256, 256, 256),
        (64, 32, 8, 1, 256, 256, 256),
        (32, 16, 4, 1, 256, 256, 256),
    ],
    tf32=[
        (64, 32, 8, 2, 0, 128, 0),
        (64, 32, 8, 1, 64, 128, 0),
        (64, 16, 8, 1, 128, 256, 0),
        (32, 16, 8, 1, 256, 256, 0),
    ],
    tf32x3=[
        (64, 32, 4, 1, 0, 64, 0),
        (64, 32, 8, 1, 0, 128, 0),
        (64, 16, 8, 1, 128, 256, 0),
        (32, 16, 8, 1, 256, 256, 0),
    ],
    ieee=[(32, 32, 8, 1, 256, 256, 128), (16, 16, 8, 1, 256, 256, 256)],
)


@dataclasses.dataclass(frozen=True)
class Backward:
    """What the kernels of one call share.

    Attributes:
        arguments: of all of them.
        left: whether the band keeps queries from seeing keys far before them.
        problem: what their tiles are chosen for.
        batch, heads, groups, length, keys: sizes.
    """

    arguments: dict[str, object]
    left: bool
    problem: Problem
    batch: int
    heads: int
    groups: int
    length: int
    keys: int


def prepare(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    dropout_p: float,
    scale: float,
    low: int,
    high: int,
    int64: bool,
) -> Backward:
    """The arguments that all kernels have in common."""
    (batch, heads, length, depth), (_, groups, keys, _) = query.shape, key.shape
    products, problem = product_arguments(query, value, widest=64)
    band = band_arguments(query, key, low, high)
    left = band.pop("LEFT")
    arguments = {
        **{"q_ptr": query, "k_ptr": key, "v_ptr": value, "grad_ptr": grad},
        **{"lengths_ptr": key_lengths, "seed_ptr": seed, "lse_ptr": lse, "delta_ptr": delta},
        **{"scale": float(scale), "threshold": threshold(dropout_p)},
        **{"survivor": survivor_scale(dropout_p), "H": heads, "L": length, "S": keys},
        **{"SHARE": heads // groups, "D": depth, "DV": value.shape[3]},
        **mask_arguments(mask),
        **band,
        **named_strides("q", "bhmd", query),
        **named_strides("k", "bhnd", key),
        **named_strides("v", "bhnd", value),
        **named_strides("g", "bhmd", grad),
        **{"INT64": int64, **products},
    }
    problem = dataclasses.replace(problem, m=length, n=keys)
    return Backward(arguments, left, problem, batch, heads, groups, length, keys)


def row_sums(grad: Tensor, out: Tensor, grad_lse: Tensor | None) -> Tensor:
    """δ: [B, H, L] float32."""
    _, heads, length, depth = out.shape
    delta = out.new_empty(out.shape[:3], dtype=torch.float32)
    arguments = {
        **{"grad_ptr": grad, "out_ptr": out, "delta_ptr": delta},
        "grad_lse_ptr": None if grad_lse is None else grad_lse.contiguous(),
        **{"R": delta.numel(), "H": heads, "L": length, "DV": depth, "VALUE_DEPTH": padded(depth)},
        **named_strides("g", "bhmd", grad),
        **named_strides("o", "bhmd", out),
        "BLOCK_R": 32,
    }
    launch(_attention_bwd_delta_kernel, flat_grid(cdiv(delta.numel(), 32)), arguments)
    return delta


def key_value_gradients(call: Backward, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """dK and dV."""
    dk, dv = reference.new_output(key, key), reference.new_output(value, value)
    arguments = {
        **call.arguments,
        **{"dk_ptr": dk, "dv_ptr": dv},
        **named_strides("dk", "bhnd", dk),
        **named_strides("dv", "bhnd", dv),
    }

    def run(tile: Tile) -> None:
        programs = cdiv(call.keys, tile["BLOCK_N"]) * call.batch * call.groups
        launch(_attention_bwd_kv_kernel, flat_grid(programs), arguments, tile)

    run(pick(KEY_VALUE, call.problem, run))
    return dk, dv


def query_gradient(call: Backward, query: Tensor) -> Tensor:
    """dQ."""
    dq = reference.new_output(query, query)
    arguments = {
        **call.arguments,
        "dq_ptr": dq,
        "LEFT": call.left,
        **named_strides("dq", "bhmd", dq),
    }

    def run(tile: Tile) -> None:
        programs = cdiv(call.length, tile["BLOCK_M"]) * call.batch * call.heads
        launch(_attention_bwd_q_kernel, flat_grid(programs), arguments, tile)

    run(pick(QUERY, call.problem, run))
    return dq


def mask_gradient(call: Backward, mask: Tensor) -> Tensor:
    """dS, added over the dimensions in which the mask has one value."""
    d_mask = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    mask_batch, mask_heads, mask_rows, mask_columns = mask.shape
    arguments = {
        **call.arguments,
        **{"d_mask_ptr": d_mask, "B": call.batch, "MASK_B": mask_batch, "MASK_H": mask_heads},
        **{"ONE_ROW": mask_rows == 1, "ONE_COLUMN": mask_columns == 1},
    }

    def run(tile: Tile) -> None:
        tiles_m = 1 if mask_rows == 1 else cdiv(call.length, tile["BLOCK_M"])
        tiles_n = 1 if mask_columns == 1 else cdiv(call.keys, tile["BLOCK_N"])
        programs = mask_batch * mask_heads * tiles_m * tiles_n
        launch(_attention_bwd_mask_kernel, flat_grid(programs), arguments, tile)

    run(pick(QUERY, call.problem, run))
    return d_mask


def backward(
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
    scale: float,
    low: int,
    high: int,
    wants_mask: bool,
    int64: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward; nothing is empty."""
    delta = row_sums(grad, out, grad_lse)
    call = prepare(
        grad, query, key, value, mask, key_lengths, seed, lse.contiguous(), delta, dropout_p, scale,
        low, high, int64,
    )  # fmt: skip
    dk, dv = key_value_gradients(call, key, value)
    dq = query_gradient(call, query)
    d_mask = mask_gradient(call, mask) if wants_mask and mask is not None else query.new_empty(0)
    return dq, dk, dv, d_mask
