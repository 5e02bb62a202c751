"""Which elements dropout keeps, in plain torch.

A tensor is seen as [outer, rows, columns]. Element (o, r, c) takes word c % 4 of Philox4x32-10
(Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011) at counter (c // 4, r, o, 0), the
key being the seed's two halves. The word depends on the place alone: a backward makes the forward's
mask again, and neither tiles nor threads can change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> list[Tensor]:
    """The four 32-bit words at counters c0 … c3, as int64 in [0, 2³²).

    Args:
        seed: int64, one element.
        c0, c1, c2, c3: int64 in [0, 2³²), of shapes that broadcast.
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2⁶⁴, which is all that counts
        c0, c1, c2, c3 = (
            ((b >> 32) & _LOW) ^ c1 ^ k0,
            b & _LOW,
            ((a >> 32) & _LOW) ^ c3 ^ k1,
            a & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def threshold(p: float) -> int:
    """Words below it are dropped."""
    return round(p * 2**32)


def survivor_scale(p: float) -> float:
    """What kept values are multiplied by."""
    return 1 / (1 - p) if p < 1 else 0.0


def keep(seed: Tensor, outer: int, rows: int, columns: int, p: float) -> Tensor:
    """Which elements of [outer, rows, columns] are kept, as bool."""
    quads, r, o = (torch.arange(n, device=seed.device) for n in (-(-columns // 4), rows, outer))
    words = philox(
        seed.reshape(()), quads, r[:, None], o[:, None, None], torch.zeros_like(seed.reshape(()))
    )
    words = torch.stack(words, dim=-1).reshape(outer, rows, 4 * len(quads))
    return words[..., :columns] >= threshold(p)


def factors(seed: Tensor, outer: int, rows: int, columns: int, p: float, like: Tensor) -> Tensor:
    """0 or 1/(1-p) for each element of [outer, rows, columns], in the dtype of `like`."""
    return keep(seed, outer, rows, columns, p).to(like.dtype) * survivor_scale(p)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x, its last dimension the columns and all others rows, with elements dropped."""
    columns = x.shape[-1] if x.dim() else 1
    if x.numel() == 0:
        return x.clone()
    factor = factors(seed, 1, x.numel() // columns, columns, p, x).reshape(x.shape)
    return x * factor
