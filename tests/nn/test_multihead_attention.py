"""nn.MultiheadAttention is torch.nn's: every way through it, in outputs, weights and gradients."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from tolerances import assert_as_accurate

import nnarch
import nnarch.nn as nn

E, H, B, L, S = 12, 3, 2, 5, 4
KINDS = ["self", "memory", "three", "sizes"]
LAYOUTS = ["batch first", "length first", "unbatched"]
MASKS = ["none", "2-D bool", "2-D float", "3-D bool", "3-D float", "causal"]
PADDINGS = ["none", "bool", "float"]
WEIGHTS = ["none", "averaged", "of every head"]
EXTRAS = list(itertools.product([True, False], repeat=3))  # bias, add_bias_kv, add_zero_attn


def pair(kind, layout, extras=(True, False, False), dtype=torch.float64, **options):
    """(ours, torch's) with the same weights, no bias zero."""
    bias, bias_kv, zero = extras
    options |= {"bias": bias, "add_bias_kv": bias_kv, "add_zero_attn": zero}
    if kind == "sizes":
        options |= {"kdim": 7, "vdim": 9}
    options |= {"batch_first": layout == "batch first", "dtype": dtype}
    theirs = torch.nn.MultiheadAttention(E, H, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    ours = nn.MultiheadAttention(E, H, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(kind, layout, dtype=torch.float64):
    """Leaves, and the query, key and value that they are."""

    def leaf(length, size):
        shape = {"batch first": (B, length, size), "length first": (length, B, size)}
        return torch.randn(shape.get(layout, (length, size)), dtype=dtype, requires_grad=True)

    if kind == "self":
        x = leaf(L, E)
        return [x], [x, x, x]
    if kind == "memory":
        x, memory = leaf(L, E), leaf(S, E)
        return [x, memory], [x, memory, memory]
    leaves = [
        leaf(L, E),
        leaf(S, 7 if kind == "sizes" else E),
        leaf(S, 9 if kind == "sizes" else E),
    ]
    return leaves, leaves


def masks(kind, layout, mask, padding, dtype=torch.float64):
    """attn_mask, key_padding_mask and is_causal; every query sees at least the first key."""
    keys = L if kind == "self" else S
    batch = () if layout == "unbatched" else (B,)
    found = {}
    if mask != "none":
        many = (H * (batch or (1,))[0],) if mask.startswith("3-D") else ()
        hidden = torch.rand(*many, L, keys) < 0.4
        if mask == "causal":
            hidden = torch.ones(L, keys, dtype=torch.bool).triu(1)
            found["is_causal"] = True
        hidden[..., 0] = False
        found["attn_mask"] = hidden if mask != "causal" else additive(hidden, dtype)
        if mask.endswith("float"):
            found["attn_mask"] = torch.randn(hidden.shape, dtype=dtype) + additive(hidden, dtype)
    if padding != "none":
        hidden = torch.rand(*batch, keys) < 0.4
        hidden[..., 0] = False
        found["key_padding_mask"] = hidden
        if padding == "float":
            found["key_padding_mask"] = torch.randn(hidden.shape, dtype=dtype) + additive(
                hidden, dtype
            )
    return found


def additive(hidden, dtype):
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))


def results(module, leaves, args, options):
    """Output, weights and all gradients, by name."""
    module.zero_grad()
    for leaf in leaves:
        leaf.grad = None
    output, weights = module(*args, **options)
    found = {"output": output} | ({} if weights is None else {"weights": weights})
    torch.manual_seed(5)  # whole numbers: the same in every dtype, whatever the strides
    sum((t * torch.randint(-4, 5, t.shape)).sum() for t in found.values()).backward()
    found |= {f"gradient of input {i}": leaf.grad.clone() for i, leaf in enumerate(leaves)}
    return found | {f"gradient of {n}": p.grad.clone() for n, p in module.named_parameters()}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_is_torchs(kind, layout):
    extras = itertools.cycle(EXTRAS)
    for mask, padding, wanted in itertools.product(MASKS, PADDINGS, WEIGHTS):
        extra = next(extras)
        if mask == "causal" and any(extra[1:]):
            continue  # a test of its own
        ours, theirs = pair(kind, layout, extra)
        leaves, args = inputs(kind, layout)
        options = masks(kind, layout, mask, padding) | {
            "need_weights": wanted != "none",
            "average_attn_weights": wanted == "averaged",
        }
        found = results(ours, leaves, args, options)
        expected = results(theirs, leaves, args, options)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, msg=lambda m, n=name, o=(extra, mask, padding): f"{n} {o}: {m}"
            )
        ours.eval()
        with torch.no_grad():  # packed weights
            output, _ = ours(*args, **options)
        torch.testing.assert_close(output, expected["output"])


