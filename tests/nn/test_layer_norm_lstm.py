"""LSTMs that torch.nn does not have: normalized, and with peepholes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from recurrent_pairs import BATCH, HIDDEN, IN, LENGTHS, TIME, flat, make_input
from torch.nn.utils.rnn import pack_sequence

import nnarch.nn as nn

OPTIONS = {
    "peephole": (nn.LSTM, {"peephole": True}),
    "normalized": (nn.LayerNormLSTM, {}),
    "both": (nn.LayerNormLSTM, {"peephole": True, "eps": 1e-3}),
    "both, projected": (nn.LayerNormLSTM, {"peephole": True, "proj_size": 2}),
}


def build(name, **options):
    """A module whose gains and shifts are no ones and zeros."""
    kind, own = OPTIONS[name]
    module = kind(IN, HIDDEN, dtype=torch.float64, **own, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def layer_norm(v, weight, bias, eps):
    mean, var = v.mean(-1, keepdim=True), v.var(-1, keepdim=True, correction=0)
    return (v - mean) / (var + eps).sqrt() * weight + bias


def by_definition(module, x):
    """One layer, one direction, from the equations of the papers: outputs, h and c."""
    p = {name.removesuffix("_l0"): value for name, value in module.named_parameters()}
    normalized = isinstance(module, nn.LayerNormLSTM)
    h = torch.zeros(x.shape[1], module.proj_size or HIDDEN, dtype=x.dtype)
    c = torch.zeros(x.shape[1], HIDDEN, dtype=x.dtype)
    outputs = []
    for step in x:
        of_x, of_h = step @ p["weight_ih"].t(), h @ p["weight_hh"].t()
        if normalized:
            of_x = layer_norm(of_x, p["norm_ih_weight"], p["norm_ih_bias"], module.eps)
            of_h = layer_norm(of_h, p["norm_hh_weight"], p["norm_hh_bias"], module.eps)
        i, f, g, o = (of_x + of_h + p["bias_ih"] + p["bias_hh"]).chunk(4, -1)
        peep = p.get("weight_peephole", torch.zeros(3, HIDDEN))
        i, f = torch.sigmoid(i + peep[0] * c), torch.sigmoid(f + peep[1] * c)
        c = f * c + i * torch.tanh(g)
        o = torch.sigmoid(o + peep[2] * c)
        seen = c
        if normalized:
            seen = layer_norm(c, p["norm_c_weight"], p["norm_c_bias"], module.eps)
        h = o * torch.tanh(seen)
        if module.proj_size:
            h = h @ p["weight_hr"].t()
        outputs.append(h)
    return torch.stack(outputs), h, c


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_and_gradients_follow_the_papers(name):
    module = build(name)
    x = torch.randn(TIME, BATCH, IN, dtype=torch.float64, requires_grad=True)
    y, (h, c) = module(x)
    got = [y, h[0], c[0]]
    expected = by_definition(module, x)
    torch.testing.assert_close(got, list(expected), rtol=1e-9, atol=1e-11)
    leaves = [x, *module.parameters()]
    weights = [torch.randn_like(t) for t in got]
    grads = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(r, weights, strict=True)), leaves)
        for r in (got, expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_layers_directions_and_packed_sequences(name):
    """Each sequence alone through single layers, put together by hand."""
    module = build(name, num_layers=2, bidirectional=True).eval()
    kind, own = OPTIONS[name]
    sequences = [torch.randn(n, IN, dtype=torch.float64) for n in LENGTHS]
    with torch.no_grad():
        y, (h, c) = module(pack_sequence(sequences, enforce_sorted=False))
        padded, _ = torch.nn.utils.rnn.pad_packed_sequence(y)
        for b, sequence in enumerate(sequences):
            x, k = sequence[:, None], 0
            for layer in range(2):
                both = []
                for suffix in ("", "_reverse"):
                    single = kind(x.shape[2], HIDDEN, dtype=torch.float64, **own)
                    single.load_state_dict(
                        {n: module.state_dict()[n.replace("_l0", f"_l{layer}{suffix}")]
                         for n in single.state_dict()}
                    )  # fmt: skip
                    out, end_h, end_c = by_definition(single, x.flip(0) if suffix else x)
                    both.append(out.flip(0) if suffix else out)
                    torch.testing.assert_close(h[k, b], end_h[0], rtol=1e-9, atol=1e-11)
                    torch.testing.assert_close(c[k, b], end_c[0], rtol=1e-9, atol=1e-11)
                    k += 1
                x = torch.cat(both, -1)
            torch.testing.assert_close(padded[: len(sequence), b], x[:, 0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_copies_and_text(name):
    module = build(name, num_layers=2, bidirectional=True).eval()
    x = make_input(module, "batch")
    with torch.no_grad():
        expected = flat(module(x))
        for clone in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert all(map(torch.equal, flat(clone(x)), expected))
            assert repr(clone) == repr(module)
        fresh = OPTIONS[name][0](
            IN, HIDDEN, num_layers=2, bidirectional=True, dtype=torch.float64, **OPTIONS[name][1]
        ).eval()
        assert not torch.allclose(fresh(x)[0], expected[0])
        fresh.load_state_dict(module.state_dict())
        assert all(map(torch.equal, flat(fresh(x)), expected))
    assert ("peephole=True" in repr(module)) == module.peephole
    own = 4 * 18 * HIDDEN if isinstance(module, nn.LayerNormLSTM) else 0
    own += 4 * 3 * HIDDEN if module.peephole else 0
    twin = torch.nn.LSTM(IN, HIDDEN, 2, bidirectional=True, proj_size=module.proj_size)
    size = sum(p.numel() for p in module.parameters())
    assert size == sum(p.numel() for p in twin.parameters()) + own


def test_initial_values():
    module = nn.LayerNormLSTM(IN, HIDDEN, 2, peephole=True)
    for name, value in module.named_parameters():
        if name.startswith("norm"):
            assert (value == float("weight" in name)).all(), name
        else:
            assert 0 < value.abs().max() <= HIDDEN**-0.5, name


def test_without_peepholes_the_state_dict_is_torchs():
    assert list(nn.LSTM(2, 3).state_dict()) == list(torch.nn.LSTM(2, 3).state_dict())
    assert "peephole" not in vars(nn.LSTM(2, 3))


@pytest.mark.parametrize("name", OPTIONS)
def test_inference_on_packed_weights(name):
    module = build(name, num_layers=2, bidirectional=True)
    x = make_input(module, "packed")
    expected = [t.detach() for t in flat(module(x))]
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(flat(module(x)), expected, rtol=1e-10, atol=1e-12)
        assert len(module._packed.packed) == 4
        for parameter in module.parameters():  # gains and shifts are read as they are
            parameter.mul_(1.5)
        got = flat(module(x))
    expected = [t.detach() for t in flat(module.train()(x))]
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name):
    module = build(name)
    x = torch.randn(3, 2, IN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(flat(module(x))), (x,), fast_mode=True)


def test_compile_and_export():
    torch.compiler.reset()  # a class may be compiled only so often
    module = build("both", num_layers=2)
    x = make_input(module, "batch")
    expected = [t.detach() for t in flat(module(x))]
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close([t.detach() for t in flat(compiled(x))], expected)
    exported = torch.export.export(module.eval(), (x,)).module()
    torch.testing.assert_close([t.detach() for t in flat(exported(x))], expected)
