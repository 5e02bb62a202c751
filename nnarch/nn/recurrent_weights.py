"""How recurrent layers and cells keep their weights packed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from nnarch import functional as F
from nnarch.nn.checks import check_dtype
from nnarch.nn.packing import PackedWeightMixin, _PackedWeights
from nnarch.precision import get_precision

# Steps of fewer sequences make no pairs, whatever the weights.
_LEAST_ROWS = 12


@functools.lru_cache(maxsize=4096)
def _pairs_serve(ih_size, hh_size, dtype, rows, kind, precision) -> bool:
    """Whether weights of these sizes should be packed for pairs at this precision, asked once."""
    with _disable_current_modes():  # who records operations should not see this one
        one = torch.empty(1, dtype=dtype)
        return F.recurrent_pairs(one.expand(ih_size), one.expand(hh_size), rows, kind=kind)


class RecurrentWeights(PackedWeightMixin):
    """What layers and cells share: how their weights are packed.

    Attributes:
        weight_storage: torch.bfloat16 to keep packed weights in half the bytes, or None.
    """

    weight_storage: torch.dtype | None = None
    _makes_pairs = True

    def _init_storage(self, weight: Tensor, weight_storage: torch.dtype | None) -> None:
        """Check the parameters' dtype and that of the packed weights, and keep the latter."""
        name = type(self).__name__
        check_dtype(name, weight.dtype)
        if weight_storage is None:
            return
        if weight_storage != torch.bfloat16:
            raise ValueError(
                f"{name}: weight_storage must be torch.bfloat16 or None, got {weight_storage}"
            )
        if weight.dtype != torch.float32:
            raise ValueError(
                f"{name}: weight_storage is for float32 parameters, got {weight.dtype}"
            )
        self.weight_storage = weight_storage

    def _pack_recurrent(
        self,
        weight_ih: Tensor,
        weight_hh: Tensor,
        weight_hr: Tensor | None,
        kind: int,
        pairs: bool,
    ) -> Tensor | None:
        """Weights as the kernels read them."""
        bfloat16 = self.weight_storage is not None and weight_ih.dtype == torch.float32
        return F.pack_recurrent_weights(
            weight_ih, weight_hh, weight_hr, kind=kind, bfloat16=bfloat16, pairs=pairs
        )

    def _in_pairs(self, weight_ih: Tensor, weight_hh: Tensor, rows: int, kind: int) -> bool:
        """Whether to pack these for pairs of sequences: see nnarch.functional.recurrent_pairs."""
        if rows < _LEAST_ROWS or self.weight_storage is not None or not self._makes_pairs:
            return False
        sizes = weight_ih.shape, weight_hh.shape, weight_ih.dtype
        return _pairs_serve(*sizes, rows, kind, get_precision())

    def _packed_form(
        self,
        cache: _PackedWeights,
        k: int,
        count: int,
        rows: int,
        weights: tuple[Tensor, Tensor, Tensor | None],
        kind: int,
    ) -> Tensor | None:
        """Weights `k` of `count`, packed for steps of so many `rows`.

        The form for pairs holds the plain one and replaces it: a step with too few rows for pairs
        reads that part.
        """
        if k + count in cache.packed:
            return cache.packed[k + count]
        pairs = self._in_pairs(weights[0], weights[1], rows, kind)
        if pairs:
            cache.packed.pop(k, None)
        return cache.get(k + count * pairs, self._pack_recurrent, *weights, kind, pairs)

    def _storage_repr(self) -> str:
        return f", weight_storage={self.weight_storage}" if self.weight_storage else ""
