"""What a call of attention on the GPU was given, as its kernels take it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nnarch.kernels.dropout.reference import survivor_scale, threshold
from nnarch.kernels.gpu.launch import dot_precision, named_strides, needs_int64
from nnarch.kernels.gpu.matmul import precision_of
from nnarch.kernels.gpu.tiles import Problem

from .triton_tables import describable, padded, reads_chunks
from .triton_tiles import ADDED_MASK, BOOL_MASK, NO_MASK

LEAST_DESCRIBED, LEAST_DESCRIBED_BACKWARD = 2**34, 2**37
"""B·H·L·S·D from which tiles are read by tensor descriptors, 100 µs of an H100 forward, eight times
that work backward (chosen, not measured). The host makes them anew in every call, when this was
chosen in Python: forward and backward of 2**34 took 777 µs a call with them, their kernels 408."""


@dataclasses.dataclass(frozen=True)
class Call:
    """The inputs, as `nnarch::attention` names them; no value where only weights are wanted."""

    query: Tensor
    key: Tensor
    value: Tensor | None
    mask: Tensor | None
    key_lengths: Tensor | None
    seed: Tensor | None
    dropout_p: float
    scale: float
    low: int
    high: int

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def groups(self) -> int:
        return self.key.shape[1]

    @property
    def length(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def masked(self) -> bool:
        """Whether a mask or dropout takes registers beside the products: tiles of their own."""
        return self.mask is not None or self.seed is not None

    def arguments(self, *others: Tensor) -> dict[str, object]:
        """By name: pointers, strides, sizes and the band. `others` are further tensors that
        kernels address by 32 bits where their size allows it."""
        low, high = self._band()
        found = {
            **{"q_ptr": self.query, "k_ptr": self.key, "lengths_ptr": self.key_lengths},
            **{"seed_ptr": self.seed, "scale": float(self.scale), "low": low, "high": high},
            **{"threshold": threshold(self.dropout_p)},
            **{"survivor": survivor_scale(self.dropout_p)},
            **{"H": self.heads, "L": self.length, "S": self.keys},
            **{"SHARE": self.heads // self.groups, "D": self.query.shape[3]},
            **self._mask(),
            **named_strides("q", "bhmd", self.query),
            **named_strides("k", "bhnd", self.key),
            "INT64": needs_int64(self.query, self.key, self.value, self.mask, *others),
        }
        if self.value is not None:
            found |= {"v_ptr": self.value, "DV": self.value.shape[3]}
            found |= named_strides("v", "bhnd", self.value)
        return found

    @property
    def left(self) -> bool:
        """Whether the band keeps queries from seeing keys far before them."""
        return self._band()[0] > 1 - self.length

    def _band(self) -> tuple[int, int]:
        # No wider than positions can be apart, in 32 bits.
        low, high = (min(max(side, -self.length), self.keys) for side in (self.low, self.high))
        return low, high

    def _mask(self) -> dict[str, object]:
        # Pointer, strides and kind; a dimension of one value has stride 0.
        mask = self.mask
        if mask is None:
            kind, strides = NO_MASK, (0,) * 4
        else:
            kind = BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
            sizes = zip(mask.shape, mask.stride(), strict=True)
            strides = tuple(0 if n == 1 else s for n, s in sizes)
        named = {f"stride_m{dim}": s for dim, s in zip("bhmn", strides, strict=True)}
        view = mask.view(torch.uint8) if mask is not None and kind == BOOL_MASK else mask
        return {"mask_ptr": view, **named, "MASK": kind}

    def products(self, widest: int, least_described: float) -> tuple[dict[str, object], Problem]:
        """Widths of heads and how products are computed; what the tiles are chosen for.

        Args:
            widest: as of :func:`reads_chunks`.
            least_described: B·H·L·S·D from which it reads by tensor descriptors, infinity for
                a kernel that cannot.
        """
        precision = dot_precision("matmul")
        widths = {"DEPTH": padded(self.query.shape[3])}
        if self.value is not None:
            widths["VALUE_DEPTH"] = padded(self.value.shape[3])
        kind = precision_of(self.query.dtype, precision)
        pairs = self.batch * self.heads * self.length * self.keys
        long = pairs * max(widths.values()) >= least_described
        vectors = long and describable(self.query, self.key, self.value)
        problem = Problem(self.length, self.keys, max(widths.values()), kind, vectors)
        named = {**widths, "PRECISION": precision}
        if self.value is not None:
            named["CHUNKS"] = reads_chunks(problem, widest)
        return named, problem
