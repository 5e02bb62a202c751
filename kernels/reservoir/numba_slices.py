"""A reservoir's matrix as the GPU kernels read it: in slices of 32 rows, sorted by length.

Entry k of the 32 rows lies side by side, so that a warp reads it in one transaction, and its rows
end together. Cutting them takes about 25 operations of torch's and a look at a number on the GPU,
so it is done once where the matrix stays: the slices travel as one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WARP = 32


@dataclass(frozen=True)
class Slices:
    """A matrix as the kernels read it."""

    values: Tensor  # [entries]
    columns: Tensor  # [entries], int32; n for padding, where the state has a zero
    lengths: Tensor  # [slices], int32
    starts: Tensor  # [slices], int64: the slice's first entry
    rows: Tensor  # [slices * 32], int32; n for rows that a slice lacks


def cut(values: Tensor, columns: Tensor, rows: Tensor) -> Slices:
    """Cut compressed rows into slices, with torch, where the matrix is."""
    n, device = rows.numel() - 1, values.device
    first, lengths = rows[:-1].long(), rows.long().diff()
    order = torch.argsort(lengths, descending=True, stable=True)
    count = -(-n // WARP)
    padded = torch.full((count * WARP,), n, dtype=torch.int64, device=device)
    padded[:n] = order
    of_row = torch.cat((lengths, lengths.new_zeros(1)))[padded].view(count, WARP)
    longest = of_row[:, 0]  # sorted: the first row of a slice is its longest
    starts = torch.cat((longest.new_zeros(1), (longest * WARP).cumsum(0)[:-1]))
    entries = int((longest * WARP).sum()) if n else 0
    place = torch.arange(entries, device=device)
    slice_of = torch.repeat_interleave(torch.arange(count, device=device), longest * WARP)
    k = (place - starts[slice_of]) // WARP
    row = padded[slice_of * WARP + (place - starts[slice_of]) % WARP]
    there = k < torch.cat((lengths, lengths.new_zeros(1)))[row]
    source = (torch.cat((first, first.new_zeros(1)))[row] + k)[there]
    packed_values = values.new_zeros(entries)
    packed_values[there] = values[source]
    packed_columns = torch.full((entries,), n, dtype=torch.int32, device=device)
    packed_columns[there] = columns[source]
    return Slices(
        packed_values, packed_columns, longest.to(torch.int32), starts, padded.to(torch.int32)
    )


def pack(matrix: Slices, dtype: torch.dtype) -> Tensor:
    """The slices as one tensor of `dtype`, in which their values are too."""
    parts = (matrix.starts[: matrix.lengths.numel()], matrix.lengths, matrix.rows, matrix.columns)
    return torch.cat([_whole_words(part) for part in (*parts, matrix.values.to(dtype))]).view(dtype)


def unpack(packed: Tensor, n: int) -> Slices:
    """Views of what :func:`pack` made of a matrix of `n` rows.

    Raises:
        ValueError: it was made of a matrix of another size.
    """
    count = -(-n // WARP)
    raw = packed.view(torch.uint8)
    # Entries come in 32s, so their number follows from the size.
    sizes = [8 * count, _rounded(4 * count), 4 * WARP * count]
    entries, rest = divmod(raw.numel() - sum(sizes), 4 + packed.element_size())
    if entries < 0 or rest or entries % WARP:
        raise ValueError("reservoir: packed is not what pack_reservoir made of this matrix")
    sizes += [4 * entries, packed.element_size() * entries]
    starts, lengths, rows, columns, values = raw.split(sizes)
    return Slices(
        values.view(packed.dtype),
        columns.view(torch.int32),
        lengths.view(torch.int32)[:count],
        starts.view(torch.int64),
        rows.view(torch.int32),
    )


def _whole_words(part: Tensor) -> Tensor:
    """Its bytes, filled up to a multiple of 8."""
    # Not contiguous(), for which a stride does not count where there is one number or none.
    raw = part.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return torch.nn.functional.pad(raw, (0, _rounded(raw.numel()) - raw.numel()))


def _rounded(size: int) -> int:
    return -(-size // 8) * 8
