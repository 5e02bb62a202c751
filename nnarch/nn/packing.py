"""Packed weights: a module in eval mode keeps its weight in the layout that the kernel reads.

Packing costs about as much as reading the weight twice, which a batch of one feels. The packed
copy is a cache and nothing else: it is absent from the state_dict, from pickles and from deep
copies, and it is rebuilt when the weight changes. A change is noticed through the parameter's
identity, its data pointer and strides and its version counter; the module's stride, groups and
dilation, which packing reads too, drop it when they are set. Writes that PyTorch does not count
(`weight.data.mul_(2)`, a NumPy view) are noticed through a few probed elements, so they are caught
when they touch the whole weight; after such a write to single elements, call
:func:`drop_packed_weights`. A weight in shared memory, which another process may write, is never
packed. Where the best layout depends on the input (:class:`Conv2d`), a module keeps one packed copy
for each layout that it met. A module with several weights has them in one cache: a change of one
makes all of them anew.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import _disable_current_modes

_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_tracing_state = torch._C._get_tracing_state

# What a probe reads: the bits of one element, so that NaN equals itself.
_PROBE_TYPES = {2: ctypes.c_uint16, 4: ctypes.c_uint32, 8: ctypes.c_uint64}
_PROBES = 3


class _Source:
    """A weight that something packed was made of, and what it looked like then.

    Args:
        weight: the weight.
        probed: whether to read a few elements of it, to notice writes that PyTorch does not count.
    """

    __slots__ = ("pointer", "probes", "strides", "version", "weight", "witness")

    def __init__(self, weight: Parameter, probed: bool) -> None:
        self.weight = weight
        # Keeps the storage alive, so that no later weight can have its address.
        self.witness = weight.detach()
        self.pointer = weight.data_ptr()
        self.strides = weight.stride()
        self.version = weight._version
        self.probes = _probes(weight) if probed else ()

    def is_current(self, weight: Tensor) -> bool:
        """Whether `weight` is still what was packed."""
        if (
            weight is not self.weight
            or weight.data_ptr() != self.pointer
            or weight._version != self.version  # after it: inference tensors have none
            or weight.stride() != self.strides
        ):
            return False
        # Only now: the addresses are valid as long as the storage has not moved.
        for probe, bits in self.probes:  # noqa: SIM110 (three times faster than all())
            if probe.value != bits:
                return False
        return True


class _PackedWeights:
    """The packed forms of a module's weights.

    Attributes:
        sources: the weights.
        may_pack: whether anything may be packed; probes are read only then.
        packed: by layout (:meth:`PackedWeightMixin._layout`), or by what the module counts.
    """

    __slots__ = ("may_pack", "packed", "sources")

    def __init__(self, weights: tuple[Parameter, ...]) -> None:
        self.may_pack = not any(weight.is_shared() for weight in weights)
        self.sources = tuple(_Source(weight, self.may_pack) for weight in weights)
        self.packed: dict[int, Tensor | None] = {}

    def is_current(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether `weights` are still what was packed."""
        sources = self.sources
        if len(weights) == 1:  # spares most modules a third of a microsecond
            return sources[0].is_current(weights[0])
        return len(weights) == len(sources) and all(map(_Source.is_current, sources, weights))

    def get(self, key: int, pack: Callable[..., Tensor | None], *args: Any) -> Tensor | None:
        """The form called `key`, made by ``pack(*args)`` where it is new."""
        packed = self.packed
        if key not in packed:
            with _disable_current_modes():  # a forced backend would pack for itself
                packed[key] = pack(*args)
        return packed[key]


