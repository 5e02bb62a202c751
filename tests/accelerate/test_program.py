"""Recorded programs: the same bits as the graph, and the graph whenever anything is changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from accelerate_helpers import randomize
from torch import nn

import nnarch
from nnarch import library
from nnarch.accelerate.program import Program


class Net(nn.Module):
    """Every operation that a program can hold."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.slope = nn.LeakyReLU(0.1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(self.norm(self.depthwise(x)) + x)
        x = self.slope(self.point(nn.functional.max_pool2d(x, 2)))
        x = nn.functional.avg_pool2d(x, 2, 1, 1)
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture
def model():
    return randomize(Net()).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)


@contextmanager
def broken_graph(accelerated) -> Iterator[None]:
    """Let every call of the graph fail, so that only a program can have run."""

    def forward(*_):
        raise AssertionError("the graph ran")

    graph = type(accelerated.body)
    original = graph.forward
    graph.forward = forward
    try:
        yield
    finally:
        graph.forward = original


def programs(accelerated) -> list[Program | None]:
    return list(accelerated._programs.values())


def runs_program(accelerated, x) -> bool:
    try:
        with broken_graph(accelerated):
            accelerated(x)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_same_bits_as_the_graph(model, x, dtype, memory_format):
    accelerated = nnarch.accelerate(model.to(dtype))
    x = x.to(dtype, memory_format=memory_format)
    by_graph = accelerated(x)
    assert isinstance(programs(accelerated)[0], Program)
    with broken_graph(accelerated):
        by_program = accelerated(x)
    assert torch.equal(by_program, by_graph)
    assert torch.equal(accelerated(x * 2), nnarch.accelerate(model)(x * 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_models_become_programs(name, mode):
    accelerated = nnarch.accelerate(nnarch.create_model(name).eval())
    x = torch.randn(1, 3, 32, 32)
    with mode():
        first = accelerated(x)
        with broken_graph(accelerated):
            assert torch.equal(accelerated(x), first)


def test_one_program_for_every_kind_of_input(model):
    accelerated = nnarch.accelerate(model)
    for size in (6, 8, 10):
        x = torch.randn(1, 3, size, size)
        torch.testing.assert_close(accelerated(x), model(x), rtol=1e-4, atol=1e-5)
        assert runs_program(accelerated, x)
    assert len(programs(accelerated)) == 3
    for size in range(11, 40):
        accelerated(torch.randn(1, 3, size, size))
    assert len(programs(accelerated)) == 16


def test_structured_outputs(x):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            a = self.a(x)
            return {"deep": (self.b(a), a), "shallow": [a]}

    accelerated = nnarch.accelerate(Pair().eval())
    x = x.to(memory_format=torch.channels_last)
    first = accelerated(x)
    with broken_graph(accelerated):
        second = accelerated(x)
    assert second["deep"][1] is second["shallow"][0]
    for a, b in zip(first["deep"], second["deep"], strict=True):
        assert torch.equal(a, b)


def concatenates(x):
    return torch.cat([x, x.relu(), 2 * x], 1)


def adds_broadcast(x):
    return torch.add(x, x.mean((2, 3), keepdim=True), alpha=2) + 0.25


def shuffles_channels(x):
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def splits(x):
    a, b = x.chunk(2, 1)
    return a * torch.sigmoid(b), x[:, 1:3, ::2].unsqueeze(0), x.unbind(2)[1]


def flattens(x):
    return x.flatten(1).softmax(1)


def writes_in_place(x):
    y = x * 3
    y.mul_(x)
    return y, x.max(1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "function",
    [concatenates, adds_broadcast, shuffles_channels, splits, flattens, writes_in_place],
    ids=lambda f: f.__name__,
)
def test_operations_of_torch(x, function, memory_format, mode):
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return function(self.conv(x))

    model = Tail().eval()
    accelerated = nnarch.accelerate(model)
    x = x.to(memory_format=memory_format)
    with mode():
        accelerated(x)
        with broken_graph(accelerated):
            results = accelerated(2 * x)
        expected = model(2 * x)
    for result, reference in zip(_leaves(results), _leaves(expected), strict=True):
        assert result.shape == reference.shape
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-5)


def _leaves(outputs):
    return torch.utils._pytree.tree_leaves(outputs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.clamp(x, max=0.5),  # the dispatcher's interface takes no such number
        lambda x: x[x > 0].sum(),  # sizes that follow from values
        lambda x: x * torch.nonzero(x).size(0),
        lambda x: (x > 0).long() * 2,  # as a tensor the number would decide the dtype
    ],
)
def test_unknown_operations_stay_with_the_graph(x, function):
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return function(self.conv(x))

    model = Tail().eval()
    accelerated = nnarch.accelerate(model)
    for scale in (1, -2, 3):
        expected = model(scale * x)
        torch.testing.assert_close(accelerated(scale * x), expected, rtol=1e-4, atol=1e-5)
    assert programs(accelerated) == [None]


@pytest.mark.filterwarnings("ignore:accelerate")
def test_modules_with_control_flow_stay_with_the_graph(x):
    class Alternating(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.calls = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), 0

        def forward(self, x):
            self.calls += len(x) > 0  # a length cannot be traced
            return self.a(x) if self.calls % 2 else self.b(x)

    accelerated = nnarch.accelerate(nn.Sequential(Alternating(), nn.ReLU()).eval())
    outputs = [accelerated(x) for _ in range(4)]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


