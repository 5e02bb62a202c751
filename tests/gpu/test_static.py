"""Triton kernels compiled for GPUs that are not here, held to the rules of kernels/gpu/README.md.

The fast test compiles every path through every kernel once for one target of each vendor. The slow
ones compile every tile of every table for every target at the first shape of its table (in float16;
in float32 the default tile). `bench/static_gpu.py` compiles the rest: every tile in every precision
for every kernel that uses it, and the default tile at every shape, about 1,800 in all.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from nnarch.kernels.gpu import static, survey  # noqa: E402
from nnarch.kernels.gpu.matmul import MATMUL  # noqa: E402
from nnarch.kernels.gpu.targets import TARGETS  # noqa: E402
from nnarch.kernels.gpu.tiles import Problem, tile  # noqa: E402
from nnarch.kernels.linear import triton_kernel as linear  # noqa: E402

pytestmark = pytest.mark.skipif(launch.INTERPRETED, reason="TRITON_INTERPRET=1 compiles nothing")

BOTH_VENDORS = ("sm_90", "gfx942")


def cases(*families):
    return [case for group in static.family_cases(families).values() for case in group]


def assert_rules(jobs):
    rows = [survey.compile_job(job) for job in jobs]
    assert rows
    assert [row for row in rows if row.broken] == []


@pytest.mark.parametrize("target", BOTH_VENDORS)
@pytest.mark.parametrize("family", static.FAMILIES)
def test_each_kernel(family, target):
    assert_rules(survey.each_kernel(cases(family), [TARGETS[target]]))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_each_tile(target):
    families = ("conv_transpose2d", "conv2d", "linear", "recurrent")
    if target in BOTH_VENDORS:
        families += ("depthwise",)
    assert_rules(survey.each_tile(cases(*families), [TARGETS[target]]))


def test_every_default_tile_is_predicted_to_reach_the_roofline():
    short = {
        (job.case.name, job.target.name, job.precision): share
        for job in survey.all_jobs(cases(*static.FAMILIES), TARGETS.values())
        if job.variant.default
        and job.main
        and (share := survey.predicted_roofline(job)) < survey.LEAST_ROOFLINE
    }
    assert short == {}


# ------------------------------------------------------------ the rules notice what they are for


@triton.jit
def _hoarding_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Keeps more values at a time than a thread has registers."""
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes)
    y = tl.load(y_ptr + lanes)
    for i in range(100):
        x = x * y + i
    tl.store(y_ptr + lanes, x)


def compiled(job, **changes):
    binary = static.compile_launch(job.launch, job.target)
    return survey.broken_rules(job, dataclasses.replace(binary, **changes), 1.0)


@pytest.fixture
def product():
    """The default tile of a large product on sm_90."""
    return next(survey.all_jobs(linear.STATIC_CASES, [TARGETS["sm_90"]]))


def test_spills_are_seen():
    x = torch.empty(2048, device="meta")
    options = {"num_warps": 1, "num_stages": 1, "maxnreg": 32}
    hoarder = launch.Launch(
        _hoarding_kernel, (1,), {"x_ptr": x, "y_ptr": x, "BLOCK": 2048}, launch.OPTIONS | options
    )
    assert static.compile_launch(hoarder, TARGETS["sm_90"]).spills > 0


def test_a_kernel_that_keeps_the_rules_breaks_none(product):
    assert compiled(product) == []


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"spills": 8}, "spills 8 bytes"),
        ({"stack_reads": 1}, "reads the stack pointer and has no stack"),
        ({"shared": 300_000}, "300000 bytes of shared memory, 232448 exist"),
        ({"matrix_instructions": 0}, "no HGMMA"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_rules(product, changes, message):
    assert compiled(product, **changes) == [message]


def test_a_low_prediction_breaks_the_rule_of_the_default_tile_only(product):
    binary = static.compile_launch(product.launch, product.target)
    assert survey.broken_rules(product, binary, 0.3) == ["predicted 30% of the roofline"]
    other = dataclasses.replace(
        product, variant=dataclasses.replace(product.variant, default=False)
    )
    assert survey.broken_rules(other, binary, 0.3) == []


def test_a_tile_that_does_not_fit_is_never_offered():
    huge = tile(BLOCK_M=256, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=4)
    table = dataclasses.replace(MATMUL, tiles={"half": (*MATMUL.tiles["half"][:1], huge)})
    question = Problem(4096, 4096, 4096)
    for target in TARGETS.values():
        assert huge not in table.candidates(question, target)
