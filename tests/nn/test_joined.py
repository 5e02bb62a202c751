"""BatchNorm and the activation behind it as one operation, in Sequential and in models."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional as TF

import nnarch
import nnarch.nn as nn
from nnarch.nn.joined import activated, joined_activation

CL = torch.channels_last


def operations(function):
    """(name of each operation of ours that ran, result)."""
    with nnarch.trace() as entries:
        result = function()
    return [entry.op for entry in entries], result


def layers(namespace, activation):
    torch.manual_seed(0)
    return [
        namespace.Conv2d(3, 8, 3, bias=False),
        namespace.BatchNorm2d(8),
        activation,
        namespace.Conv2d(8, 5, 1),
        namespace.BatchNorm2d(5),
        namespace.Flatten(),
    ]


def results(model, x):
    """Output, the input's gradient, the parameters' gradients and the buffers after a step."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    return [y.detach(), x.grad, *gradients, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("name", ["ReLU", "ReLU6", "LeakyReLU"])
@pytest.mark.parametrize("namespace", [torch.nn, nn], ids=["torchs", "ours"])
def test_sequential_runs_both_as_one(namespace, name, inplace, training):
    keeps_output = inplace or name == "ReLU" or (name == "ReLU6" and namespace is nn)
    activation = getattr(namespace, name)(inplace=inplace)
    ours = nn.Sequential(*layers(nn, activation)).double().train(training)
    theirs = torch.nn.Sequential(*layers(torch.nn, copy.deepcopy(activation))).double()
    theirs.load_state_dict(ours.state_dict())
    theirs.train(training)
    x = torch.randn(4, 3, 6, 7, dtype=torch.float64)
    ran, mine = operations(lambda: results(ours, x))
    kind = "batch_norm_train" if training else "batch_norm_eval"
    assert ran.count(kind) == 2
    assert "activation" not in ran or not keeps_output
    torch.testing.assert_close(mine, results(theirs, x))
    assert (joined_activation(ours[1], activation, x) is not None) == keeps_output
    with torch.no_grad():
        ran, y = operations(lambda: ours(x))
        assert ran == ["conv2d", kind, "conv2d", kind]
        torch.testing.assert_close(y, theirs(x))


@pytest.mark.parametrize(
    ("activation", "trained", "evaluated"),
    [
        (nn.Tanh(), True, True),
        (nn.Sigmoid(), True, True),
        (nn.SiLU(), False, True),  # its derivative does not follow from its output
        (nn.GELU("tanh"), False, True),
        (nn.LeakyReLU(-0.5), False, False),
        (nn.Softplus(), False, False),
    ],
    ids=str,
)
def test_which_activations_are_joined(activation, trained, evaluated):
    x = torch.randn(9, 6)
    norm = nn.BatchNorm1d(6)
    truth = activation(TF.batch_norm(x, None, None, training=True))
    for grad, as_one in ((True, trained), (False, evaluated)):
        with torch.set_grad_enabled(grad):
            assert (joined_activation(norm, activation, x) is not None) == as_one
            assert joined_activation(torch.nn.BatchNorm1d(6), activation, x) is None
            torch.testing.assert_close(nn.Sequential(norm, activation)(x), truth)


@pytest.mark.parametrize("namespace", [torch.nn, nn], ids=["torchs", "ours"])
@pytest.mark.parametrize("name", ["LeakyReLU", "SiLU", "Hardswish", "GELU"])
def test_outputs_that_no_gradient_needs_may_be_written(namespace, name):
    x, activation = torch.randn(9, 6), getattr(namespace, name)()
    gradients = []
    for container in (nn.Sequential, torch.nn.Sequential):
        norm = nn.BatchNorm1d(6)
        y = container(norm, activation)(x)
        y += x
        y.square().sum().backward()
        gradients.append([p.grad for p in norm.parameters()])
    torch.testing.assert_close(*gradients)