@pytest.mark.parametrize("extras", [(True, True, False), (True, False, True), (True, True, True)])
@pytest.mark.parametrize("given", [True, False], ids=["mask", "no mask"])
def test_keys_of_the_module_are_seen_by_causal_queries(extras, given):
    """torch.nn's module reads its mask for that only where weights are wanted."""
    ours, theirs = pair("self", "batch first", extras)
    leaves, args = inputs("self", "batch first")
    options = masks("self", "batch first", "causal", "none")
    expected = results(theirs, leaves, args, options)
    if not given:
        del options["attn_mask"]
    found = results(ours, leaves, args, options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    output, _ = ours(*args, need_weights=False, **options)
    torch.testing.assert_close(output, expected["output"])


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["self", "memory", "sizes"])
def test_as_accurate_as_torch(kind, dtype):
    ours, theirs = pair(kind, "batch first", dtype=dtype)
    exact = copy.deepcopy(theirs).double()
    leaves, args = inputs(kind, "batch first", dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    named = {id(leaf): w for leaf, w in zip(leaves, wide, strict=True)}
    options = masks(kind, "batch first", "2-D float", "bool", dtype)
    truth_options = {n: t.double() if t.is_floating_point() else t for n, t in options.items()}
    options |= {"need_weights": False}
    truth_options |= {"need_weights": False}
    found = results(ours, leaves, args, options)
    expected = results(theirs, leaves, args, options)
    truth = results(exact, wide, [named[id(a)] for a in args], truth_options)
    for name in expected:
        if dtype == torch.float32 or name == "output":
            assert_as_accurate(found[name], expected[name], truth[name], factor=3, what=name)


def test_queries_that_see_nothing_give_zeros():
    ours, _ = pair("self", "batch first")
    leaves, args = inputs("self", "batch first")
    padding = torch.zeros(B, L, dtype=torch.bool)
    padding[1] = True
    for wanted in (True, False):
        found = results(ours, leaves, args, {"key_padding_mask": padding, "need_weights": wanted})
        bias = ours.out_proj.bias
        torch.testing.assert_close(found["output"][1], bias.expand(L, E))
        for name, value in found.items():
            assert torch.isfinite(value).all(), name
        if wanted:
            assert (found["weights"][1] == 0).all() and (found["weights"][0] > 0).all()


def test_dropout_drops_weights_that_it_returns():
    ours, _ = pair("self", "batch first", dropout=0.5)
    _, args = inputs("self", "batch first")
    torch.manual_seed(3)
    output, weights = ours(*args, average_attn_weights=False)
    dropped = (weights == 0).double().mean()
    assert 0.2 < dropped < 0.8
    values = torch.nn.functional.linear(
        args[2], ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :]
    )
    heads = weights @ values.unflatten(2, (H, E // H)).transpose(1, 2)
    torch.testing.assert_close(output, ours.out_proj(heads.transpose(1, 2).flatten(2)))
    # The same elements without weights, and none in eval mode.
    torch.manual_seed(3)
    torch.testing.assert_close(ours(*args, need_weights=False)[0], output)
    ours.eval()
    assert (ours(*args, average_attn_weights=False)[1] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("extras", EXTRAS)
def test_state_text_and_copies_are_the_twins(kind, extras):
    ours, theirs = pair(kind, "batch first", extras)
    assert isinstance(ours, torch.nn.MultiheadAttention)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    _, args = inputs(kind, "batch first")
    ours.eval()
    with torch.no_grad():
        expected = ours(*args)[0]
        assert "_packed" in vars(ours)
        for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), copy.copy(ours)):
            assert type(clone) is nn.MultiheadAttention
            assert torch.equal(clone(*args)[0], expected)


def test_packed_weights_follow_the_parameters():
    ours, theirs = pair("self", "batch first", dtype=torch.float32)
    _, args = inputs("self", "batch first", torch.float32)
    ours.eval()
    with torch.no_grad():
        for parameter in (ours.in_proj_weight, ours.out_proj.weight):
            ours(*args)
            parameter.mul_(1.5)
            theirs.load_state_dict(ours.state_dict())
            torch.testing.assert_close(ours(*args)[0], theirs(*args)[0])
        # The same module for itself, for a memory, and for three tensors.
        for kind in ("self", "memory", "three", "self"):
            _, args = inputs(kind, "batch first", torch.float32)
            torch.testing.assert_close(ours(*args)[0], theirs(*args)[0])
    ours.train()
    assert "_packed" not in vars(ours)


def test_one_product_projects_query_key_and_value():
    ours, _ = pair("self", "batch first")
    for kind, products in (("self", 2), ("memory", 3), ("three", 4)):
        _, args = inputs(kind, "batch first")
        with nnarch.trace() as record:
            ours(*args, need_weights=False)
        assert [entry.op for entry in record].count("linear") == products, kind


@pytest.mark.parametrize("need_weights", [True, False])
def test_compiles_into_one_graph(need_weights):
    ours, _ = pair("self", "batch first", dtype=torch.float32)
    leaves, args = inputs("self", "batch first", torch.float32)
    options = masks("self", "batch first", "2-D bool", "bool") | {"need_weights": need_weights}
    expected = results(ours, leaves, args, options)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    found = results(compiled, leaves, args, options)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name.replace("_orig_mod.", "")])


