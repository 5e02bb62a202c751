"""Packed recurrent weights: never stale, never in anyone's way. And what else wraps modules."""

from __future__ import annotations

import copy

import pytest
import torch
from recurrent_pairs import HIDDEN, IN, flat, make_input, run, twins
from torch.nn.utils import parametrizations

import nnarch
import nnarch.nn as nn

KINDS = ["lstm", "lstm, projected", "gru", "rnn tanh"]


@pytest.fixture(params=KINDS)
def module(request):
    """Two layers, both directions, in eval mode."""
    return twins(request.param, torch.float32, num_layers=2, bidirectional=True)[0].eval()


X = torch.randn(5, 2, IN, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def infer(module, x=X):
    return flat(module(x))


def assert_current(module, x=X):
    """By torch.nn's own forward on the weights as they are now."""
    twin = getattr(torch.nn, type(module).__name__)
    with torch.no_grad():
        torch.testing.assert_close(infer(module, x), flat(twin.forward(module, x)))


def test_eval_packs_every_layer_and_direction_once(module, monkeypatch):
    packs = []
    pack = type(module)._pack_recurrent
    monkeypatch.setattr(
        type(module), "_pack_recurrent", lambda *args: packs.append(1) or pack(*args)
    )
    for _ in range(3):
        assert_current(module)
    assert len(packs) == 4
    assert sorted(module._packed.packed) == [0, 1, 2, 3]
    assert None not in module._packed.packed.values()


def test_training_mode_and_gradients_do_without(module):
    module(X)  # weights want gradients
    assert module._packed is None
    module.requires_grad_(False)
    module(X.clone().requires_grad_())
    state = torch.zeros(4, 2, module.proj_size or HIDDEN, requires_grad=True)
    module(X, (state, torch.zeros(4, 2, HIDDEN)) if isinstance(module, nn.LSTM) else state)
    assert module._packed is None
    module(X)
    assert module._packed is not None
    module.train()
    infer(module)
    assert module._packed is None


def _scale(module):
    with torch.no_grad():
        module.weight_hh_l1_reverse.mul_(2)


def _optimizer_step(module):
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def _uncounted_data(module):
    module.weight_hh_l0.data.mul_(2)


def _uncounted_numpy(module):
    module.weight_ih_l1.detach().numpy()[...] += 1


def _new_data(module):
    module.weight_hh_l0_reverse.data = torch.randn_like(module.weight_hh_l0_reverse)


def _new_parameter(module):
    module.weight_ih_l0 = nn.Parameter(torch.randn_like(module.weight_ih_l0))


def _new_bias(module):
    module.bias_hh_l0 = nn.Parameter(torch.randn_like(module.bias_hh_l0))


def _load(module):
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()})


def _load_assign(module):
    module.load_state_dict({k: v + 1 for k, v in module.state_dict().items()}, assign=True)


def _weight_norm(module):
    parametrizations.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(3)


