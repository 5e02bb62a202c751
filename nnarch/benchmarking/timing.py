"""How long a call takes next to its rivals: short blocks, interleaved A B … B A, the minimum kept.

Machines are shared and noisy, so rivals are never timed one after the other. Every round times one
short block of each, in an order that flips from round to round; a drift of the machine then meets
all of them alike, and the minimum over the rounds is what the code can do.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

Call = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Plan:
    """How a measurement is taken.

    Args:
        blocks: timed blocks per rival.
        block_seconds: a block repeats its call until it lasts about this long.
        pause_seconds: rest before each block.
        disagreement: largest difference of the two halves' minima, as a fraction, that is trusted.
        attempts: measurements at most; the last one stands, and is marked where it is noisy.
    """

    blocks: int = 20
    block_seconds: float = 0.005
    pause_seconds: float = 0.010
    disagreement: float = 0.10
    attempts: int = 2


QUICK = Plan(blocks=6, attempts=1)


@dataclass(frozen=True)
class Timing:
    """What was measured of one call.

    Args:
        samples: seconds per call, one value a block, in the order taken.
        repeats: calls in a block.
        disagreement: the fraction by which the minima of the two halves may differ.
    """

    samples: tuple[float, ...]
    repeats: int = 1
    disagreement: float = Plan.disagreement

    @property
    def best(self) -> float:
        """The minimum, in seconds: the figure of record."""
        return min(self.samples)

    @property
    def iqr(self) -> float:
        """The interquartile range, in seconds."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    @property
    def noisy(self) -> bool:
        """Whether the first and the second half of the blocks tell different minima."""
        middle = len(self.samples) // 2
        if middle == 0:
            return False
        first, second = min(self.samples[:middle]), min(self.samples[middle:])
        return abs(first - second) > self.disagreement * min(first, second)


def measure(
    calls: Mapping[str, Call],
    plan: Plan | None = None,
    *,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
    on_round: Callable[[], object] = lambda: None,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Time several calls against each other, and once more where one of them is noisy.

    Args:
        calls: the rivals by name; each is called with no argument.
        plan: how to measure; the protocol of record by default.
        clock: seconds, monotonic.
        sleep: takes seconds.
        on_round: called after every round, for a progress bar.
        settle: waits for work that calls have only queued, as on a GPU; called before and at the
            end of a block, not after every call, so that launches overlap with kernels as they do
            in a user's loop.

    Returns:
        One Timing per name. ``Timing.noisy`` is still set where the last attempt was noisy too.
    """
    plan = plan or Plan()
    timings: dict[str, Timing] = {}
    for _ in range(plan.attempts):
        timings = _interleave(calls, plan, clock, sleep, on_round, settle)
        if not any(timing.noisy for timing in timings.values()):
            break
    return timings


def _interleave(
    calls: Mapping[str, Call],
    plan: Plan,
    clock: Clock,
    sleep: Callable[[float], object],
    on_round: Callable[[], object],
    settle: Callable[[], object],
) -> dict[str, Timing]:
    repeats = {name: _repeats(call, plan, clock, settle) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    with _no_garbage_collection():
        for _ in range(plan.blocks):
            for name in order:
                sleep(plan.pause_seconds)
                samples[name].append(_block(calls[name], repeats[name], clock, settle))
            order.reverse()
            on_round()
    return {
        name: Timing(tuple(values), repeats[name], plan.disagreement)
        for name, values in samples.items()
    }


def _block(call: Call, repeats: int, clock: Clock, settle: Call) -> float:
    """Seconds per call over one block. A block of several calls first brings its data back to
    the caches, which the rivals have filled with theirs."""
    if repeats > 1:
        call()
    settle()
    start = clock()
    for _ in range(repeats):
        call()
    settle()
    return (clock() - start) / repeats


def _repeats(call: Call, plan: Plan, clock: Clock, settle: Call) -> int:
    """Calls that fill a block; also the warm-up."""
    fastest = math.inf
    for _ in range(2):
        settle()
        start = clock()
        call()
        settle()
        fastest = min(fastest, clock() - start)
    if fastest <= 0:
        return 1000
    return max(1, min(1000, math.ceil(plan.block_seconds / fastest)))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
