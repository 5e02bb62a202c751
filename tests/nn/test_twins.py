"""Every module with a torch.nn twin is that twin: outputs, gradients, state, copies, text."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from tolerances import assert_as_accurate

import nnarch.nn as nn

# class, positional arguments, keyword arguments, input shape
CASES = [
    ("Conv2d", (3, 8, 3), {}, (2, 3, 9, 11)),
    ("Conv2d", (5, 7, (3, 5)), {"stride": (2, 1), "padding": (1, 3)}, (2, 5, 13, 10)),
    ("Conv2d", (6, 4, 1), {"stride": 2, "bias": False}, (3, 6, 7, 7)),
    ("Conv2d", (6, 8, 3), {"groups": 2, "dilation": 2, "padding": "same"}, (1, 6, 8, 9)),
    ("Conv2d", (4, 4, 3), {"padding": "valid"}, (1, 4, 5, 5)),
    ("Conv2d", (6, 12, 3), {"groups": 6, "padding": 1}, (2, 6, 8, 7)),
    ("Conv2d", (3, 4, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 3, 6, 6)),
    ("Conv2d", (3, 4, 3), {"padding": (2, 1), "padding_mode": "circular"}, (2, 3, 6, 6)),
    ("Conv2d", (3, 4, 4), {"padding": "same", "padding_mode": "replicate"}, (2, 3, 6, 6)),
    ("ConvTranspose2d", (12, 20, 4), {"stride": 2, "padding": 1}, (2, 12, 5, 6)),
    ("ConvTranspose2d", (12, 20, 4), {"bias": False}, (3, 12, 1, 1)),
    ("ConvTranspose2d", (9, 3, 4, 2, 1), {}, (2, 9, 6, 5)),
    ("ConvTranspose2d", (6, 8, 3), {"stride": 2, "output_padding": 1, "groups": 2}, (2, 6, 5, 4)),
    ("ConvTranspose2d", (6, 6, 3, 2), {"groups": 6, "dilation": 2}, (2, 6, 5, 4)),
    ("ConvTranspose2d", (6, 18, (3, 5)), {"stride": (2, 1), "padding": (1, 2)}, (6, 5, 4)),
    ("Conv1d", (6, 8, 3), {}, (2, 6, 11)),
    ("Conv1d", (6, 8, 3), {"stride": 2, "padding": 2, "dilation": 2, "groups": 2}, (2, 6, 11)),
    ("Conv1d", (6, 12, 5), {"groups": 6, "padding": "same"}, (2, 6, 11)),
    ("Conv1d", (3, 4, 4), {"padding": "same", "padding_mode": "circular"}, (2, 3, 8)),
    ("Conv1d", (3, 4, 3), {"padding": 2, "padding_mode": "reflect", "bias": False}, (3, 8)),
    ("ConvTranspose1d", (6, 18, 4), {"stride": 2, "padding": 1}, (2, 6, 7)),
    ("ConvTranspose1d", (6, 8, 3), {"stride": 3, "output_padding": 2, "groups": 2}, (6, 7)),
    ("Linear", (7, 5), {}, (3, 7)),
    ("Linear", (7, 5), {"bias": False}, (2, 4, 7)),
    ("Linear", (7, 5), {}, (7,)),
    ("BatchNorm1d", (5,), {}, (6, 5)),
    ("BatchNorm1d", (5,), {"affine": False}, (4, 5, 3)),
    ("BatchNorm2d", (5,), {}, (3, 5, 4, 6)),
    ("BatchNorm2d", (5,), {"momentum": None}, (3, 5, 4, 6)),
    ("BatchNorm2d", (5,), {"track_running_stats": False}, (3, 5, 4, 6)),
    ("BatchNorm2d", (5,), {"momentum": 0.3, "eps": 1e-2}, (3, 5, 4, 6)),
    ("BatchNorm3d", (4,), {}, (2, 4, 3, 4, 5)),
    ("Sigmoid", (), {}, (3, 50)),
    ("Tanh", (), {}, (3, 50)),
    ("ReLU", (), {}, (3, 50)),
    ("ReLU", (), {"inplace": True}, (3, 50)),
    ("ReLU6", (), {}, (3, 50)),
    ("LeakyReLU", (0.2,), {}, (3, 50)),
    ("Hardswish", (), {}, (3, 50)),
    ("Hardsigmoid", (), {}, (3, 50)),
    ("SiLU", (), {}, (3, 50)),
    ("GELU", (), {}, (3, 50)),
    ("GELU", (), {"approximate": "tanh"}, (3, 50)),
    ("PReLU", (), {}, (3, 50)),
    ("Softmax", (1,), {}, (3, 50)),
    ("MaxPool2d", (3, 2), {"padding": 1}, (2, 5, 9, 10)),
    ("MaxPool2d", (2,), {"ceil_mode": True}, (2, 5, 9, 7)),
    ("AvgPool2d", (3, 2), {"padding": 1, "count_include_pad": False}, (2, 5, 9, 10)),
    ("AvgPool2d", ((2, 3),), {"divisor_override": 5, "ceil_mode": True}, (2, 5, 9, 10)),
    ("AdaptiveAvgPool2d", (1,), {}, (2, 5, 9, 10)),
    ("AdaptiveAvgPool2d", ((3, None),), {}, (2, 5, 9, 10)),
    ("AdaptiveMaxPool2d", ((2, 3),), {}, (2, 5, 9, 10)),
    ("LocalResponseNorm", (5,), {}, (2, 12, 9, 10)),
    ("Upsample", (), {"scale_factor": 2}, (2, 5, 6, 7)),
    ("Upsample", ((9, 4),), {"mode": "bilinear"}, (2, 5, 6, 7)),
    (
        "Upsample",
        (),
        {"scale_factor": (1.7, 2.4), "mode": "bilinear", "recompute_scale_factor": True},
        (2, 5, 6, 7),
    ),
    ("UpsamplingNearest2d", (11,), {}, (2, 5, 6, 7)),
    ("UpsamplingBilinear2d", (None, 2), {}, (2, 5, 6, 7)),
    ("LayerNorm", (50,), {}, (3, 50)),
    ("LayerNorm", ((4, 50), 1e-3), {}, (3, 4, 50)),
    ("LayerNorm", (50,), {"elementwise_affine": False}, (50,)),
    ("LayerNorm", ([50],), {"bias": False}, (2, 3, 50)),
    ("RMSNorm", (50,), {}, (3, 50)),
    ("RMSNorm", ((4, 50), 1e-3), {}, (3, 4, 50)),
    ("RMSNorm", (50,), {"elementwise_affine": False}, (3, 50)),
    ("LocalResponseNorm", (4, 0.5, 0.6, 2.0), {}, (2, 12, 9)),
]
IDS = [f"{name}-{i}" for i, (name, *_) in enumerate(CASES)]


def make_pair(name, args, kwargs):
    """(ours, torch's) with the same random state."""
    twin = getattr(torch.nn, name)(*args, **kwargs)
    for parameter in twin.parameters():
        torch.nn.init.normal_(parameter, 0.1)
    ours = getattr(nn, name)(*args, **kwargs)
    ours.load_state_dict(twin.state_dict())
    return ours, twin


def run(module, x, grad):
    """Output, input gradient and parameter gradients, by name."""
    x = x.detach().clone().requires_grad_()
    y = module(x * 1)  # not a leaf, so that in-place modules may overwrite it
    y.backward(grad.to(y.dtype))
    results = {"output": y, "input gradient": x.grad}
    results.update((f"gradient of {n}", p.grad) for n, p in module.named_parameters())
    return results


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), CASES, ids=IDS)
def test_outputs_gradients_and_statistics_are_the_twins(name, args, kwargs, shape, training):
    ours, twin = make_pair(name, args, kwargs)
    ours.train(training)
    twin.train(training)
    truth = copy.deepcopy(twin).double()
    for _ in range(2):  # twice: running statistics accumulate
        x = torch.randn(shape) * 3
        grad = torch.randn_like(copy.deepcopy(twin)(x.clone()))
        copies = ours, twin, truth
        mine, theirs, exact = (run(m, x.double() if m is truth else x, grad) for m in copies)
        for what in exact:
            assert_as_accurate(mine[what], theirs[what], exact[what], what=what)
        for module in copies:
            module.zero_grad()
    for (what, mine), theirs, exact in zip(
        ours.named_buffers(), twin.buffers(), truth.buffers(), strict=True
    ):
        if mine.dtype == torch.int64:
            assert torch.equal(mine, theirs)
        else:
            assert_as_accurate(mine, theirs, exact, what=what)


