"""Calls replayed from CUDA graphs: what kernels cost without their launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from nnarch.benchmarking import timing
from nnarch.benchmarking.correctness import PEER_SLACK, Problem
from nnarch.benchmarking.peers import Contender
from nnarch.benchmarking.results import Row
from nnarch.benchmarking.timing import Plan
from nnarch.benchmarking.workers import one_line

NOT_CAPTURED = "not captured"
# Calls in one graph: enough for its own launch not to count.
_REPLAY_MS, _MOST_REPLAYED = 0.2, 20
_REPLAYS = Plan(blocks=3, block_seconds=0.003, pause_seconds=0, attempts=1)


def time_replays(
    problem: Problem,
    ready: Mapping[str, Contender],
    rows: Mapping[str, Row],
    capture: Callable[[timing.Call, int], timing.Call],
    measure: Callable[[Mapping[str, timing.Call], Plan], Mapping[str, timing.Timing]],
) -> None:
    """Fill in `graph_ms` of every provider whose call can be captured and replays to the truth."""
    replayed: dict[str, timing.Call] = {}
    counts: dict[str, int] = {}
    for name, contender in ready.items():
        counts[name] = max(1, min(_MOST_REPLAYED, round(_REPLAY_MS / rows[name].ms)))
        try:
            replay = capture(contender.call, counts[name])
            with torch.no_grad():
                for output in contender.outputs():
                    output.fill_(math.nan)
            replay()
            verdict = problem.judge(contender.outputs(), PEER_SLACK)
        except Exception as error:  # something in the call cannot be captured
            rows[name].note = f"{NOT_CAPTURED}: {one_line(error)}"
            continue
        if verdict.right:
            replayed[name] = replay
        else:
            rows[name].note = f"a replay is {verdict.reason}"
    for name, result in measure(replayed, _REPLAYS).items():
        rows[name].graph_ms = result.best * 1e3 / counts[name]


def capture(call: timing.Call, count: int) -> timing.Call:
    """`count` calls as one CUDA graph: what it returns replays them."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):  # also left again where the capture fails
        call()  # what a first call on another stream allocates
        with torch.cuda.graph(graph, stream=side):
            for _ in range(count):
                call()
    torch.cuda.synchronize()
    return graph.replay
