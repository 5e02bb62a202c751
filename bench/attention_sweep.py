"""Attention against torch's at every size: positions from 1 to 4096 by features from 16 to 256.

    python bench/attention_sweep.py [--backward] [--features 16,64]

Coarse: few and short blocks, torch eager alone. It is there to find losses, which
`bench/compare.py` then measures as its own cases; nothing is written to bench/results.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from rich.progress import track
from torch.nn.functional import scaled_dot_product_attention as torch_attention

from nnarch.benchmarking.timing import Plan, measure
from nnarch.functional import scaled_dot_product_attention

POSITIONS = [2**i for i in range(13)]
FEATURES = (16, 32, 64, 96, 128, 256)
HEADS = (1, 12)
LARGEST = 4.5e9  # FLOPs of a call: 40 ms
COARSE = Plan(blocks=8, block_seconds=0.0015, pause_seconds=0.0, attempts=1)

Size = tuple[int, int, int, bool]  # positions, features, heads, causal


def sizes(features: list[int], backward: bool) -> Iterator[Size]:
    for s, d, h, causal in itertools.product(POSITIONS, features, HEADS, (False, True)):
        flops = 4 * h * s * s * d * (3.5 if backward else 1) / (2 if causal else 1)
        if flops <= LARGEST:
            yield s, d, h, causal


def call(attention: Callable[..., torch.Tensor], size: Size, backward: bool) -> Callable[[], None]:
    s, d, h, causal = size
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, h, s, d, generator=generator) for _ in range(3)]
    if not backward:

        def forward() -> None:
            attention(*inputs, is_causal=causal)

        return forward
    grad = torch.randn(1, h, s, d, generator=generator)
    for x in inputs:
        x.requires_grad_()

    def both() -> None:
        for x in inputs:
            x.grad = None
        attention(*inputs, is_causal=causal).backward(grad)

    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    parser.add_argument("--features", default=",".join(map(str, FEATURES)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    features = [int(d) for d in options.features.split(",")]
    ratios: dict[int, list[float]] = defaultdict(list)
    losses = []
    for size in track(list(sizes(features, options.backward)), "sweep"):
        both = {"torch": torch_attention, "nnarch": scaled_dot_product_attention}
        with torch.inference_mode(not options.backward):
            calls = {name: call(f, size, options.backward) for name, f in both.items()}
            timings = measure(calls, COARSE)
        mine, theirs = timings["nnarch"].best, timings["torch"].best
        ratios[size[0]].append(theirs / mine)
        if theirs < mine:
            losses.append((theirs / mine, size, mine, theirs))
    print("positions: ratio to torch, least, median, greatest")
    for s, found in ratios.items():
        print(f"{s:9}: {min(found):.2f} {statistics.median(found):.2f} {max(found):.2f}")
    print(f"losses: {len(losses)} of {sum(map(len, ratios.values()))}")
    for ratio, (s, d, h, causal), mine, theirs in sorted(losses):
        kind = "causal" if causal else "full"
        print(f"  {ratio:.2f} S {s} D {d} H {h} {kind}: {mine * 1e6:.1f} µs, {theirs * 1e6:.1f}")


if __name__ == "__main__":
    main()
