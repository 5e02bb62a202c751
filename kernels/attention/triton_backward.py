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

from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides
from nnarch.kernels.gpu.tiles import Problem, Tile, pick

from . import reference
from .triton_additive_mask import _attention_bwd_mask_kernel
from .triton_backward_kernels import (
    _attention_bwd_delta_kernel,
    _attention_bwd_kv_kernel,
)
from .triton_call import LEAST_DESCRIBED_BACKWARD, Call
from .triton_query_gradient import _attention_bwd_q_kernel
from .triton_tables import (
    DescribedTile,
    TileRow,
    attention_table,
    describable,
    described,
    narrowed,
    padded,
)


def _key_value_shared(m: int, n: int, stages: int) -> int:
    return 2 * (n + stages * m)


_KEY_VALUE_ROWS: dict[str, list[TileRow]] = dict(
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
KEY_VALUE = attention_table(
    "attention_key_value",
    _key_value_shared,
    64,
    described=[
        DescribedTile((64, 64, 4, 3), 64, 1.25),
        DescribedTile((64, 64, 4, 2), 128, 1.26),
    ],
    **_KEY_VALUE_ROWS,
)
KEY_VALUE_MASKED = attention_table(
    "attention_key_value_masked",
    _key_value_shared,
    64,
    **narrowed(
        _KEY_VALUE_ROWS,
        half={
            (64, 64, 4, 3): (0, 0, 0),
            (64, 64, 4, 2): (0, 0, 0),
            (32, 64, 4, 2): (0, 0, 0),
            (32, 128, 8, 2): (0, (0, 64), 0),  # boolean masks: 32 bytes on sm_90
            (32, 64, 8, 2): (0, (0, 64), 0),
            (32, 64, 8, 1): (0, (0, 64), 64),
            (16, 64, 8, 1): (64, ({16, 32, 64, 256}, 64), 256),
            (32, 64, 4, 1): (0, (64, 0), 0),
            (16, 64, 4, 1): (0, 128, 0),
        },
        tf32={
            (32, 64, 8, 2): (0, 0, 0),
            (32, 64, 8, 1): (0, 0, 0),
            (16, 64, 8, 1): (0, 256, 0),
        },
        tf32x3={(16, 64, 8, 1): (0, 0, 0), (16, 32, 8, 1): (128, 128, 0)},
    ),
)


def _query_shared(m: int, n: int, stages: int) -> int:
    return 2 * (m + stages * n)


_QUERY_ROWS: dict[str, list[TileRow]] = dict(
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
        (64, 16, 8, 1, 128, (128, 256), 0),
        (32, 16, 8, 1, 256, 256, 0),
    ],
    ieee=[(32, 32, 8, 1, 256, 256, 128), (16, 16, 8, 1, 256, 256, 256)],
)
QUERY = attention_table(
    "attention_query",
    _query_shared,
    64,
    described=[
        DescribedTile((64, 64, 4, 3), 64, 1.155, one_loop=False, registers=168),
        DescribedTile((128, 64, 8, 3), 128, 1.265),
    ],
    **_QUERY_ROWS,
)
QUERY_MASKED = attention_table(
    "attention_query_masked",
    _query_shared,
    64,
    **narrowed(
        _QUERY_ROWS,
        half={
            (64, 64, 4, 3): (0, 0, 0),
            (64, 64, 4, 2): (0, 0, 0),
            (128, 64, 8, 2): (0, (64, 0), 0),
            (128, 32, 8, 2): (0, 64, 128),
            (64, 32, 8, 2): (64, 256, {16, 32, 64, 256}),
            (64, 32, 8, 1): ({16, 32, 64, 256}, 256, 256),
            (32, 32, 8, 1): (128, 0, 0),
        },
        tf32={(64, 32, 8, 1): (0, (0, 128), 0)},
        tf32x3={(64, 16, 8, 1): (128, 128, 0)},
    ),
)


@dataclasses.dataclass(frozen=True)
class Backward:
    """What the kernels of one backward share.

    Attributes:
        call: the forward's inputs.
        rows: the tensors whose rows the kernels read, by argument.
        arguments: of all of the kernels.
        problem: what their tiles are chosen for.
    """

    call: Call
    rows: dict[str, Tensor]
    arguments: dict[str, object]
    problem: Problem


