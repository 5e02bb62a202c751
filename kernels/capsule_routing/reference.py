"""The definition of capsule routing and of the squash in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nnarch import library


def squash(x: Tensor, dim: int) -> Tensor:
    """x · |x| / (1 + |x|²): short vectors shrink to nothing, long ones to length 1."""
    wide = _wide(x)
    norm = _norm(wide, dim)
    return (wide * (norm / (1 + norm * norm))).to(x.dtype)


def squash_grad(grad: Tensor, x: Tensor, dim: int) -> Tensor:
    """The gradient of x; at zero it is zero."""
    wide, g = _wide(x), _wide(grad)
    norm = _norm(wide, dim)
    factor = 1 + norm * norm
    along = (wide * g).sum(dim, keepdim=True) * (1 - norm * norm) / (factor * factor)
    along = torch.where(norm > 0, along / norm, torch.zeros_like(norm))
    return (g * (norm / factor) + wide * along).to(x.dtype)


def capsule_routing(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    iterations: int,
    detach_routing: bool,
    packed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output capsules, and the sums of every iteration before their squash.

    `detach_routing` changes no value: it makes constants of the softmax's weights.
    """
    votes = _votes(_wide(x), _wide(weight))
    fixed = votes.detach() if detach_routing else votes
    logits = votes.new_zeros(votes.shape[:3])
    sums: list[Tensor] = []
    v = votes.new_zeros(())
    for _ in range(iterations):
        s = (logits.softmax(1).unsqueeze(-1) * votes).sum(2)
        s = s if bias is None else s + _wide(bias)
        v = squash(s, -1)
        agreement = (fixed * v.unsqueeze(2)).sum(-1)
        logits = logits + (agreement.detach() if detach_routing else agreement)
        sums.append(s)
    return v.to(x.dtype), torch.stack(sums, 1).detach()


def capsule_routing_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    sums: Tensor,
    detach_routing: bool,
    packed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; the weight's in its memory format.

    With V the sum of the outputs of the iterations before, an iteration's logits are ⟨votes, V⟩.
    """
    xw, w = _wide(x), _wide(weight)
    votes, outputs = _votes(xw, w), squash(sums, -1)
    before = outputs.cumsum(1) - outputs  # V of every iteration
    d_votes, d_bias = torch.zeros_like(votes), sums.new_zeros(sums.shape[2:])
    d_outputs = torch.zeros_like(sums)
    d_outputs[:, -1] = _wide(grad)
    last = sums.shape[1] - 1
    for r in range(last, last - 1 if detach_routing else -1, -1):
        ds = squash_grad(d_outputs[:, r], sums[:, r], -1)
        d_bias += ds.sum(0)
        c = (votes * before[:, r].unsqueeze(2)).sum(-1).softmax(1)
        d_votes += c.unsqueeze(-1) * ds.unsqueeze(2)
        if r == 0 or detach_routing:
            continue
        dc = (votes * ds.unsqueeze(2)).sum(-1)
        db = c * (dc - (c * dc).sum(1, keepdim=True))
        d_votes += db.unsqueeze(-1) * before[:, r].unsqueeze(2)
        d_outputs[:, :r] += (db.unsqueeze(-1) * votes).sum(2).unsqueeze(1)
    dx = torch.einsum("boid,oidk->bik", d_votes, w)
    dw = torch.einsum("boid,bik->oidk", d_votes, xw)
    dw = dw.to(x.dtype).contiguous(memory_format=library.output_format(weight))
    return dx.to(x.dtype), dw, d_bias.to(x.dtype)


def capsule_routing_pack(weight: Tensor) -> Tensor:
    """The weight itself: the reference reads no other order."""
    return weight.clone()


def capsule_windows(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The capsules of every window of x [N, H, W, C, D]: [N·H'·W', C·KH·KW, D]."""
    top, left = padding
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, left, left, top, top))
    windows = x.unfold(1, kernel_size[0], stride[0]).unfold(2, kernel_size[1], stride[1])
    return windows.permute(0, 1, 2, 3, 5, 6, 4).flatten(3, 5).flatten(0, 2).contiguous()


def capsule_windows_grad(
    grad: Tensor,
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """The transpose of it: every capsule of a window added to where it came from."""
    n, h, w, c, dim = input_size
    (kh, kw), (top, left) = kernel_size, padding
    padded = _wide(grad).new_zeros(n, h + 2 * top, w + 2 * left, c, dim)
    rows = (h + 2 * top - kh) // stride[0] + 1
    columns = (w + 2 * left - kw) // stride[1] + 1
    windows = _wide(grad).reshape(n, rows, columns, c, kh, kw, dim)
    for i in range(kh):
        for j in range(kw):
            places = padded[:, i :: stride[0], j :: stride[1]][:, :rows, :columns]
            places += windows[:, :, :, :, i, j]
    return padded[:, top : top + h, left : left + w].contiguous().to(grad.dtype)


def _votes(x: Tensor, weight: Tensor) -> Tensor:
    """[B, O, I, D_out]: what input capsule i predicts of output capsule o."""
    return torch.einsum("oidk,bik->boid", weight, x)


def _norm(x: Tensor, dim: int) -> Tensor:
    return (x * x).sum(dim, keepdim=True).sqrt()


def _wide(x: Tensor) -> Tensor:
    """In the type that is computed in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