def test_autocast():
    ours, theirs = pair("self", "batch first", (True, True, False), dtype=torch.float32)
    _, args = inputs("self", "batch first", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for wanted in (True, False):
            mine, weights = ours(*args, need_weights=wanted)
            expected, _ = theirs(*args, need_weights=wanted)
            assert mine.dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(mine.float(), expected.float(), rtol=0.1, atol=0.1)
            assert wanted == (weights is not None)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_number_beside_half_types_is_no_infinity(dtype, need_weights):
    """float32's least number hides no key that all others are hidden with."""
    module = nn.MultiheadAttention(E, H, batch_first=True).to(dtype).eval()
    x, hidden = torch.randn(B, L, E).to(dtype), torch.zeros(B, L)
    hidden[0] = hidden[1, 2] = torch.finfo(torch.float32).min
    y, weights = module(x, x, x, key_padding_mask=hidden, need_weights=need_weights)
    seen, _ = module(x[1:], x[1:], x[1:], key_padding_mask=hidden[1:] < 0)
    torch.testing.assert_close(y[1:], seen, rtol=0.02, atol=0.02)
    assert y[0].abs().amin(0).count_nonzero() > 0
    if need_weights:
        assert weights.amin() >= 0 and weights.amax() <= 1


@pytest.mark.parametrize("build", [nn.MultiheadAttention, torch.nn.MultiheadAttention])
def test_a_constructor_refuses(build):
    with pytest.raises((ValueError, AssertionError)):
        build(10, 3)
    with pytest.raises(ValueError, match="greater than 0"):
        build(0, 3)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="MultiheadAttention: dtype must be one of"):
        nn.MultiheadAttention(4, 2, dtype=torch.complex64)
    module = nn.MultiheadAttention(E, H, batch_first=True)
    x, other = torch.randn(B, L, E), torch.randn(B, S, E)

    def fails(error, message, *args, **options):
        with pytest.raises(error, match=message):
            module(*args, **options)

    fails(ValueError, "query must be .* E = 12", torch.randn(B, L, 5), x, x)
    fails(ValueError, "query must be", torch.randn(1, B, L, E), x, x)
    fails(ValueError, "key must have .* 12 features", x, other[..., :3], other)
    fails(ValueError, "value must have", x, other, other[:1])
    fails(ValueError, "equally long", x, other, x)
    fails(TypeError, "key must be a tensor, got NoneType", x, None, None)
    fails(ValueError, r"key_padding_mask must have shape \(2, 5\)", x, x, x, other[..., 0] > 0)
    fails(ValueError, r"attn_mask must have shape \(5, 5\) or \(6, 5, 5\)", x, x, x,
          attn_mask=torch.zeros(5, 4))  # fmt: skip
    fails(TypeError, "attn_mask must be bool or floating", x, x, x,
          attn_mask=torch.zeros(5, 5, dtype=torch.int64))  # fmt: skip
    fails(TypeError, "cache must be a GrowingCache", x, x, x, cache={})
    nested = torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged)
    fails(TypeError, "query must be dense", nested, nested, nested)


@pytest.mark.parametrize(("batch", "length", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1)])
def test_empty_and_single(batch, length, keys):
    module = nn.MultiheadAttention(E, H, batch_first=True)
    x, memory = torch.randn(batch, length, E), torch.randn(batch, keys, E)
    y, weights = module(x, memory, memory)
    assert y.shape == x.shape and weights.shape == (batch, length, keys)
    if keys == 0:
        torch.testing.assert_close(y, module.out_proj.bias.expand_as(y))
