"""Correctness before speed, ratios, targets, and the CSV that keeps them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from nnarch.benchmarking import results, scoring, tables
from nnarch.benchmarking.case import Case, Target
from nnarch.benchmarking.correctness import Problem
from nnarch.benchmarking.machine import MIB, Machine, Roof
from nnarch.benchmarking.peers import Contender, Provider, Unavailable, select
from nnarch.benchmarking.results import OK, UNAVAILABLE, WRONG, Row
from nnarch.benchmarking.runner import run_case
from nnarch.benchmarking.timing import Plan, Timing

HOST = Machine("Test CPU", 2, "avx2", {}, 0, "Linux x86_64", "2.10")
ROOF = Roof(100e9, ((MIB, 80e9), (256 * MIB, 20e9)), "native", 1)
CONV = Case("tiny_conv", "tiny", lambda nn: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5))


def fake_provider(name: str, change, **options) -> Provider:
    """Runs in torch, then changes the output."""

    def prepare(problem: Problem, threads: int) -> Contender:
        y = change(problem.module(problem.x))
        return Contender(lambda: None, lambda: [y])

    return Provider(name, name, prepare, **options)


def missing(problem: Problem, threads: int) -> Contender:
    raise Unavailable("fastlib is not installed")


def crashing(problem: Problem, threads: int) -> Contender:
    raise NotImplementedError("no such layer\nand a long traceback")


def constant_times(calls, plan):
    """Every call takes one second; remembers who was timed."""
    constant_times.seen = list(calls)
    return {name: Timing((1.0, 1.0)) for name in calls}


def run(case: Case, *providers: Provider) -> dict[str, Row]:
    rows = run_case(case, providers, Plan(), ROOF, HOST, measure=constant_times)
    return {row.provider: row for row in rows}


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y * 1.0001,
        lambda y: y.index_put((torch.tensor(0),) * 4, torch.tensor(float("nan"))),
        lambda y: y.index_put((torch.tensor(0),) * 4, y.max() * 1.01),
        lambda y: y[:1],
        lambda y: y.transpose(2, 3),
    ],
    ids=["scaled", "nan", "one element", "shape", "transposed"],
)
def test_a_wrong_provider_gets_no_time(change):
    rows = run(CONV, fake_provider("right", lambda y: y), fake_provider("wrong", change))
    assert constant_times.seen == ["right"]
    assert rows["right"].status == OK and rows["right"].ms == 1000
    assert rows["wrong"].status == WRONG and math.isnan(rows["wrong"].ms)
    assert rows["wrong"].note
    assert any("wrong" in note for note in tables.notes(rows.values()))


def test_an_absent_or_failing_provider_says_why_and_does_not_end_the_run():
    rows = run(
        CONV,
        Provider("absent", "absent", missing),
        Provider("crash", "crash", crashing),
        fake_provider("right", lambda y: y),
    )
    assert (rows["absent"].status, rows["absent"].note) == (UNAVAILABLE, "fastlib is not installed")
    assert rows["crash"].note == "NotImplementedError: no such layer"
    assert rows["right"].timed
    assert "fastlib is not installed" in " ".join(tables.notes(rows.values()))


def test_a_case_that_a_provider_does_not_take_is_no_row():
    rows = run(CONV, fake_provider("images", lambda y: y, takes=lambda case: False))
    assert rows == {}


@pytest.mark.parametrize("name", ["eager", "channels_last"])
@pytest.mark.parametrize("backward", [False, True])
def test_torch_itself_is_right(name, backward):
    case = dataclasses.replace(CONV, backward=backward)
    (row,) = run(case, *select([name])).values()
    assert row.status == OK, row.note
    assert 0 <= row.error < 1e-6


def test_missing_gradients_are_wrong():
    case = dataclasses.replace(CONV, backward=True)

    def prepare(problem: Problem, threads: int) -> Contender:
        module, x = problem.fresh(None)
        y = module(x).detach()
        return Contender(lambda: None, lambda: [y, *[torch.zeros_like(x)] * 3])

    (row,) = run(case, Provider("lazy", "lazy", prepare)).values()
    assert row.status == WRONG


# ---------------------------------------------------------------------------------- scoring

# 100 GFLOP/s of peak make this second of work 0.93 s at the roofline's 93 %.
COMPUTE = Case("compute", "tiny", lambda nn: nn.ReLU(), (1, 1), flops=100_000_000_000)


def timed(**seconds: float) -> list[Row]:
    return [
        Row("compute", "tiny", "compute", name, ours=name == "nnarch", ms=value * 1e3)
        for name, value in seconds.items()
    ]


def nnarch_row(case: Case, must: float, **seconds: float) -> Row:
    rows = timed(**seconds)
    scoring.score(rows, case, ROOF, Target(must, 9.0))
    return next(row for row in rows if row.ours)


def test_ratio_is_to_the_fastest_peer_and_to_the_fastest_of_torch():
    row = nnarch_row(COMPUTE, 1.1, nnarch=2.0, eager=6.0, compile=5.0, openvino=3.0)
    assert (row.best_peer, row.ratio, row.torch_ratio) == ("openvino", 1.5, 2.5)
    assert row.met and row.why == "1.50 ≥ 1.1"
    assert row.gflops == pytest.approx(50) and row.roof == pytest.approx(0.5)


def test_short_of_must_is_not_met():
    row = nnarch_row(COMPUTE, 1.6, nnarch=2.0, eager=3.0)
    assert not row.met and row.why == "1.50 < 1.6, 50% of FMA peak"


def test_at_93_percent_of_the_peak_nothing_more_is_asked():
    assert nnarch_row(COMPUTE, 1.6, nnarch=1.07, eager=1.08).met
    assert not nnarch_row(COMPUTE, 1.6, nnarch=1.09, eager=1.10).met


def test_a_share_beyond_the_peak_tells_nothing():
    """Winograd multiplies less than a direct product, whose products are counted."""
    row = nnarch_row(COMPUTE, 1.6, nnarch=0.8, eager=1.0)
    assert not row.met and row.why == "1.25 < 1.6, 125% of FMA peak"


def test_the_peak_is_no_excuse_where_a_peer_is_faster():
    assert not nnarch_row(COMPUTE, 1.6, nnarch=1.07, eager=1.06).met


def test_memory_bound_rows_are_met_at_85_percent_of_the_bandwidth():
    size = 256 * MIB // 8  # input and output together: one second at 20 GB/s is 75 of these
    case = Case("compute", "tiny", lambda nn: nn.ReLU(), (size,), flops=size)
    floor, bound = ROOF.seconds(case.total_flops, case.total_bytes)
    assert bound == "memory"
    assert floor == pytest.approx(256 * MIB / 20e9)
    assert nnarch_row(case, 1.6, nnarch=floor / 0.86, eager=floor / 0.8).met
    assert not nnarch_row(case, 1.6, nnarch=floor / 0.84, eager=floor / 0.8).met


def test_without_a_peer_nothing_is_met():
    row = nnarch_row(COMPUTE, 1.0, nnarch=1.0)
    assert not row.met and row.why == "no peer to compare with"


def test_bandwidth_follows_the_working_set():
    assert ROOF.bandwidth_at(1) == 80e9
    assert ROOF.bandwidth_at(16 * MIB) == pytest.approx(50e9)  # half way in the logarithm
    assert ROOF.bandwidth_at(1 << 40) == 20e9


def test_rows_carry_the_limits_they_were_held_against():
    row = nnarch_row(COMPUTE, 1.0, nnarch=2.0, eager=3.0)
    assert row.peak_gflops == 100
    assert row.bandwidths == {MIB: 80.0, 256 * MIB: 20.0}


# -------------------------------------------------------------------------------------- CSV


def full_row(**changes) -> Row:
    row = Row("a", "g", "3×3, a", "nnarch", ours=True, threads=2, ms=1.25, noisy=True, time="t1")
    return dataclasses.replace(row, **changes)


def test_rows_survive_the_csv(tmp_path):
    rows = [full_row(), full_row(ms=math.nan, status=WRONG, note='off, "far"', noisy=False)]
    results.append(rows, tmp_path / "new" / "machine.csv")
    assert repr(results.read(tmp_path / "new" / "machine.csv")) == repr(rows)  # repr: NaN != NaN


def test_appending_keeps_one_header(tmp_path):
    file = tmp_path / "machine.csv"
    for time in ("t1", "t2"):
        results.append([full_row(time=time)], file)
    assert [row.time for row in results.read(file)] == ["t1", "t2"]
    assert file.read_text().count("provider") == 1


def test_a_file_with_other_columns_is_kept(tmp_path):
    file = tmp_path / "machine.csv"
    file.write_text("case,group,label,provider,ms,humidity\nold,g,l,eager,2.5,wet\n")
    results.append([full_row()], file)
    old, new = results.read(file)
    assert (old.case, old.ms, new.case) == ("old", 2.5, "a")
    assert "humidity" in file.read_text() and "wet" in file.read_text()


def test_latest_keeps_the_last_run_of_every_case():
    rows = [
        full_row(time="t1", provider="gone"),
        full_row(time="t2"),
        full_row(time="t2", provider="eager", ours=False),
        full_row(case="b", time="t1"),
    ]
    kept = results.latest(rows)
    assert [(row.case, row.provider) for row in kept] == [
        ("a", "nnarch"),
        ("a", "eager"),
        ("b", "nnarch"),
    ]


def test_reading_what_is_not_there_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        results.read(tmp_path / "none.csv")