@pytest.mark.parametrize(("name", "args", "kwargs", "shape"), CASES, ids=IDS)
def test_state_text_and_copies_are_the_twins(name, args, kwargs, shape):
    ours, twin = make_pair(name, args, kwargs)
    assert isinstance(ours, type(twin))
    assert repr(ours) == repr(twin)
    assert list(ours.state_dict()) == list(twin.state_dict())
    ours.eval()
    x = torch.randn(shape)
    with torch.no_grad():
        expected = ours(x.clone())
        name_of_input = next(iter(inspect.signature(twin.forward).parameters))
        assert torch.equal(ours(**{name_of_input: x.clone()}), expected)
        for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.copy(ours)):
            assert type(clone) is type(ours)
            assert torch.equal(clone(x.clone()), expected)
    twin.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", ["MaxPool2d", "AdaptiveMaxPool2d"])
def test_max_pooling_returns_indices_on_request(name):
    ours, twin = make_pair(name, (2,), {"return_indices": True})
    x = torch.randn(2, 3, 6, 8)
    for mine, theirs in zip(ours(x), twin(x), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_transposed_convolutions_reach_a_given_output_size(dims, mode):
    """For an ambiguous size, as in torch: without or with the first dimensions."""
    ours, twin = make_pair(f"ConvTranspose{dims}d", (4, 18, 3), {"stride": 3, "padding": 1})
    ours.train(mode)
    x = torch.randn(2, 4, *(5, 6)[:dims])
    smallest = twin(x).shape[2:]
    for extra in (0, 1, 2):
        size = [length + extra for length in smallest]
        for wanted in (size, torch.Size((2, 18, *size))):
            torch.testing.assert_close(ours(x, output_size=wanted), twin(x, output_size=wanted))
            torch.testing.assert_close(ours(x, wanted), twin(x, wanted))
    with pytest.raises(ValueError, match="output size"):
        ours(x, output_size=[length + 3 for length in smallest])


def test_in_place_activations_overwrite_their_input():
    for name in ("ReLU", "ReLU6", "LeakyReLU", "Hardswish", "Hardsigmoid", "SiLU"):
        x = torch.randn(4, 5)
        y = getattr(nn, name)(inplace=True)(x)
        assert y.data_ptr() == x.data_ptr()
        assert y.data_ptr() != getattr(nn, name)()(x).data_ptr()


def test_a_residual_is_added_in_place():
    """To the output of leaky_relu, whose input is kept for the backward pass as in torch."""
    x = torch.randn(4, 5)
    results = []
    for module in (nn.LeakyReLU(0.2), torch.nn.LeakyReLU(0.2)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y += 1
        results.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", sorted({case[0] for case in CASES} | {"MultiheadAttention"}))
def test_signatures_name_what_torchs_name(name):
    """torch.nn.utils.skip_init, for one, looks there for `device`."""
    ours, theirs = (inspect.signature(getattr(space, name)) for space in (nn, torch.nn))
    assert set(theirs.parameters) <= set(ours.parameters)


def test_skip_init():
    for name, args in (("Linear", (3, 4)), ("Conv2d", (3, 4, 3)), ("GRUCell", (3, 4))):
        module = torch.nn.utils.skip_init(getattr(nn, name), *args)
        assert type(module) is getattr(nn, name)


def test_lazy_modules_become_ours():
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    net(torch.randn(2, 3, 5, 5))
    assert [type(m) for m in net] == [nn.Conv2d, nn.BatchNorm2d, nn.Flatten, nn.Linear]
    up = nn.LazyConvTranspose2d(4, 3)
    assert up(torch.randn(2, 3, 5, 5)).shape == (2, 4, 7, 7) and type(up) is nn.ConvTranspose2d
    signals = nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyConvTranspose1d(5, 3))
    assert signals(torch.randn(2, 3, 9)).shape == (2, 5, 9)
    assert [type(m) for m in signals] == [nn.Conv1d, nn.ConvTranspose1d]
    net.eval()
    with torch.no_grad():
        assert net(torch.randn(2, 3, 5, 5)).shape == (2, 2)


def test_parametrized_weights_are_followed():
    ours, twin = make_pair("Conv2d", (3, 4, 3), {})
    for module in (ours, twin):
        torch.nn.utils.parametrizations.weight_norm(module)
        module.eval()
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), twin(x))
        for module in (ours, twin):
            module.parametrizations.weight.original0.mul_(3)
        torch.testing.assert_close(ours(x), twin(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Conv2d(3, 4, 3, dtype=torch.complex64), "Conv2d: dtype"),
        (lambda: nn.ConvTranspose2d(3, 4, 3, dtype=torch.complex64), "ConvTranspose2d: dtype"),
        (lambda: nn.Conv1d(3, 4, 3, dtype=torch.complex64), "Conv1d: dtype"),
        (lambda: nn.ConvTranspose1d(3, 4, 3, dtype=torch.complex64), "ConvTranspose1d: dtype"),
        (lambda: nn.ConvTranspose2d(3, 4, 3, padding_mode="reflect"), "zeros"),
        (lambda: nn.Linear(3, 4, dtype=torch.complex64), "Linear: dtype"),
        (lambda: nn.Conv2d(3, 4, 3, padding_mode="mirror"), "padding_mode"),
        (lambda: nn.Conv2d(3, 4, 3, groups=2), "groups"),
        (lambda: nn.GELU(approximate="erf"), "GELU: approximate"),
    ],
)
def test_unsupported_options_raise_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()