CHANGES = [
    _scale, _optimizer_step, _uncounted_data, _uncounted_numpy, _new_data, _new_parameter,
    _new_bias, _load, _load_assign, _weight_norm,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_every_change_of_a_weight_is_noticed(module, change):
    before = infer(module)
    change(module)
    got = infer(module)
    assert not torch.allclose(got[0], before[0])
    if change is not _weight_norm:  # torch's own forward does not look at it
        assert_current(module)
    nn.drop_packed_weights(module)
    torch.testing.assert_close(got, infer(module))


def test_projection_weights_are_watched():
    module = twins("lstm, projected", torch.float32)[0].eval()
    before = infer(module)
    with torch.no_grad():
        module.weight_hr_l0[0, 0] += 1
    assert not torch.allclose(infer(module)[0], before[0])
    assert_current(module)


def test_drop_packed_weights_after_an_uncounted_write_of_one_element(module):
    infer(module)
    module.weight_hh_l0.data[1, 1] += 5
    nn.drop_packed_weights(nn.Sequential(module))
    assert module._packed is None
    assert_current(module)


def test_double(module):
    infer(module)
    module.double()
    assert module._packed is None
    assert_current(module, X.double())


def test_weights_in_shared_memory_are_never_packed(module):
    infer(module)
    module.share_memory()
    assert_current(module)
    assert module._packed.packed == {}
    module.weight_hh_l0.detach().numpy()[1, 1] += 5
    assert_current(module)


def test_inference_mode(module):
    expected = infer(module)
    with torch.inference_mode():
        assert all(map(torch.equal, flat(module(X)), expected))
        made_inside = twins("gru", torch.float32)[0].eval()
        flat(made_inside(X))
        assert made_inside._packed is None


def test_functional_call_uses_the_given_weights(module):
    infer(module)
    other = {k: v.detach() + 1 for k, v in module.named_parameters()}
    with torch.no_grad():
        got = flat(torch.func.functional_call(module, other, (X,)))
        for name, value in other.items():
            getattr(module, name).copy_(value)
    torch.testing.assert_close(got, infer(module))


def test_a_forced_backend_leaves_no_packing_of_its_own(module):
    with nnarch.use_backend("reference"):
        reference = infer(module)
    torch.testing.assert_close(infer(module), reference)
    with nnarch.trace() as record:
        infer(module)
    assert [(entry.op, entry.backend) for entry in record] == [("recurrent_scan", "cpu")] * 4
    assert all(packed.numel() > 0 for packed in module._packed.packed.values())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_storage(kind):
    """The error of bfloat16 weights, and no effect where weights are not packed."""
    plain, _ = twins(kind, torch.float32, num_layers=2)
    options = {"proj_size": plain.proj_size} if plain.proj_size else {}
    stored = type(plain)(IN, HIDDEN, 2, weight_storage=torch.bfloat16, **options)
    stored.load_state_dict(plain.state_dict())
    assert "weight_storage=torch.bfloat16" in repr(stored)
    assert torch.equal(stored(X)[0], plain(X)[0])
    stored.eval(), plain.eval()
    got, expected = infer(stored)[0], infer(plain)[0]
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=0.02, atol=5e-3)
    clone = copy.deepcopy(stored)
    assert torch.equal(infer(clone)[0], got)
    clone.double()
    torch.testing.assert_close(infer(clone, X.double())[0].float(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    ours, theirs = twins(kind, torch.float32, num_layers=2, bidirectional=True)
    x = make_input(ours, "packed")
    with torch.autocast("cpu", torch.bfloat16):
        (y, state), (expected, _) = ours(x), theirs(x)
    dtype = torch.float32 if kind == "gru" else torch.bfloat16
    assert all(t.dtype == dtype for t in flat((y, state)))
    # torch's LSTM is bfloat16 where sequences are padded, and float32 where they are packed.
    assert kind == "lstm" or expected.data.dtype == dtype
    torch.testing.assert_close(y.data.float(), expected.data.float(), rtol=0.05, atol=0.03)
    y.data.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())
    assert ours.weight_hh_l0.grad.abs().sum() > 0
    ours.eval(), theirs.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x)[0], theirs(x)[0]
    torch.testing.assert_close(y.data.float(), expected.data.float(), rtol=0.05, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype):
    ours, theirs = twins(kind, dtype, num_layers=2)
    x = X.to(dtype)
    for mode in (True, False):
        y, state = ours.train(mode)(x)
        assert all(t.dtype == dtype for t in flat((y, state)))
        near = {"rtol": 0.05, "atol": 0.03 if dtype == torch.bfloat16 else 5e-3}
        torch.testing.assert_close(y.float(), theirs(x)[0].float(), **near)


@pytest.mark.parametrize("kind", KINDS)
def test_compile_without_graph_breaks(kind):
    torch.compiler.reset()  # a class may be compiled only so often
    ours, _ = twins(kind, num_layers=2, bidirectional=True, batch_first=True)
    x = make_input(ours, "batch")
    expected = run(ours, x)[1]
    # Without it dynamo leaves recurrent layers to eager mode, torch's and ours.
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        got = compiled(x)
        assert torch.equal(got[0], ours(x)[0])
        sum(t.sum() for t in flat(got)).backward()
    assert all(p.grad is not None for p in ours.parameters())
    ours.zero_grad()
    assert run(ours, x)[1].keys() == expected.keys()
    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        y = torch.compile(ours.eval(), fullgraph=True, backend="aot_eager", dynamic=True)(x)
    torch.testing.assert_close(flat(y), infer(ours, x))


@pytest.mark.parametrize("kind", KINDS)
def test_compile_leaves_layers_to_eager_mode_by_default(kind):
    torch.compiler.reset()  # a class may be compiled only so often
    ours, _ = twins(kind)
    model = torch.nn.Sequential(ours)
    x = make_input(ours, "batch")
    torch.testing.assert_close(
        flat(torch.compile(model, backend="aot_eager")(x)), flat(model(x)), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
def test_export(kind):
    ours, _ = twins(kind, num_layers=2, bidirectional=True)
    x = make_input(ours, "batch")
    program = torch.export.export(ours.eval(), (x,))
    assert any("recurrent_scan" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(flat(program.module()(x)), infer(ours, x))


def test_meta_device():
    with torch.device("meta"):
        module = nn.LSTM(IN, HIDDEN, 2, bidirectional=True)
        y, (h, c) = module(torch.empty(7, 2, IN))
    assert y.shape == (7, 2, 2 * HIDDEN)
    assert h.shape == c.shape == (4, 2, HIDDEN)
