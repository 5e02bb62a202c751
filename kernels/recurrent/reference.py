"""The definition of recurrent layers, in plain torch: any dtype, any device, one step at a time."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import kinds


def steps(x: Tensor, batch_sizes: Tensor | None) -> list[slice]:
    """The rows of every step of a sequence whose rows are flat, in time order."""
    if batch_sizes is None:
        time, batch = (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, x.shape[0])
        counts = [batch] * time
    else:
        counts = batch_sizes.tolist()
    ends = torch.tensor([0, *counts], device="cpu").cumsum(0).tolist()
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def batch_of(x: Tensor, batch_sizes: Tensor | None) -> int:
    """How many sequences `x` holds."""
    if batch_sizes is not None:
        return int(batch_sizes[0]) if len(batch_sizes) else 0
    return x.shape[-2]


def recurrent_scan(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    norm: Tensor | None,
    batch_sizes: Tensor | None,
    packed: Tensor | None,
    kind: int,
    reverse: bool,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer in one direction: (y, last h, last c, what the backward needs)."""
    hidden = weight_ih.shape[0] // kinds.GATES[kind]
    batch = batch_of(x, batch_sizes)
    rows = x.flatten(0, 1) if x.dim() == 3 else x
    h = x.new_zeros(batch, weight_hh.shape[1]) if h0 is None else h0
    c = x.new_zeros(batch, hidden if kind == kinds.LSTM else 0) if c0 is None else c0
    gx = rows @ weight_ih.t()
    raw_gx = gx
    if norm is not None:
        gx = _normalize(gx, norm[0:4], norm[4:8], eps)
    if bias_ih is not None:
        gx = gx + bias_ih
    width = kinds.reserve_width(kind, norm is not None) if save else 0
    outputs: list[Tensor] = []
    reserve: list[Tensor] = []
    order = steps(x, batch_sizes)
    for step in reversed(order) if reverse else order:
        n = step.stop - step.start
        ht, ct = h[:n], c[:n]
        gh = ht @ weight_hh.t()
        raw_gh = gh
        if norm is not None:
            gh = _normalize(gh, norm[8:12], norm[12:16], eps)
        if bias_hh is not None:
            gh = gh + bias_hh
        if kind == kinds.LSTM:
            ht, ct, kept = _lstm_cell(gx[step] + gh, ct, peephole, norm, eps)
            if weight_hr is not None:
                ht = ht @ weight_hr.t()
            if norm is not None:
                kept = [*kept, raw_gx[step], raw_gh]
        elif kind == kinds.GRU:
            ht, kept = _gru_cell(gx[step], gh, ht)
        else:
            ht, kept = (
                (gx[step] + gh).relu() if kind == kinds.RNN_RELU else (gx[step] + gh).tanh(),
                [],
            )
        h = torch.cat([ht, h[n:]])
        c = torch.cat([ct, c[n:]])
        outputs.append(ht)
        reserve.append(torch.cat(kept, 1) if width else x.new_zeros(n, 0))
    if reverse:
        outputs.reverse()
        reserve.reverse()
    empty = x.new_zeros(0, weight_hh.shape[1])
    y = torch.cat([empty, *outputs]).reshape(*x.shape[:-1], weight_hh.shape[1])
    kept = torch.cat([x.new_zeros(0, width * hidden), *reserve])
    return y, h.clone(), c.clone(), kept.detach()  # no result: only the backward reads it


@contextlib.contextmanager
def _autograd() -> Iterator[None]:
    """Gradients are recorded, also below autograd, where operations run."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    autograd = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)  # of every device
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded - autograd), torch.enable_grad():
        yield


def _normalize(v: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.layer_norm(
        v, (v.shape[-1],), gain.reshape(-1), bias.reshape(-1), eps
    )


def _lstm_cell(
    gates: Tensor, c: Tensor, peephole: Tensor | None, norm: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    i, f, g, o = gates.chunk(4, 1)
    if peephole is not None:
        i, f = i + peephole[0] * c, f + peephole[1] * c
    i, f, g = i.sigmoid(), f.sigmoid(), g.tanh()
    c = f * c + i * g
    if peephole is not None:
        o = o + peephole[2] * c
    o = o.sigmoid()
    seen = c if norm is None else _normalize(c, norm[16], norm[17], eps)
    return o * seen.tanh(), c, [i, f, g, o, c]


def _gru_cell(gx: Tensor, gh: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
    (xr, xz, xn), (hr, hz, hn) = gx.chunk(3, 1), gh.chunk(3, 1)
    r, z = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    n = (xn + r * hn).tanh()
    return (1 - z) * n + z * h, [r, z, n, hn]


def recurrent_scan_backward(
    grad_y: Tensor | None,
    grad_h: Tensor | None,
    grad_c: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    peephole: Tensor | None,
    norm: Tensor | None,
    batch_sizes: Tensor | None,
    y: Tensor,
    reserve: Tensor,
    kind: int,
    reverse: bool,
    eps: float,
    wanted: int,
) -> tuple[Tensor, ...]:
    """The gradients of x, h0, c0, both weights, both biases, weight_hr, peephole and norm: those
    whose bit of `wanted` is set (x is bit 0), the others empty."""
    inputs = [x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm]
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    with _autograd():
        outputs = recurrent_scan(*leaves, batch_sizes, None, kind, reverse, eps, False)  # type: ignore[arg-type]
    pairs = [
        (out, grad)
        for out, grad in zip(outputs, (grad_y, grad_h, grad_c), strict=False)
        if grad is not None and out.requires_grad
    ]
    asked = [leaf for leaf in leaves if leaf is not None]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], asked, [grad for _, grad in pairs], allow_unused=True
        )
        if pairs
        else [None] * len(asked)
    )
    gradients = []
    for bit, leaf in enumerate(leaves):
        grad = None if leaf is None else next(found)
        if leaf is None or not wanted >> bit & 1:
            gradients.append(x.new_empty(0))
        else:
            gradients.append(torch.zeros_like(leaf) if grad is None else grad.contiguous())
    return tuple(gradients)


def recurrent_cell(
    x: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    packed: Tensor | None,
    kind: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step: (the new h, the new c, what the backward needs)."""
    y, _, c, reserve = recurrent_scan(
        x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, None, None, None, None, None, kind,
        False, 0.0, save,
    )  # fmt: skip
    return y, c, reserve


def recurrent_cell_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    """The gradients of x, h, c, both weights and both biases: those whose bit of `wanted` is set
    (x is bit 0), the others empty."""
    *inputs, after, reserve, kind, wanted = rest
    run: Any = recurrent_scan_backward  # no type checker counts what a star stands for
    return run(
        grad_h, None, grad_c, *inputs, None, None, None, None, after, reserve, kind, False, 0.0,
        wanted,
    )[:7]  # fmt: skip


def recurrent_pack(
    weight_ih: Tensor,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    kind: int,
    bfloat16: bool,
    pairs: bool,
) -> Tensor:
    """The reference reads weights as they are."""
    return weight_ih.new_empty(0)