def test_hooks_see_single_layers():
    x = torch.randn(4, 5, 3, 3)
    plain = TF.batch_norm(x, None, None, training=True)
    for which in (0, 1):
        model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())
        seen = []
        model[which].register_forward_hook(lambda m, i, y, seen=seen: seen.append(y))
        y = model(x)
        torch.testing.assert_close(seen[0], plain if which == 0 else plain.relu())
        torch.testing.assert_close(y, plain.relu())
    names = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, i, y: names.append(type(module).__name__)
    )
    try:
        nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())(x)
    finally:
        handle.remove()
    assert names == ["BatchNorm2d", "ReLU", "Sequential"]


def test_classes_of_a_users_own_are_called():
    class Doubling(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Shifted(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    x = torch.randn(4, 5, 3, 3)
    plain = TF.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(nn.Sequential(Doubling(5), nn.ReLU())(x), 2 * plain.relu())
    torch.testing.assert_close(nn.Sequential(nn.BatchNorm2d(5), Shifted())(x), plain.relu() + 1)


def test_sequential_is_torchs_but_for_speed():
    model = nn.Sequential(nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten())
    assert isinstance(model, torch.nn.Sequential)
    assert repr(model) == repr(torch.nn.Sequential(*model))
    assert list(model.state_dict()) == list(torch.nn.Sequential(*model).state_dict())
    assert type(model[:2]) is nn.Sequential
    x = torch.randn(2, 5, 3, 3)
    assert nn.Sequential()(x) is x
    script = torch.jit.script(nn.Sequential(torch.nn.Linear(3, 4), nn.Flatten()))
    assert script(x).shape == (2, 60)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model[:2] + model[2:]):
        torch.testing.assert_close(twin(x), model(x))


def test_children_are_those_of_iteration():
    class Backwards(nn.Sequential):
        def __iter__(self):
            return reversed(self._modules.values())

    x = torch.randn(4, 6)
    model = Backwards(nn.ReLU(), nn.BatchNorm1d(6))
    torch.testing.assert_close(model(x), TF.batch_norm(x, None, None, training=True).relu())
    model = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten())
    assert type(model + model) is type(2 * model) is nn.Sequential
    assert len(model + model) == len(model * 2) == 6
    model[1] = None
    with pytest.raises(TypeError):
        model(x)


def test_tracers_and_compilers_write_down_single_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        ran, y = operations(lambda: nnarch.accelerate(model)(x))
        assert ran == ["conv2d"]  # BatchNorm folded, ReLU in the epilogue
        torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("namespace", [torch.nn, nn], ids=["torchs", "ours"])
def test_activated_takes_any_namespace(namespace, residual):
    norm = namespace.BatchNorm2d(5).double()
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64, requires_grad=True)
    r = torch.randn_like(x).requires_grad_() if residual else None
    ran, y = operations(lambda: activated(norm, namespace.ReLU(inplace=True), x, r))
    assert ran == ([] if namespace is torch.nn else ["batch_norm_train"])
    plain = TF.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    truth = (plain if r is None else plain + r).relu()
    leaves = [t for t in (x, r, *norm.parameters()) if t is not None]
    grad = torch.randn_like(y)
    torch.testing.assert_close(y, truth)
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, grad), torch.autograd.grad(truth, leaves, grad)
    )


@pytest.mark.parametrize("residual", [torch.ones(3, 5, 1, 1), torch.ones(3, 5, 4, 4).double()])
def test_a_residual_is_broadcast_and_converted(residual):
    x = torch.randn(3, 5, 4, 4)
    y = activated(nn.BatchNorm2d(5), nn.ReLU(), x, residual)
    truth = (TF.batch_norm(x, None, None, training=True) + 1).relu()
    torch.testing.assert_close(y, truth)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "cifar_resnet20", "mobilenet_v2_x0_25"])
def test_models_in_training_run_no_activation_alone(name):
    model = nnarch.create_model(name, num_classes=7).train().to(memory_format=CL)
    size = 32 if name.startswith("cifar") else 64
    x = torch.randn(2, 3, size, size).contiguous(memory_format=CL)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(x).sum().backward()
    ran = {event.key for event in profile.key_averages()}
    assert "nnarch::batch_norm_train" in ran
    alone = {
        "nnarch::activation",
        "aten::relu",
        "aten::relu_",
        "aten::clamp_min_",
        "aten::hardtanh_",
    }
    assert not ran & alone