# ------------------------------------------------------------------------- what a program must see


def changes_a_weight(m):
    with torch.no_grad():
        m.body.get_submodule("point").weight.mul_(2)


def changes_past_the_version_counter(m):
    m.body.get_submodule("point").weight.data.mul_(2)


def changes_a_bias(m):
    with torch.no_grad():
        m.body.get_submodule("head").bias.add_(1)


def replaces_a_bias(m):
    head = m.body.get_submodule("head")
    head.bias = nn.Parameter(head.bias.detach() + 1, requires_grad=False)


def loads_a_state(m):
    m.load_state_dict({name: value * 2 for name, value in m.state_dict().items()})


CHANGES = [changes_a_weight, changes_past_the_version_counter, changes_a_bias, replaces_a_bias,
           loads_a_state]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_parameters(model, x, change):
    accelerated = nnarch.accelerate(model)
    before = accelerated(x)
    assert runs_program(accelerated, x)
    change(accelerated)
    after = accelerated(x)
    assert not torch.allclose(before, after)
    assert runs_program(accelerated, x)
    with nnarch.use_backend("cpu"):  # the graph, under a mode
        assert torch.equal(after, accelerated(x))


def test_conversion_drops_programs(model, x):
    accelerated = nnarch.accelerate(model)
    accelerated(x)
    accelerated.double()
    assert programs(accelerated) == []
    assert accelerated(x.double()).dtype == torch.float64
    assert runs_program(accelerated, x.double())


def test_hooks_are_called(model, x):
    accelerated = nnarch.accelerate(model)
    accelerated(x)
    seen = []
    handle = accelerated.body.get_submodule("point").register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    accelerated(x)
    accelerated(x)
    assert len(seen) == 2
    handle.remove()
    accelerated(x)
    assert runs_program(accelerated, x) and len(seen) == 2


def test_a_forward_method_of_its_own_is_called(model, x):
    accelerated = nnarch.accelerate(model)
    accelerated(x)
    point = accelerated.body.get_submodule("point")
    point.forward = lambda x: torch.zeros_like(x)
    assert torch.equal(accelerated(x), accelerated(x * 3))


def test_gradients_of_inputs(model, x):
    accelerated = nnarch.accelerate(model)
    accelerated(x)
    x.requires_grad_()
    accelerated(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not accelerated(x).requires_grad


def test_modes_see_every_operation(model, x):
    accelerated = nnarch.accelerate(model)
    accelerated(x)
    with nnarch.trace() as trace:
        accelerated(x)
    assert len(trace) == 7
    with nnarch.use_backend("reference"), nnarch.trace() as trace:
        accelerated(x)
    assert {entry.backend for entry in trace} == {"reference"}


def test_autocast(model, x):
    accelerated = nnarch.accelerate(model)
    accelerated(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert accelerated(x).dtype == torch.bfloat16


def test_transforms(model, x):
    accelerated = nnarch.accelerate(model)
    accelerated(x)
    gradient = torch.func.grad(lambda x: accelerated(x).sum())(x)
    x.requires_grad_()
    accelerated(x).sum().backward()
    assert torch.equal(gradient, x.grad)


def test_bad_input_is_named(model, x):
    accelerated = nnarch.accelerate(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="conv2d"):
            accelerated(torch.randn(2, 4, 8, 8))


def test_threads(model):
    accelerated = nnarch.accelerate(model)
    inputs = [torch.randn(1, 3, 6 + i, 8) for i in range(8)]
    expected = [nnarch.accelerate(model)(x) for x in inputs]
    failures = []

    def work(i):
        for _ in range(20):
            if not torch.equal(accelerated(inputs[i]), expected[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# -------------------------------------------------------------------------------- the native reader

RELU = library.native_op_names().index("activation")
BROKEN = {
    "empty": [],
    "ends early": [2, RELU, 3, 1],
    "no such operation": [2, 10**6, 0, 0, 0, -1, 0],
    "no such value": [2, -2, 7, 1, 4, 1, 0, -1, 0],
    "no such constant": [2, RELU, 3, 3, 0, 5, 1, 6, 0, 1, 1, 0, -1, 0],
    "not made yet": [2, -2, 1, 1, 4, 1, 0, -1, 1, 1],
    "unknown kind": [2, RELU, 1, 99, 0, -1, 0],
    "wrong number of arguments": [2, RELU, 1, 2, 0, 1, 1, 0, -1, 1, 1],
    "no such operation of torch": [2, -3, 1, 65, 1, 66, 1, 2, 0, 0, 1, 1, 0, -1, 1, 1],
    "no tensor": [2, -4, 5, 1, 2, 0, 0, 1, 0, -1, 1, 1],
    "no such memory format": [2, RELU, 1, 8, 7, 1, 1, 0, -1, 1, 1],
    "result not made": [2, -1, 1, 1],
}


@pytest.mark.parametrize("code", BROKEN.values(), ids=BROKEN)
def test_broken_code_raises(code):
    with pytest.raises(RuntimeError):
        torch.ops.nnarch.run_program([torch.ones(4)], [], torch.tensor(code, dtype=torch.int64))
