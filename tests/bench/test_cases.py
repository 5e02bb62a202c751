"""The registry of cases: names, targets, work; and that every kind of provider runs them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nnarch.benchmarking import cases, peers
from nnarch.benchmarking.case import Case
from nnarch.benchmarking.correctness import Problem

LAYERS = [case for case in cases.CASES if case.model is None]


def named(name: str) -> Case:
    return next(case for case in cases.CASES if case.name == name)


def test_names_and_labels_are_unique_and_names_have_no_spaces():
    names = [case.name for case in cases.CASES]
    assert len(set(names)) == len(names)
    assert not any(" " in name for name in names)
    labels = [case.title for case in cases.CASES]
    assert len(set(labels)) == len(labels)


def test_no_target_is_stale_and_quick_cases_stand_for_the_main_groups():
    groups = {case.group for case in cases.CASES}
    assert set(cases.TARGETS) <= groups
    assert all(cases.target(case).must >= 1 for case in cases.CASES)
    quick = {case.group for case in cases.select(quick=True)}
    assert {"conv1x1", "conv3x3", "depthwise", "linear", "pooling", "models"} <= quick


@pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)
def test_layer_has_work_and_a_twin(case):
    assert case.total_flops > 0 and case.total_bytes > 0
    with torch.device("meta"):
        import nnarch.nn

        ours, theirs = case.layer(nnarch.nn), case.layer(torch.nn)
    assert [*ours.state_dict()] == [*theirs.state_dict()]


def test_a_group_without_a_target_must_be_level_with_the_best_peer():
    assert cases.target(Case("new", "new group", lambda nn: nn.ReLU(), (1,))).must == 1.0


def test_flops_and_bytes_of_a_convolution():
    case = named("conv3x3_64_64_h56_n8")
    assert case.total_flops == 2 * 8 * 64 * 64 * 56 * 56 * 9
    images, weights = 8 * 64 * 56 * 56, 64 * 64 * 9 + 64
    assert case.total_bytes == 4 * (2 * images + weights)
    both = named("conv3x3_64_64_h56_n8_fb")
    assert both.total_flops == 3 * case.total_flops
    assert both.total_bytes == 4 * (5 * images + 3 * weights)


def test_flops_of_a_depthwise_convolution_count_one_channel_each():
    assert named("dw3x3_128_128_h56_n1").total_flops == 2 * 128 * 56 * 56 * 9


def test_bytes_of_a_decode_are_its_keys_and_values():
    cache, q = 2 * 12 * 8192 * 64, 12 * 64
    assert named("attention_decode_h12_kv8192_d64").total_bytes == 4 * (cache + 2 * q)


def test_flops_of_a_pool_are_its_taps():
    assert named("maxpool3x3s2_64_h112_n1").total_flops == 9 * 64 * 56 * 56


def test_a_problem_is_the_same_every_time():
    (first, x1), (second, x2) = (
        named("linear_1x1280x1000").build(),
        named("linear_1x1280x1000").build(),
    )
    assert torch.equal(x1, x2)
    assert torch.equal(first.weight, second.weight)


def test_building_leaves_the_random_state_alone():
    before = torch.random.get_rng_state()
    named("linear_1x1280x1000").build()
    assert torch.equal(before, torch.random.get_rng_state())


def test_deep_models_get_batch_norm_statistics_of_their_input():
    case = Case(
        "deep",
        "tiny",
        lambda nn: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
        (4, 3, 6, 6),
    )
    module, x = case.build()
    norm = module[1]
    assert not norm.training and norm.momentum == 0.1
    assert torch.allclose(norm.running_mean, module[0](x).mean((0, 2, 3)), atol=1e-6)


@pytest.mark.parametrize(
    "only, expected",
    [
        ("conv1x1*_n1", lambda case: case.name.startswith("conv1x1") and case.name.endswith("_n1")),
        ("POOLING", lambda case: case.group == "pooling"),
        ("linear", lambda case: "linear" in case.group),
    ],
)
def test_only_matches_names_and_groups(only, expected):
    assert cases.select(only) == [case for case in cases.CASES if expected(case)]


def test_models_can_be_left_out():
    assert not any(case.model for case in cases.select(models=False))


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="'winograd'"):
        cases.select("winograd")


def test_an_unknown_provider_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"expected some of nnarch.*got 'tensorflow'"):
        peers.select(["eager", "tensorflow"])


# -------------------------------------------------------------------- providers, on tiny cases

TINY = {
    "conv": Case("tiny_conv", "tiny", lambda nn: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    "linear": Case("tiny_linear", "tiny", lambda nn: nn.Linear(12, 7), (5, 12)),
    "linear_gelu": Case(
        "tiny_gelu",
        "tiny",
        lambda nn: nn.Sequential(nn.Linear(12, 7), nn.GELU()),
        (5, 12),
        ours=named("linear_gelu_4096x768x3072").ours,
    ),
    "batch_norm": Case(
        "tiny_norm",
        "tiny",
        lambda nn: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()),
        (2, 4, 7, 5),
        ours=named("batch_norm_relu_64_h56_n8_fb").ours,
        backward=True,
    ),
    "conv_backward": Case(
        "tiny_conv_fb",
        "tiny",
        lambda nn: nn.Conv2d(4, 6, 3, padding=1),
        (2, 4, 7, 5),
        backward=True,
    ),
}


def check(case: Case, provider: str) -> None:
    (chosen,) = peers.select([provider])
    with torch.set_grad_enabled(case.backward):
        problem = Problem(case)
        contender = chosen.prepare(problem, 1)
        for _ in range(2):  # the second call meets cached weights and old gradients
            contender.call()
            verdict = problem.judge(contender.outputs())
            assert verdict.right, verdict.reason


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("provider", ["nnarch", "nnarch_nchw"])
def test_nnarch_is_right(name, provider):
    check(TINY[name], provider)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv", "batch_norm"])
def test_torch_compile_is_right(name):
    check(TINY[name], "compile")
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["onnxruntime", "openvino"])
def test_other_runtimes_are_right(provider):
    pytest.importorskip(provider)
    pytest.importorskip("onnx")
    check(dataclasses.replace(TINY["conv"], model="tiny", tolerance=1e-4), provider)


def test_a_runtime_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(peers.Unavailable, match=r"onnxruntime is not installed.*nnarch\[bench\]"):
        check(dataclasses.replace(TINY["conv"], model="tiny"), "onnxruntime")
