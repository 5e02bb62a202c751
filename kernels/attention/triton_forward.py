"""Attention's forward on the GPU: tiles, and how the kernels are launched.

Few queries and many keys (decoding) fill a GPU only where the keys are split among programs: each
writes its own normalised output and log-sum-exp, and a second kernel weighs them. The query heads
that share a key head are stacked as rows of one tile there, so that keys are read once.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
from torch import Tensor

from nnarch.kernels.gpu.launch import cdiv, flat_grid, launch, named_strides
from nnarch.kernels.gpu.targets import current_target
from nnarch.kernels.gpu.tiles import Tile, pick

from . import reference
from .triton_call import LEAST_DESCRIBED, Call
from .triton_forward_kernels import _attention_combine_kernel, _attention_fwd_kernel
from .triton_tables import DescribedTile, TileRow, attention_table, described, narrowed, padded

SPLIT_KEYS = 512
"""Keys of one part, at least; the parts depend on the shape alone."""
MOST_SPLITS = 64


def _shared(m: int, n: int, stages: int) -> int:
    return m + 2 * stages * n


_FORWARD_ROWS: dict[str, list[TileRow]] = dict(
    half=[
        (64, 128, 4, 3, 0, 64, 0, 1.30),
        (64, 32, 4, 3, 0, 64, 0, 1.44),
        (64, 64, 4, 3, 0, 128, 0, 1.45),
        (128, 64, 8, 3, 0, 128, 0, 1.56),
        (128, 64, 8, 2, 64, 128, 128),
        (64, 64, 8, 2, 256, 256, 128),
        (64, 32, 8, 2, 256, 256, 256),
        (64, 32, 8, 1, 256, 256, 256),
    ],
    tf32=[
        (128, 32, 8, 2, 0, 128, 0),
        (64, 64, 8, 2, 0, 128, 0),
        (64, 32, 8, 2, 128, 128, 0),
        (64, 32, 8, 1, 256, 256, 0),
    ],
    tf32x3=[
        (64, 64, 4, 2, 0, (64, 0), 0, 1.30),
        (64, 32, 4, 1, 0, (128, 0), 0, 1.55),
        (64, 64, 8, 1, 0, (0, 128), 0),
        (64, 32, 8, 1, 128, 256, 0),
        (64, 16, 8, 1, 256, 256, 0),
    ],
    ieee=[(64, 32, 8, 1, 256, 256, 256), (32, 32, 4, 1, 256, 256, 256)],
)
FORWARD = attention_table(
    "attention",
    _shared,
    128,
    described=[
        DescribedTile((64, 64, 4, 3), 64, 1.14, registers=128),
        DescribedTile((64, 64, 4, 3), 128, 1.37, one_loop=False),
    ],
    **_FORWARD_ROWS,
)
FORWARD_MASKED = attention_table(
    "attention_masked",
    _shared,
    128,
    **narrowed(
        _FORWARD_ROWS,
        half={
            (64, 128, 4, 3): (0, 0, 0),
            (64, 64, 4, 3): (0, 64, 0),
            (128, 64, 8, 3): (0, 64, 0),
            (128, 64, 8, 2): (0, (64, 128), 0),  # boolean masks: 16 bytes on sm_90
            (64, 64, 8, 2): (256, (0, 128), 64),
            (64, 32, 8, 2): (256, ({256}, 256), 256),
            (64, 32, 4, 2): (0, (128, 0), 0),
        },
        tf32={(64, 64, 8, 2): (0, 64, 0)},
        tf32x3={
            (64, 64, 4, 2): (0, 0, 0),
            (64, 32, 8, 1): (0, 0, 0),
            (64, 16, 8, 1): (128, 128, 0),
            (32, 16, 8, 1): (256, 256, 0),
        },
    ),
)
DECODE = attention_table(
    "attention_decode",
    _shared,
    128,
    half=[
        (16, 128, 4, 2, 128, 128, 128),
        (16, 64, 4, 2, 256, 256, 256),
        (16, 32, 4, 2, 256, 256, 256),
    ],
    tf32=[(16, 64, 4, 2, 128, 128, 0), (16, 32, 4, 2, 128, 128, 0), (16, 32, 4, 1, 256, 256, 0)],
    tf32x3=[
        (16, 64, 4, 2, 128, 128, 0),
        (16, 32, 4, 2, 128, 128, 0),
        (16, 32, 4, 1, 256, 256, 0),
        (16, 16, 4, 1, 256, 256, 0),
    ],
    ieee=[(16, 32, 4, 1, 256, 256, 256), (16, 16, 4, 1, 256, 256, 256)],
)
FEW_ROWS = 16
"""Rows up to which the keys may be split, and the heads of a group stacked."""


def forward(call: Call, value: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the forward; nothing is empty. `value` is the call's."""
    query, batch, heads, length, keys = call.query, call.batch, call.heads, call.length, call.keys
    share = heads // call.groups
    out = reference.new_output(query, value)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    stack = share if length * share <= FEW_ROWS and call.seed is None else 1
    few = length * stack <= FEW_ROWS
    parts = _parts(batch * heads // stack, keys) if few else 1
    part_keys = cdiv(cdiv(keys, parts), SPLIT_KEYS) * SPLIT_KEYS
    parts = cdiv(keys, part_keys)
    into, into_lse = out, lse
    if parts > 1:
        into = query.new_empty((parts, *out.shape), dtype=torch.float32)
        into_lse = lse.new_empty((parts, *lse.shape))
    products, problem = call.products(128, LEAST_DESCRIBED)
    problem = dataclasses.replace(problem, m=length * stack)
    arguments = {
        **call.arguments(),
        **{"out_ptr": into, "lse_ptr": into_lse, "B": batch, "LEFT": call.left},
        **{"part_keys": part_keys, "STACK": stack},
        **{"DESCRIPTORS": False, "ONE_LOOP": False},
        "LATE_SCALE": call.scale > 0 and (call.mask is None or call.mask.dtype == torch.bool),
        **named_strides("o", "bhmd", into if parts == 1 else into[0]),
        "stride_op": into.stride(0) if parts > 1 else 0,
        **products,
    }

    def run(tile: Tile) -> None:
        programs = cdiv(length * stack, tile["BLOCK_M"]) * batch * (heads // stack)
        found = described(tile, {"q_ptr": query, "k_ptr": call.key, "v_ptr": value})
        launch(_attention_fwd_kernel, (*flat_grid(programs), parts), arguments | found, tile)

    table = DECODE if few else FORWARD_MASKED if call.masked else FORWARD
    run(pick(table, problem, run))
    if parts > 1:
        _combine(into, into_lse, out, lse, parts)
    return out, lse


def _parts(programs: int, keys: int) -> int:
    """Into how many parts of the keys a decoding step is split: two waves of programs at most."""
    wanted = cdiv(2 * current_target().processors, programs)
    return max(1, min(wanted, cdiv(keys, SPLIT_KEYS), MOST_SPLITS))


def _combine(parts: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, count: int) -> None:
    arguments = {
        **{"parts_ptr": parts, "part_lse_ptr": part_lse, "out_ptr": out, "lse_ptr": lse},
        **{"R": lse.numel(), "H": out.shape[1], "L": out.shape[2]},
        **named_strides("o", "bhmd", out),
        **{"PARTS": count, "PADDED": triton.next_power_of_2(count)},
        **{"DV": out.shape[3], "VALUE_DEPTH": padded(out.shape[3])},
    }
    launch(_attention_combine_kernel, flat_grid(lse.numel()), arguments)