def prepare(call: Call, grad: Tensor, lse: Tensor, delta: Tensor) -> Backward:
    """The arguments that all kernels have in common; `lse` and `delta` are contiguous."""
    products, problem = call.products(64, LEAST_DESCRIBED_BACKWARD)
    problem = dataclasses.replace(problem, vectors=problem.vectors and describable(grad, lse))
    arguments = {
        **call.arguments(grad),
        **{"grad_ptr": grad, "lse_ptr": lse, "delta_ptr": delta},
        **named_strides("g", "bhmd", grad),
        **products,
    }
    rows = {"q_ptr": call.query, "k_ptr": call.key, "grad_ptr": grad}
    if call.value is not None:
        rows["v_ptr"] = call.value
    return Backward(call, rows, arguments, problem)


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


def key_value_gradients(work: Backward, value: Tensor) -> tuple[Tensor, Tensor]:
    """dK and dV; `value` is the call's."""
    call, key = work.call, work.call.key
    dk, dv = reference.new_output(key, key), reference.new_output(value, value)
    arguments = {
        **work.arguments,
        **{"dk_ptr": dk, "dv_ptr": dv, "DESCRIPTORS": False, "ONE_LOOP": False},
        **named_strides("dk", "bhnd", dk),
        **named_strides("dv", "bhnd", dv),
    }

    def run(tile: Tile) -> None:
        programs = cdiv(call.keys, tile["BLOCK_N"]) * call.batch * call.groups
        values = {name: work.arguments[name] for name in ("lse_ptr", "delta_ptr")}
        found = arguments | described(tile, work.rows | values)
        launch(_attention_bwd_kv_kernel, flat_grid(programs), found, tile)

    run(pick(KEY_VALUE_MASKED if call.masked else KEY_VALUE, work.problem, run))
    return dk, dv


def query_gradient(work: Backward) -> Tensor:
    """dQ."""
    call = work.call
    dq = reference.new_output(call.query, call.query)
    arguments = {
        **work.arguments,
        **{"dq_ptr": dq, "LEFT": call.left, "DESCRIPTORS": False, "ONE_LOOP": False},
        **named_strides("dq", "bhmd", dq),
    }

    def run(tile: Tile) -> None:
        programs = cdiv(call.length, tile["BLOCK_M"]) * call.batch * call.heads
        found = arguments | described(tile, work.rows)
        launch(_attention_bwd_q_kernel, flat_grid(programs), found, tile)

    run(pick(QUERY_MASKED if call.masked else QUERY, work.problem, run))
    return dq


def mask_gradient(work: Backward, mask: Tensor) -> Tensor:
    """dS, added over the dimensions in which the mask has one value."""
    call = work.call
    d_mask = torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
    mask_batch, mask_heads, mask_rows, mask_columns = mask.shape
    arguments = {
        **work.arguments,
        **{"d_mask_ptr": d_mask, "B": call.batch, "MASK_B": mask_batch, "MASK_H": mask_heads},
        **{"ONE_ROW": mask_rows == 1, "ONE_COLUMN": mask_columns == 1},
    }

    def run(tile: Tile) -> None:
        tiles_m = 1 if mask_rows == 1 else cdiv(call.length, tile["BLOCK_M"])
        tiles_n = 1 if mask_columns == 1 else cdiv(call.keys, tile["BLOCK_N"])
        programs = mask_batch * mask_heads * tiles_m * tiles_n
        launch(_attention_bwd_mask_kernel, flat_grid(programs), arguments, tile)

    run(pick(QUERY_MASKED if call.masked else QUERY, work.problem, run))
    return d_mask


def backward(
    call: Call,
    value: Tensor,
    grad: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wants_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward; nothing is empty. `value` is the call's."""
    delta = row_sums(grad, out, grad_lse)
    work = prepare(call, grad, lse.contiguous(), delta)
    dk, dv = key_value_gradients(work, value)
    dq = query_gradient(work)
    mask = call.mask if wants_mask else None
    d_mask = call.query.new_empty(0) if mask is None else mask_gradient(work, mask)
    return dq, dk, dv, d_mask
