"""What must not have changed since a program was recorded."""

from __future__ import annotations

import ctypes
import operator
from itertools import repeat
from typing import Any

from torch.fx import GraphModule

from nnarch.accelerate.graph import layer_of
from nnarch.nn.packing import PackedWeightMixin
from nnarch.precision import get_precision


class Guard:
    """The state of a model that a program depends on and cannot see itself.

    Between two calls the kernels have driven Python's objects out of the caches, so what is looked
    at here is as little as possible, and without bytecode for each: a loop over the modules took
    170 µs for a MobileNetV2, as long as two of its layers.

    Attributes:
        owned: id of every parameter, buffer and packed weight. Other constants (a mask made by the
            graph's own code, say) may differ in the next call, so no program is made of them.
        probes: an address, a size and the bits there, of elements of packed weights.
    """

    def __init__(self, body: GraphModule) -> None:
        modules = list(body.modules())
        called = [layer_of(body, node) for node in body.graph.find_nodes(op="call_module")]
        called = [body, *{part: None for layer in called for part in layer.modules()}]
        self._states = [vars(module) for module in called]
        self._hooks = [
            hooks
            for module in called
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        named = [
            (entries, name, entry)
            for module in modules
            for entries in (module._parameters, module._buffers, module._modules)
            for name, entry in entries.items()
        ]
        self._owners = [entries for entries, _, _ in named]
        self._names = [name for _, name, _ in named]
        self._entries = [entry for *_, entry in named]
        packing = [m for m in modules if isinstance(m, PackedWeightMixin) and m._packed is not None]
        self._packing = [vars(module) for module in packing]
        self._caches: list[Any] = [module._packed for module in packing]
        sources = [source for cache in self._caches for source in cache.sources]
        self._sources = [source.weight for source in sources]
        self._versions = [source.version for source in sources]
        self.owned = {id(entry) for entry in self._entries}
        self.owned |= {id(packed) for cache in self._caches for packed in cache.packed.values()}
        probes = [probe for source in sources for probe in source.probes]
        self.probes = [
            number
            for cell, bits in probes
            for number in (ctypes.addressof(cell), ctypes.sizeof(cell), _signed(bits))
        ]
        self._precision = get_precision()  # packed weights follow it

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        return not (
            any(self._hooks)
            or get_precision() != self._precision
            or any(map(_training, self._states))
            or any(map(operator.contains, self._states, repeat("forward")))
            or not all(map(operator.is_, map(_get, self._owners, self._names), self._entries))
            or not all(map(operator.is_, map(_get, self._packing, repeat("_packed")), self._caches))
            or list(map(_version, self._sources)) != self._versions
        )


_training, _version = operator.itemgetter("training"), operator.attrgetter("_version")
_get: Any = dict.get


def _signed(bits: int) -> int:
    """The int64 with these 64 bits."""
    return bits - (bits >> 63 << 64)
