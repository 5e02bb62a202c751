"""The benchmark on a GPU, as far as a CPU can run it: cases, workers, replays, the summary."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch
from worker_jobs import work

from nnarch.benchmarking import cases, gpu, gpu_summary, peers, replays, timing, workers
from nnarch.benchmarking.case import Case, Target
from nnarch.benchmarking.gpu_cases import GPU_CASES
from nnarch.benchmarking.gpu_layers import Attention, Lookup, LossOfLinear, LossOfLogits
from nnarch.benchmarking.machine import MIB, Machine, Roof
from nnarch.benchmarking.results import OK, UNAVAILABLE, WRONG, Row
from nnarch.benchmarking.runner import run_case
from nnarch.benchmarking.timing import Plan

HOST = Machine("Test GPU", 1, "sm_90", {}, 0, "Linux x86_64", "2.11")
ROOF = Roof(100e9, ((MIB, 80e9),), "torch", 1)
LINEAR = Case("tiny_linear", "tiny", lambda nn: nn.Linear(12, 7), (5, 12))


# ------------------------------------------------------------------------------------- cases


def test_names_are_unique_beside_those_of_cpus():
    names = [case.name for case in (*GPU_CASES, *cases.CASES)]
    assert len(set(names)) == len(names) and not any(" " in name for name in names)
    assert gpu.find(GPU_CASES[-1].name) is GPU_CASES[-1]


@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_case_has_work_and_a_twin(case):
    assert case.total_flops > 0 and case.total_bytes > 0
    with torch.device("meta"):
        import nnarch.nn

        ours, theirs = case.layer(nnarch.nn), case.layer(torch.nn)
    if case.ours is None and not case.rivals:
        assert [*ours.state_dict()] == [*theirs.state_dict()]
    assert case.name.endswith(("_f16", "_bf16", "_f32"))


def test_the_first_of_every_family_comes_first():
    quick = [case.quick for case in GPU_CASES]
    assert quick == sorted(quick, reverse=True) and 10 <= sum(quick) <= 20


def test_several_patterns_choose_what_any_of_them_matches():
    chosen = cases.select(["GPU layer norm*", "_bf16"], among=GPU_CASES)
    assert {case.name for case in chosen} == {
        case.name
        for case in GPU_CASES
        if case.group.startswith("GPU layer norm") or case.name.endswith("_bf16")
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
def test_a_case_in_half_precision(dtype, backward):
    case = dataclasses.replace(LINEAR, dtype=dtype, backward=backward)
    assert case.total_bytes * 2 == dataclasses.replace(LINEAR, backward=backward).total_bytes
    assert case.allowed_error > LINEAR.allowed_error == 1e-5
    module, x = case.build()
    assert x.dtype == dtype and {p.dtype for p in module.parameters()} == {dtype}
    rows = run_case(case, peers.select(["nnarch", "eager"]), Plan(2), ROOF, HOST)
    assert [row.status for row in rows] == [OK, OK], [row.note for row in rows]
    assert {row.dtype for row in rows} == {str(dtype).removeprefix("torch.")}


SMALL = {
    "attention": (lambda nn: Attention(nn, 2, 4, 4, 16, 8, False, False), (8, 16, 8)),
    "causal": (lambda nn: Attention(nn, 2, 4, 2, 16, 8, True, False), (8, 16, 8)),
    "masked": (lambda nn: Attention(nn, 2, 4, 4, 16, 8, False, True), (8, 16, 8)),
    "decode": (lambda nn: Attention(nn, 2, 4, 2, 16, 8, False, False), (8, 1, 8)),
    "lookup": (lambda nn: Lookup(nn, 20, 8, 30), (1, 8)),
    "logits": (lambda nn: LossOfLogits(nn, 6, 11), (6, 11)),
    "head": (lambda nn: LossOfLinear(nn, 6, 8, 11), (6, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_layers_are_those_of_torch(name, backward, dtype):
    layer, shape = SMALL[name]
    case = Case(name, "small", layer, shape, backward=backward, dtype=dtype, flops=1)
    case = dataclasses.replace(case, input_grad=name != "lookup", tolerance=4 * case.allowed_error)
    rows = run_case(case, peers.select(["nnarch", "eager"]), Plan(2), ROOF, HOST)
    assert [row.status for row in rows] == [OK, OK], [row.note for row in rows]


@pytest.mark.parametrize("name", ["dw3x3_128_128_h56_n32_f16", "lstm_128_b64_t100_f32"])
def test_a_case_is_built_where_it_says(name):
    module, x = dataclasses.replace(gpu.find(name), device="meta").build()
    assert x.is_meta and all(t.is_meta for t in module.state_dict().values())


# ------------------------------------------------------------------------------------ timing


def test_a_block_waits_for_the_device_once():
    log: list[str] = []
    now = iter(range(1000))
    timing.measure(
        {"a": lambda: log.append("call")},
        Plan(blocks=2, block_seconds=3, pause_seconds=0),
        clock=lambda: next(now),
        settle=lambda: log.append("wait"),
    )
    warm_up, block = ["wait", "call", "wait"], ["call", "wait", "call", "call", "call", "wait"]
    assert log == warm_up * 2 + block * 2


def test_replays_are_timed_where_they_give_the_truth():
    def repeat(call, count):
        return lambda: [call() for _ in range(count)]

    def unable(call, count):
        raise RuntimeError("operation not permitted when stream is capturing")

    def run(capture) -> Row:
        plan = Plan(2, pause_seconds=0)
        (row,) = run_case(LINEAR, peers.select(["eager"]), plan, ROOF, HOST, capture=capture)
        return row

    assert run(repeat).graph_ms > 0
    empty = run(lambda call, count: lambda: None)
    assert math.isnan(empty.graph_ms) and empty.timed and "replay is off" in empty.note
    failed = run(unable)
    assert failed.timed and failed.note.startswith(replays.NOT_CAPTURED)


# ----------------------------------------------------------------------------------- workers


def test_a_job_that_fails_dies_or_hangs_does_not_end_the_others():
    jobs = ["a", "b", "last", "c", "fail", "die", "hang", "d"]
    # Enough for a process to start on a busy machine.
    outcomes = list(workers.run_each(work, jobs, timeout=20))
    assert [outcome.job for outcome in outcomes] == jobs
    a, b, last, c, fail, die, hang, d = outcomes
    assert a.result == b.result == last.result != c.result
    assert fail.error == "ValueError: no such kernel"
    assert die.error == "its process died (exit code 7)"
    assert "too long" in hang.error and not hang.cut
    assert d.result and not d.error


def test_no_job_begins_after_the_deadline_and_one_that_runs_is_cut_off():
    past = time.monotonic() - 1
    assert list(workers.run_each(work, ["a"], deadline=past)) == []
    (outcome,) = workers.run_each(
        work, ["hang", "hang"], deadline=time.monotonic() + 0.5, grace=0.5
    )
    assert outcome.cut


@pytest.mark.slow
def test_a_run_from_end_to_end():
    said: list[str] = []
    chosen = [gpu.find("reservoir_n1000_b16_f32")]
    (rows,) = gpu.run(chosen, device="cpu", processes=1, report=said.append)
    assert [(row.provider, row.timed) for row in rows] == [("nnarch", True), ("torch_csr", True)]
    assert "1 of 1 cases; 0 failed" in said[0]


# ----------------------------------------------------------------------------------- summary


def test_the_summary_ends_with_losses_and_errors():
    def case(name: str, ours: float, peer: float) -> list[Row]:
        return [
            Row(name, "g", name, "nnarch", ours=True, ms=ours, graph_ms=ours / 2, roof=0.5),
            Row(name, "g", name, "eager", ms=peer, graph_ms=peer / 4),
        ]

    rows = [
        Row("broken", "g", "b", "nnarch", ours=True, status=UNAVAILABLE, note="its process died"),
        *case("loss", 2.0, 1.0),
        Row("wrong", "g", "w", "nnarch", ours=True, status=WRONG, note="off by 1"),
        Row("wrong", "g", "w", "eager", ms=1.0),
        *case("win", 1.0, 3.0),
    ]
    text = gpu_summary.text(rows, ["loss", "win", "late"])
    order = [text.index(f"\n{name} |") for name in ("win", "loss", "broken", "wrong")]
    assert order == sorted(order)
    assert "win | 1.00 [0.500] | eager 3.00 [0.750] | ×3.00 [×1.50] | 50%" in text
    assert text.endswith("not begun: 1: late")


def test_a_target_is_level_with_the_best_peer():
    assert {case.target for case in GPU_CASES} == {Target(1.0, 1.1)}