def _probes(weight: Tensor) -> tuple[tuple[Any, int], ...]:
    """Cells that read a few elements of `weight` in place, each with its present bits."""
    kind = _PROBE_TYPES.get(weight.element_size())
    if kind is None or weight.numel() == 0:
        return ()
    # The largest elements of three rows: a bulk update is least likely to leave these alone.
    weight = weight.detach()
    cells = []
    for row in sorted({0, len(weight) // 2, len(weight) - 1})[:_PROBES]:
        values = weight[row]
        place = torch.unravel_index(values.abs().flatten().argmax(), values.shape)
        # Of the weight itself: flattening copies what is not contiguous, channels_last say.
        cell = kind.from_address(values[place].data_ptr())
        cells.append((cell, cell.value))
    return tuple(cells)


class PackedWeightMixin(Module):
    """Gives a module the cache; subclasses with one `weight` say how to pack it.

    The cache needs no place in `__init__`: a torch.nn twin whose `__class__` is exchanged has it.
    """

    _packed: _PackedWeights | None = None
    # What subclasses read beside the weight when they pack it.
    _packed_with = frozenset({"stride", "groups", "dilation"})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._packed_with:
            self._drop_packed()
        super().__setattr__(name, value)

    def _layout(self, weight: Tensor, x: Tensor | None) -> int | None:
        """The layout that serves input `x` best; None where that is open as long as `x` is."""
        return 0

    def _pack(self, weight: Tensor, layout: int) -> Tensor | None:
        """The packed form of `weight`, or None where no kernel of its device takes one."""
        raise NotImplementedError

    def _packed_weight(
        self, weight: Tensor, x: Any, layout_of: Callable[[Tensor, Any], int | None] | None = None
    ) -> Tensor | None:
        """The packed weight for this call, or None in training or where a gradient is wanted.

        Args:
            weight: this module's.
            x: the input.
            layout_of: says the layout in place of :meth:`_layout`, where `x` is not what the
                weight meets.
        """
        cache = self._packed_weights((weight,), (x,))
        if cache is None:
            return None
        layout = (layout_of or self._layout)(weight, x)
        if layout is None:
            return None
        packed = cache.packed
        if layout in packed:
            return packed[layout]
        return cache.get(layout, self._pack, weight.detach(), layout)

    def _packed_weights(
        self, weights: tuple[Any, ...], inputs: tuple[Any, ...]
    ) -> _PackedWeights | None:
        """The packed forms of these weights, or None where this call must do without.

        A traced graph would keep them as constants, in the layout of this machine's kernels.

        Args:
            weights: all that is packed of this module.
            inputs: the other arguments of the kernel that may want a gradient.
        """
        if self.training or _is_compiling() or _tracing_state() is not None:
            return None
        if _is_grad_enabled():
            for t in weights + inputs:
                if isinstance(t, Tensor) and t.requires_grad:
                    return None
        cache = self._packed
        if cache is None or not cache.is_current(weights):
            cache = self._renew_packed(weights)
        return cache if cache is not None and cache.may_pack else None

    def _renew_packed(self, weights: tuple[Any, ...]) -> _PackedWeights | None:
        """A new cache, or None for weights that are computed, elsewhere, or not counted."""
        self._drop_packed()
        for weight in weights:
            if type(weight) is not Parameter or not weight.is_cpu or weight.is_inference():
                return None
        with _disable_current_modes():  # nor is it part of what a mode may be writing down
            cache = self.__dict__["_packed"] = _PackedWeights(weights)
        return cache

    def _pack_now(self) -> None:
        """Pack, instead of in the first call, what does not depend on the input's size."""
        self._packed_weight(self.weight, None)  # type: ignore[arg-type]

    def _drop_packed(self) -> None:
        self.__dict__.pop("_packed", None)

    def train(self, mode: bool = True):
        """As in torch.nn; training mode gives the packed weight's memory back."""
        if mode:
            self._drop_packed()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        self._drop_packed()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop_packed()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_packed", None)
        return state


def drop_packed_weights(module: Module) -> None:
    """Forget the packed weights of `module` and its submodules; the next call packs anew.

    Args:
        module: any module. Needed only after a write that PyTorch does not count and that changes
            single elements, such as ``weight.data[3, 2] = 0``.
    """
    for part in module.modules():
        if isinstance(part, PackedWeightMixin):
            part._drop_packed()
