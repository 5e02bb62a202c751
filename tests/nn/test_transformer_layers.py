"""nn.Transformer and its layers are torch.nn's: outputs, gradients, state, masks, parts."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from tolerances import assert_as_accurate
from torch.nn.modules.module import register_module_forward_hook

import nnarch
import nnarch.nn as nn

E, H, FF, B, T, S = 12, 3, 20, 2, 5, 4
NAMES = ["TransformerEncoderLayer", "TransformerDecoderLayer"]
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "a function": torch.nn.functional.silu,
    "a layer": torch.nn.GELU("tanh"),
    "somebody's": lambda x: x * x,
}
OPTIONS = list(itertools.product([False, True], repeat=3))  # batch_first, norm_first, bias


def pair(name, *sizes, dtype=torch.float64, **options):
    """(ours, torch's) with the same weights, dropping nothing."""
    sizes = sizes or (E, H, FF, 0.0)
    theirs = getattr(torch.nn, name)(*sizes, dtype=dtype, **options)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = getattr(nn, name)(*sizes, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def count(name):
    """How many sequences a layer takes."""
    return 1 if name == NAMES[0] else 2


def sequences(batch_first, *lengths, dtype=torch.float64):
    shapes = [(B, n, E) if batch_first else (n, B, E) for n in lengths]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def causal(length, dtype=torch.float64):
    return torch.nn.Transformer.generate_square_subsequent_mask(length, dtype=dtype)


def padding(*lengths, length):
    return torch.arange(length) >= torch.tensor(lengths)[:, None]


def results(module, leaves, options):
    module.zero_grad()
    for leaf in leaves:
        leaf.grad = None
    output = module(*leaves, **options)
    torch.manual_seed(5)
    (output * torch.randint(-4, 5, output.shape)).sum().backward()
    found = {"output": output} | {f"gradient {i}": t.grad.clone() for i, t in enumerate(leaves)}
    return found | {f"gradient of {n}": p.grad.clone() for n, p in module.named_parameters()}


def assert_same(ours, theirs, leaves, options):
    found, expected = (results(m, leaves, options) for m in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")
    for module in (ours, theirs):
        module.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, expected = (m(*leaves, **options) for m in (ours, theirs))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("batch_first", "norm_first", "bias"), OPTIONS)
def test_encoder_layers(batch_first, norm_first, bias, activation):
    options = {"batch_first": batch_first, "norm_first": norm_first, "bias": bias}
    act = ACTIVATIONS[activation]
    leaves = sequences(batch_first, T)
    for masks in (
        {},
        {"src_mask": causal(T), "is_causal": True},
        {"src_mask": torch.randn(B * H, T, T, dtype=torch.float64)},
        {"src_key_padding_mask": padding(5, 3, length=T)},
        {"src_mask": causal(T) != 0, "src_key_padding_mask": padding(5, 3, length=T)},
    ):
        ours, theirs = pair("TransformerEncoderLayer", activation=act, **options)
        assert_same(ours, theirs, leaves, masks)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("batch_first", "norm_first", "bias"), OPTIONS)
def test_decoder_layers(batch_first, norm_first, bias, activation):
    options = {"batch_first": batch_first, "norm_first": norm_first, "bias": bias}
    act = ACTIVATIONS[activation]
    leaves = sequences(batch_first, T, S)
    for masks in (
        {},
        {"tgt_mask": causal(T), "tgt_is_causal": True},
        {"memory_mask": torch.randn(T, S, dtype=torch.float64)},
        {"memory_key_padding_mask": padding(4, 2, length=S)},
        {
            "tgt_mask": causal(T) != 0,
            "tgt_key_padding_mask": padding(5, 3, length=T),
            "memory_key_padding_mask": padding(1, 2, length=S),
        },
    ):
        ours, theirs = pair("TransformerDecoderLayer", activation=act, **options)
        assert_same(ours, theirs, leaves, masks)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize(("batch_first", "norm_first", "bias"), OPTIONS)
def test_whole_transformers(batch_first, norm_first, bias):
    options = {"batch_first": batch_first, "norm_first": norm_first, "bias": bias}
    leaves = sequences(batch_first, S, T)
    for masks in (
        {},
        {"tgt_mask": causal(T)},  # which it finds to be causal
        {"tgt_mask": causal(T), "tgt_is_causal": True, "src_mask": causal(S)},
        {"tgt_mask": causal(T) + 1, "memory_mask": causal(T)[:, :S]},
    ):
        ours, theirs = pair("Transformer", E, H, 2, 1, FF, 0.0, **options)
        assert_same(ours, theirs, leaves, masks)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_padding_in_whole_transformers():
    ours, theirs = pair("Transformer", E, H, 2, 2, FF, 0.0, batch_first=True)
    leaves = sequences(True, S, T)
    hidden = padding(4, 2, length=S)
    masks = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
    assert_same(ours, theirs, leaves, masks | {"tgt_mask": causal(T)})


@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("hidden", ["left-aligned", "anywhere", "float"])
def test_padded_places_of_an_encoder(hidden, nested):
    """Zeros where torch.nn goes through nested tensors, else what the layers make of them."""
    layer, twin = pair("TransformerEncoderLayer", E, 4, FF, batch_first=True, dtype=torch.float32)
    build = {"num_layers": 2, "enable_nested_tensor": nested}
    theirs = torch.nn.TransformerEncoder(twin, norm=torch.nn.LayerNorm(E), **build).eval()
    ours = nn.TransformerEncoder(layer, norm=nn.LayerNorm(E), **build).eval()
    mixed = torch.nn.TransformerEncoder(layer, norm=torch.nn.LayerNorm(E), **build).eval()
    mask = padding(5, 3, length=T)
    if hidden == "anywhere":
        mask = mask.flip(1)
    if hidden == "float":
        mask = torch.zeros(B, T).masked_fill(mask, float("-inf"))
    x = torch.randn(B, T, E)
    with torch.no_grad():
        expected = theirs(x, src_key_padding_mask=mask)
        for module in (ours, mixed):
            torch.testing.assert_close(module(x, src_key_padding_mask=mask), expected)
    expected = theirs(x, src_key_padding_mask=mask)  # a gradient is wanted
    torch.testing.assert_close(ours(x, src_key_padding_mask=mask), expected)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_as_accurate_as_torch(name, norm_first):
    ours, theirs = pair(name, 48, 4, 100, 0.0, dtype=torch.float32, norm_first=norm_first,
                        batch_first=True, activation="gelu")  # fmt: skip
    exact = copy.deepcopy(theirs).double()
    leaves = [torch.randn(B, n, 48, requires_grad=True) for n in (17, 13)]
    leaves = leaves[: count(name)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found, expected, truth = (
        results(m, xs, {}) for m, xs in ((ours, leaves), (theirs, leaves), (exact, wide))
    )
    for what in truth:
        assert_as_accurate(found[what], expected[what], truth[what], factor=3, what=what)


@pytest.mark.parametrize("name", NAMES)
def test_unbatched(name):
    ours, theirs = pair(name)
    leaves = [torch.randn(n, E, dtype=torch.float64, requires_grad=True) for n in (T, S)]
    assert_same(ours, theirs, leaves[: count(name)], {})


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_dropout(name, norm_first):
    """Drawn anew in every call, decided by the seed, nothing in eval mode, right on average."""
    module = getattr(nn, name)(E, H, FF, 0.2, norm_first=norm_first, batch_first=True)
    leaves = [x.float() for x in sequences(True, T, S)][: count(name)]

    def once(seed):
        torch.manual_seed(seed)
        return module(*leaves).detach()

    assert torch.equal(once(1), once(1)) and not torch.equal(once(1), once(2))
    many = torch.stack([once(seed) for seed in range(400)])
    module.eval()
    exact = once(1)
    assert torch.equal(exact, once(2))
    assert (many.mean(0) - exact).abs().mean() < 0.2


def test_gradients_with_dropout_are_those_of_the_output():
    module = nn.TransformerDecoderLayer(4, 2, 6, 0.3, dtype=torch.float64, batch_first=True)
    leaves = [torch.randn(1, n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 2)]

    def same_drops(*inputs):
        torch.manual_seed(7)
        return module(*inputs)

    assert torch.autograd.gradcheck(same_drops, leaves)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_state_text_and_copies_are_the_twins():
    ours, theirs = pair("Transformer", E, H, 2, 2, FF, dtype=torch.float32)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, twin in zip(ours.modules(), theirs.modules(), strict=True):
        assert isinstance(mine, type(twin))
    theirs.load_state_dict(ours.state_dict())
    args = [x.float() for x in sequences(False, S, T)]
    ours.eval()
    with torch.no_grad():
        expected = ours(*args)
        for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(clone(*args), expected)


def test_construction_draws_the_same_weights():
    built = []
    for namespace in (nn, torch.nn):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built.append(namespace.Transformer(E, H, 1, 2, FF))
    for mine, twin in zip(*(m.parameters() for m in built), strict=True):
        assert torch.equal(mine, twin)


def test_the_published_count():
    with torch.device("meta"):
        model = nn.Transformer()
    assert sum(p.numel() for p in model.parameters()) == 44_140_544


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_parts_that_were_replaced_are_called(name, norm_first):
    class Adapter(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, *args, **kwargs):
            y = self.layer(*args, **kwargs)
            return (2 * y[0], None) if isinstance(y, tuple) else 2 * y

    leaves = sequences(True, T, S)[: count(name)]
    for part in ("self_attn", "linear1", "linear2", "norm1", "dropout", "dropout1"):
        ours, theirs = pair(name, norm_first=norm_first, batch_first=True)
        for module in (ours, theirs):
            module.register_module(part, Adapter(getattr(module, part)))
        found, expected = (results(m, leaves, {}) for m in (ours, theirs))
        for what, value in expected.items():
            torch.testing.assert_close(found[what], value)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_parts_are_called(name):
    ours, _ = pair(name, batch_first=True)
    leaves = sequences(True, T, S)[: count(name)]
    expected = ours(*leaves)
    called = []
    for part, module in ours.named_children():
        module.register_forward_hook(lambda *_, part=part: called.append(part))
    torch.testing.assert_close(ours(*leaves), expected)
    assert sorted(called) == sorted(part for part, _ in ours.named_children())


@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_all_modules_are_called(name):
    """Those that torch keeps for every module: each part runs as a module then."""
    ours, theirs = pair(name, batch_first=True)
    leaves = sequences(True, T, S)[: count(name)]
    called: list[list[str]] = []
    for layer in (ours, theirs):
        called.append([])
        hook = register_module_forward_hook(lambda m, *_: called[-1].append(type(m).__name__))
        try:
            layer(*leaves)
        finally:
            hook.remove()
    assert called[0] == called[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_without_memory(name, training):
    """On the device "meta", which knows no autocast."""
    layer = pair(name, batch_first=True, device="meta")[0].train(training)
    leaves = [t.to("meta") for t in sequences(True, T, S)[: count(name)]]
    assert layer(*leaves).shape == leaves[0].shape


@pytest.mark.parametrize("name", NAMES)
def test_compiles_into_one_graph(name):
    ours, _ = pair(name, dtype=torch.float32, batch_first=True)
    leaves = sequences(True, T, S, dtype=torch.float32)[: count(name)]
    expected = results(ours, leaves, {})
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for what, value in results(compiled, leaves, {}).items():
        torch.testing.assert_close(value, expected[what.replace("_orig_mod.", "")])


@pytest.mark.parametrize("name", NAMES)
def test_exports(name):
    ours, _ = pair(name, dtype=torch.float32, batch_first=True)
    ours.eval()
    args = tuple(x.detach() for x in sequences(True, T, S, dtype=torch.float32)[: count(name)])
    with torch.no_grad():
        exported = torch.export.export(ours, args)
        torch.testing.assert_close(exported.module()(*args), ours(*args))


def test_stacks_compile_with_a_mask():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, FF, batch_first=True), 2).eval()
    x = torch.randn(B, T, E)
    mask = causal(T, torch.float32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, mask), model(x, mask))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_autocast(name, training):
    """The residual stays in float32, as in torch."""
    ours, theirs = pair(name, dtype=torch.float32, batch_first=True)
    ours.train(training), theirs.train(training)
    leaves = sequences(True, T, S, dtype=torch.float32)[: count(name)]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(*leaves), theirs(*leaves)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.1, atol=0.1)
    found.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters())


