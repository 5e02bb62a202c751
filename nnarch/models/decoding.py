"""Sentences written token by token, greedily or by beam search, from what a model finds likely."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Stepper(Protocol):
    """A model that is writing: it keeps what it has read and written between the calls."""

    def __call__(self, token: Tensor) -> Tensor:
        """Logits ``[B, vocabulary]`` after the tokens ``[B, 1]``, the last ones so far."""
        ...

    def repeat(self, times: int) -> None:
        """Continue with every row so many times; before the first step."""

    def reorder(self, rows: Tensor) -> None:
        """Continue with these rows; each comes from the same source as the one in its place."""


def greedy(
    step: Callable[[Tensor], Tensor], start: Tensor, limit: int, end: int, filler: int
) -> Tensor:
    """The likeliest token every time: ``[B, up to limit]``.

    Args:
        step: as :class:`Stepper`'s call.
        start: ``[B, 1]``, the tokens before the first.
        limit: longest output.
        end: the token that ends a sentence.
        filler: what stands behind it.
    """
    token = start
    done = torch.zeros_like(token, dtype=torch.bool)
    written: list[Tensor] = []
    while len(written) < limit and not bool(done.all()):
        token = step(token).argmax(1, keepdim=True).masked_fill(done, filler)
        done = done | (token == end)
        written.append(token)
    return torch.cat(written, 1) if written else start.new_zeros(start.shape[0], 0)


def beam_search(
    step: Stepper, start: Tensor, limit: int, end: int, filler: int, beams: int, alpha: float
) -> Tensor:
    """The best of several hypotheses for each sentence: ``[B, up to limit]``.

    Args:
        step: whose logits are read.
        start, limit, end, filler: as of :func:`greedy`.
        beams: hypotheses that are kept.
        alpha: a log-probability is divided by ((5 + length) / 6)^α; Wu et al., 2016, Google's
            Neural Machine Translation System, section 7.
    """
    batch = start.shape[0]
    if batch == 0:
        return start.new_zeros(0, 0)
    step.repeat(beams)
    # Scores [B, beams]: at first all beams are alike, so only one of them counts.
    scores = torch.full((batch, beams), -math.inf, device=start.device)
    scores[:, 0] = 0
    tokens = start.repeat_interleave(beams, 0)
    written = start.new_zeros((batch, beams, 0))
    best = start.new_full((batch, limit), filler)
    best_length = start.new_zeros(batch)
    best_score = torch.full((batch,), -math.inf, device=start.device)
    first = torch.arange(batch, device=start.device)[:, None] * beams
    for length in range(1, limit + 1):
        likely = step(tokens).float().log_softmax(1).view(batch, beams, -1)
        total = (scores[..., None] + likely).flatten(1)
        # Twice as many as there are beams: at most half of them end here.
        top, place = total.topk(min(2 * beams, total.shape[1]), dim=1)
        beam, token = place // likely.shape[2], place % likely.shape[2]
        penalty = ((5 + length) / 6) ** alpha
        written = torch.cat([written.gather(1, _like(beam, written)), token[..., None]], 2)
        ended = token == end
        final = ended if length < limit else torch.ones_like(ended)
        candidate, which = (top / penalty).masked_fill(~final, -math.inf).max(1)
        better = candidate > best_score
        best_score = torch.where(better, candidate, best_score)
        best_length = torch.where(better, length, best_length)
        found = written[torch.arange(batch, device=start.device), which]
        best[better] = torch.nn.functional.pad(found[better], (0, limit - length), value=filler)
        # The likeliest that go on. What can still come: a sum only falls, the penalty grows.
        scores, kept = top.masked_fill(ended, -math.inf).topk(beams, dim=1)
        bound = scores[:, 0] / max(penalty, ((5 + limit) / 6) ** alpha)
        if length == limit or bool((best_score >= bound).all()):
            break
        written = written.gather(1, _like(kept, written))
        tokens = token.gather(1, kept).view(-1, 1)
        step.reorder((first + beam.gather(1, kept)).flatten())
    longest = int(best_length.max()) if batch and limit else 0
    return best[:, :longest]


def _like(indices: Tensor, values: Tensor) -> Tensor:
    """Indices [B, n] of rows of `values` [B, m, T], for gather."""
    return indices[..., None].expand(-1, -1, values.shape[2])
