"""Keys and values of earlier tokens, kept so that a decoder computes each of them once.

Caches are for inference: they are written in place, so nothing flows back through them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FIRST_CAPACITY = 64


class GrowingCache:
    """Keys and values ``[B, H, T, D]`` of T tokens; its memory doubles when it is full.

    Attributes:
        length: T.
    """

    def __init__(self) -> None:
        self.length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens behind the others and return all.

        Args:
            key, value: ``[B, H, L, D]`` of L new tokens, any strides.

        Returns:
            Keys and values ``[B, H, T + L, D]``: views, valid until the next change of the cache.

        Raises:
            ValueError: other batch, heads, sizes or dtype than what is stored, or a key and a value
                of different lengths.
            RuntimeError: a gradient is wanted.
        """
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise RuntimeError(
                f"{type(self).__name__}: caches are for inference; append under torch.no_grad()"
            )
        if key.shape[2] != value.shape[2]:
            raise ValueError(
                f"{type(self).__name__}: key and value must be equally long, got "
                f"{tuple(key.shape)} and {tuple(value.shape)}"
            )
        if self._key is not None and self._value is not None:
            _check_fits(type(self).__name__, "key", key, self._key)
            _check_fits(type(self).__name__, "value", value, self._value)
        start, end = self.length, self.length + key.shape[2]
        self._key = self._with_room(self._key, key, end)
        self._value = self._with_room(self._value, value, end)
        self._key[:, :, start:end] = key
        self._value[:, :, start:end] = value
        self.length = end
        return self._key[:, :, :end], self._value[:, :, :end]

    def reorder(self, rows: Tensor) -> None:
        """Continue with these rows of the batch, in this order; a row may occur several times.

        Args:
            rows: [B'] indices: of the beams that survive, say.
        """
        if self._key is not None and self._value is not None:
            self._key = self._key.index_select(0, rows)
            self._value = self._value.index_select(0, rows)

    def _capacity(self, needed: int, held: int) -> int:
        """How many tokens new memory is for."""
        return max(needed, 2 * held, _FIRST_CAPACITY)

    def _with_room(self, stored: Tensor | None, new: Tensor, needed: int) -> Tensor:
        """`stored`, or a longer copy of it where `needed` tokens do not fit."""
        held = 0 if stored is None else stored.shape[2]
        if stored is not None and needed <= held:
            return stored
        batch, heads, _, depth = new.shape
        longer = new.new_empty((batch, heads, self._capacity(needed, held), depth))
        if stored is not None:
            longer[:, :, : self.length] = stored[:, :, : self.length]
        return longer

    def __repr__(self) -> str:
        return f"{type(self).__name__}(length={self.length})"


class StaticCache(GrowingCache):
    """A cache whose memory is allocated once, in the first call, and never moves.

    Args:
        capacity: most tokens that it holds.

    Raises:
        ValueError: (in :meth:`append`) more tokens than that.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        if capacity < 1:
            raise ValueError(f"StaticCache: capacity must be at least 1, got {capacity}")
        self.capacity = capacity

    def _capacity(self, needed: int, held: int) -> int:
        if needed > self.capacity:
            raise ValueError(
                f"StaticCache: {needed} tokens do not fit into a capacity of {self.capacity}"
            )
        return self.capacity


class MemoryCache:
    """Keys and values ``[B, H, S, D]`` of what a decoder attends to: projected once, then fixed.

    Attributes:
        key, value: None until the first call that uses the cache has projected them.
    """

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def fill(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep keys and values, and return them.

        Heads are stored one after another: every later token reads all keys of one head in turn.
        """
        self.key, self.value = key.contiguous(), value.contiguous()
        return self.key, self.value

    def reorder(self, rows: Tensor) -> None:
        """As :meth:`GrowingCache.reorder`."""
        if self.key is not None and self.value is not None:
            self.key = self.key.index_select(0, rows)
            self.value = self.value.index_select(0, rows)


class LayerCache:
    """What a decoder layer keeps: of the target's tokens, and of the encoder's output.

    Args:
        capacity: most tokens of the target; None: the cache grows.
    """

    def __init__(self, capacity: int | None = None) -> None:
        self.target = GrowingCache() if capacity is None else StaticCache(capacity)
        self.memory = MemoryCache()

    def reorder(self, rows: Tensor, memory: bool = True) -> None:
        """As :meth:`DecoderCache.reorder`."""
        self.target.reorder(rows)
        if memory:
            self.memory.reorder(rows)


class DecoderCache:
    """A :class:`LayerCache` for every layer of a decoder.

    Args:
        layers: how many.
        capacity: most tokens of the target; None: the caches grow.
    """

    def __init__(self, layers: int, capacity: int | None = None) -> None:
        self.layers = [LayerCache(capacity) for _ in range(layers)]

    @property
    def length(self) -> int:
        """How many tokens of the target are stored."""
        return self.layers[0].target.length if self.layers else 0

    def reorder(self, rows: Tensor, memory: bool = True) -> None:
        """Continue with these rows of the batch, in this order.

        Args:
            rows: [B'] indices.
            memory: whether to reorder the encoder's keys and values too. Not needed where a row is
                only replaced by one of the same source, as beams are.
        """
        for layer in self.layers:
            layer.reorder(rows, memory)


def _check_fits(cache: str, name: str, new: Tensor, stored: Tensor) -> None:
    batch, heads, _, depth = stored.shape
    if (new.shape[0], new.shape[1], new.shape[3]) != (batch, heads, depth):
        raise ValueError(
            f"{cache}: {name} must be [{batch}, {heads}, length, {depth}] as what is stored, got "
            f"{tuple(new.shape)}"
        )
    if new.dtype != stored.dtype:
        raise ValueError(
            f"{cache}: {name} must be {stored.dtype} as what is stored, got {new.dtype}"
        )
