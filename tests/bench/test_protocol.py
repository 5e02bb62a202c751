"""The timing protocol, on a clock that only moves when a call says so."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from itertools import chain, repeat

import pytest

from nnarch.benchmarking.timing import Plan, Timing, measure


class FakeMachine:
    """A clock that calls move forward, and a log of what ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.log.append("pause")

    def call(self, name: str, seconds: Iterable[float]) -> Callable[[], None]:
        costs = iter(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += next(costs)

        return run

    def measure(self, calls: dict[str, Callable[[], None]], plan: Plan) -> dict[str, Timing]:
        return measure(calls, plan, clock=self.clock, sleep=self.sleep)


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


def steady(machine: FakeMachine, **seconds: float) -> dict[str, Callable[[], None]]:
    return {name: machine.call(name, repeat(cost)) for name, cost in seconds.items()}


def test_order_flips_from_round_to_round(machine):
    plan = Plan(blocks=3)
    machine.measure(steady(machine, a=0.1, b=0.1, c=0.1), plan)
    blocks = [name for name in machine.log[6:] if name != "pause"]  # after the warm-up
    assert "".join(blocks) == "abc" + "cba" + "abc"


def test_every_block_rests_first(machine):
    machine.measure(steady(machine, a=0.1, b=0.2), Plan(blocks=4))
    assert machine.pauses == [0.010] * 8
    blocks = machine.log[4:]
    assert blocks[::2] == ["pause"] * 8


def test_protocol_of_record_is_twenty_blocks_and_ten_milliseconds():
    assert Plan().blocks >= 20
    assert Plan().pause_seconds >= 0.010
    assert Plan().disagreement == 0.10


def test_best_is_the_minimum_block(machine):
    warm_up, costs = [0.3, 0.3], [0.30, 0.21, 0.20, 0.24]
    timing = machine.measure(
        {"a": machine.call("a", chain(warm_up, costs))}, Plan(blocks=4, attempts=1)
    )["a"]
    assert timing.best == pytest.approx(0.20)
    assert timing.samples == pytest.approx(costs)


def test_short_calls_are_repeated_until_the_block_is_filled(machine):
    timing = machine.measure(steady(machine, a=0.001), Plan(blocks=2, block_seconds=0.0055))["a"]
    assert timing.repeats == 6
    assert timing.best == pytest.approx(0.001)  # per call, not per block


def test_a_block_of_several_calls_warms_the_caches_untimed(machine):
    cold_first = [0.001, 0.001, *([0.5] + [0.001] * 5) * 2]
    timing = machine.measure({"a": machine.call("a", cold_first)}, Plan(blocks=2))["a"]
    assert timing.samples == pytest.approx([0.001, 0.001])


def test_a_clock_too_coarse_for_the_call_does_not_divide_by_zero(machine):
    timing = machine.measure(steady(machine, a=0.0), Plan(blocks=2))["a"]
    assert timing.repeats == 1000
    assert timing.best == 0


def test_disagreeing_halves_are_measured_again_and_a_quiet_second_run_stands(machine):
    warm_up = [1.0, 1.0]
    first, second = [1.0, 1.0, 1.2, 1.2], [1.0, 1.0, 1.0, 1.0]
    calls = {"a": machine.call("a", chain(warm_up, first, warm_up, second))}
    timing = machine.measure(calls, Plan(blocks=4))["a"]
    assert timing.samples == pytest.approx(second)
    assert not timing.noisy


def test_disagreeing_twice_is_marked_noisy(machine):
    run = [1.0, 1.0, 1.0, 1.0, 1.2, 1.2]
    timing = machine.measure({"a": machine.call("a", run * 2)}, Plan(blocks=4))["a"]
    assert timing.noisy


def test_one_noisy_rival_sends_all_of_them_again(machine):
    noisy = machine.call("noisy", chain([1.0] * 4, [1.2] * 2, [1.0] * 6))
    timings = machine.measure({"calm": machine.call("calm", repeat(1.0)), "noisy": noisy}, Plan(4))
    assert machine.log.count("calm") == machine.log.count("noisy") == 2 * (2 + 4)
    assert not timings["noisy"].noisy


@pytest.mark.parametrize(
    "samples, noisy",
    [((1.0, 1.0), False), ((1.0, 1.09), False), ((1.0, 1.11), True), ((1.11, 1.0), True)],
)
def test_noisy_means_more_than_ten_percent(samples, noisy):
    assert Timing(samples).noisy is noisy


def test_interquartile_range():
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).iqr == pytest.approx(2.0)
    assert Timing((1.0,)).iqr == 0


def test_garbage_collection_rests_during_blocks_and_comes_back_after_a_failure():
    seen = []

    def call() -> None:
        seen.append(gc.isenabled())
        if len(seen) == 3:
            raise RuntimeError("fails in its first block")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="first block"):
        measure({"a": call}, Plan(blocks=2, pause_seconds=0, block_seconds=0))
    assert seen == [True, True, False]
    assert gc.isenabled()


def test_progress_is_told_of_every_round(machine):
    rounds = []
    measure(
        steady(machine, a=1.0, b=1.0),
        Plan(blocks=5),
        clock=machine.clock,
        sleep=machine.sleep,
        on_round=lambda: rounds.append(len(machine.pauses)),
    )
    assert rounds == [2, 4, 6, 8, 10]