def test_products_carry_activation_and_residual():
    module = nn.TransformerEncoderLayer(E, H, FF, batch_first=True).eval()
    with torch.no_grad(), nnarch.trace() as record:
        module(torch.randn(B, T, E))
    ops = [entry.op for entry in record]
    assert ops.count("linear") == 4 and ops.count("attention") == 1
    assert "activation" not in ops


def test_bad_input_is_named():
    for name in (*NAMES, "Transformer"):
        with pytest.raises(ValueError, match="dtype must be one of"):
            getattr(nn, name)(E, H, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="activation should be relu/gelu"):
        nn.TransformerEncoderLayer(E, H, activation="mish")
    module = nn.TransformerEncoderLayer(E, H, batch_first=True)
    with pytest.raises(ValueError, match="query must be"):
        module(torch.randn(B, T, 5))
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        module(torch.randn(B, T, E), src_key_padding_mask=torch.zeros(B, 3, dtype=torch.bool))
    decoder = nn.TransformerDecoderLayer(E, H, batch_first=True)
    with pytest.raises(TypeError, match="key must be a tensor, got NoneType"):
        decoder(torch.randn(B, T, E), None)


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0), (1, 1)])
def test_empty_and_single(batch, length):
    for module in (nn.TransformerEncoderLayer(E, H), nn.TransformerEncoderLayer(E, H).eval()):
        x = torch.randn(length, batch, E)
        assert module(x).shape == x.shape
