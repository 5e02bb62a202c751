"""The Transformer: counts, torch.nn's twin, decoding with and without a cache, the schedule."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tolerances import assert_as_accurate
from torch import Tensor

import nnarch
from nnarch.models.decoding import beam_search
from nnarch.models.transformer import (
    TransformerConfig,
    TransformerModel,
    noam_rate,
    noam_schedule,
)

SMALL = TransformerConfig(
    vocabulary=30,
    d_model=16,
    heads=4,
    feedforward=32,
    encoder_layers=2,
    decoder_layers=2,
    dropout=0.0,
)
VARIANTS = {
    "the paper's": {},
    "pre-norm": {"norm_first": True},
    "Marian's": {"positions": "concatenated", "activation": "silu", "output_bias": True},
    "untied": {"tied": False, "padding": None, "scale_embedding": False, "activation": "gelu"},
}


def build(variant="the paper's", dtype=torch.float32, nn=nnarch.nn, **options):
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **VARIANTS[variant], **options)
    return TransformerModel(config, nn=nn).to(dtype)


def sentences():
    """Sources with padding, targets with a start, an end and padding."""
    source, target = torch.randint(3, 30, (4, 7)), torch.randint(3, 30, (4, 6))
    source[1, 4:] = source[3, 1:] = 0
    target[:, 0] = 1
    target[0, 3], target[0, 4:] = 2, 0
    return source, target


@pytest.mark.parametrize(("name", "count"), [("base", 63_082_496), ("big", 214_245_376)])
def test_published_counts(name, count):
    with torch.device("meta"):
        model = nnarch.create_model(f"transformer_{name}")
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_the_state_of_a_model_has_torchs_names():
    names = set(build("pre-norm").state_dict())
    twin = torch.nn.Transformer(16, 4, 2, 2, 32, norm_first=True)
    assert names == set(twin.state_dict()) | {"embedding.weight", "output.weight"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_are_torchs(variant):
    source, target = sentences()
    found = []
    for dtype, nn in (
        (torch.float32, nnarch.nn),
        (torch.float32, torch.nn),
        (torch.float64, torch.nn),
    ):
        model = build(variant, dtype, nn)
        logits = model(source, target)
        model.loss(source, target).backward()
        found.append({"logits": logits} | {n: p.grad for n, p in model.named_parameters()})
    for name in found[0]:
        assert_as_accurate(*(results[name] for results in found), factor=3, ulps=16, what=name)


@pytest.mark.parametrize("variant", ["the paper's", "pre-norm", "Marian's"])
def test_padding_of_a_source_changes_nothing(variant):
    model = build(variant).eval()
    source, target = sentences()
    torch.testing.assert_close(model(source[1:2, :4], target[1:2]), model(source, target)[1:2])


def test_the_loss_is_smoothed_and_leaves_padding_out():
    model = build()
    source, target = sentences()
    likely = model(source, target[:, :-1]).log_softmax(2)
    wanted = target[:, 1:]
    of_token = likely.gather(2, wanted[..., None])[..., 0]
    smoothed = 0.9 * of_token + 0.1 * likely.mean(2)
    expected = -smoothed[wanted != 0].mean()
    torch.testing.assert_close(model.loss(source, target), expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("beams", [1, 2, 5])
def test_a_cache_changes_no_token(variant, beams):
    model, twin = build(variant).eval(), build(variant, nn=torch.nn).eval()
    with torch.no_grad():  # so that sentences end, at different places
        model.embedding.weight.mul_(3)
        twin.embedding.weight.mul_(3)
    source, _ = sentences()
    written = model.generate(source, 12, beams=beams)
    assert torch.equal(model.generate(source, 12, beams=beams, use_cache=False), written)
    assert torch.equal(twin.generate(source, 12, beams=beams), written)


def test_greedy_tokens_are_the_likeliest():
    model = build().eval()
    source, _ = sentences()
    written = model.generate(source, 9)
    target = torch.cat([torch.ones(4, 1, dtype=torch.int64), written], 1)
    preferred = model(source, target)[:, :-1].argmax(2)
    for found, likeliest in zip(written.tolist(), preferred.tolist(), strict=True):
        length = found.index(2) + 1 if 2 in found else len(found)
        assert found[:length] == likeliest[:length]
        assert all(token == 0 for token in found[length:])


def score(model, source, tokens, alpha):
    """Log-probability of a sentence with its end, over the length penalty."""
    target = torch.tensor([[1, *tokens]])
    likely = model(source, target[:, :-1]).log_softmax(2)[0]
    total = sum(likely[i, token].item() for i, token in enumerate(tokens))
    return total / ((5 + len(tokens)) / 6) ** alpha


@pytest.mark.parametrize("beams", [1, 3])
def test_any_whole_numbers_and_any_batch(beams):
    model = build().eval()
    source, _ = sentences()
    written = model.generate(source, 5, beams=beams)
    assert torch.equal(model.generate(source.int(), 5, beams=beams), written)
    assert model.generate(source[:0], 5, beams=beams).shape[0] == 0


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
@torch.no_grad()
def test_beams_that_keep_everything_find_the_best(alpha):
    """With as many beams as there are sentences, against all sentences."""
    model = build(vocabulary=4, padding=None).eval()
    model.embedding.weight.mul_(4)
    source = torch.tensor([[3, 0, 3, 1]])
    # Of at most three tokens; only a full one may lack its end.
    every = [
        tokens
        for n in (1, 2, 3)
        for tokens in itertools.product(range(4), repeat=n)
        if 2 not in tokens[:-1] and (tokens[-1] == 2 or n == 3)
    ]
    best = max(every, key=lambda tokens: score(model, source, tokens, alpha))
    written = model.generate(source, 3, beams=27, length_penalty=alpha)[0].tolist()
    assert tuple(written[: len(best)]) == best and all(t == 2 for t in written[len(best) :])


class _Says:
    """A stepper that wants to say these tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.rows, self.at = tokens, 1, 0

    def __call__(self, token: Tensor) -> Tensor:
        likely = torch.full((self.rows, 5), -5.0)
        likely[:, self.tokens[self.at]] = 5.0
        self.at += 1
        return likely

    def repeat(self, times: int) -> None:
        self.rows *= times

    def reorder(self, rows: Tensor) -> None:
        pass


@pytest.mark.parametrize(("filler", "tokens"), [(0, (4, 0, 3, 2)), (0, (0, 2)), (2, (3, 4, 2))])
def test_beams_keep_fillers_within_a_sentence(filler, tokens):
    found = beam_search(_Says(*tokens), torch.zeros(1, 1, dtype=torch.long), 4, 2, filler, 2, 0.6)
    assert tuple(found[0].tolist()) == tokens


@torch.no_grad()
def test_sentences_of_a_batch_do_not_meet():
    model = build().eval()
    model.embedding.weight.mul_(3)
    source, _ = sentences()
    for beams in (1, 3):
        together = model.generate(source, 8, beams=beams)
        for i in range(4):
            length = int((source[i] != 0).sum())
            alone = model.generate(source[i : i + 1, :length], 8, beams=beams)[0].tolist()
            found = together[i].tolist()
            assert found[: len(alone)] == alone and not any(found[len(alone) :])


def test_a_sentence_that_ends_at_once():
    model = build("Marian's").eval()
    with torch.no_grad():
        model.output.bias[2] = 1e4
    source, _ = sentences()
    for beams in (1, 4):
        assert model.generate(source, 6, beams=beams).tolist() == [[2]] * 4
        assert model.generate(source, 0, beams=beams).shape == (4, 0)


def test_attention_maps():
    model, twin = build().eval(), build(nn=torch.nn).eval()
    source, target = sentences()
    maps = model.attention_maps(source, target)
    assert maps.shape == (2, 4, 4, 6, 7)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 4, 4, 6))
    assert (maps[..., 4:][:, 1] == 0).all() and (maps[..., :4] > 0).any()
    torch.testing.assert_close(twin.attention_maps(source, target), maps)
    assert not model.decoder.layers[0].multihead_attn._forward_hooks


def test_the_limit_follows_from_the_source():
    model = build("Marian's").eval()
    with torch.no_grad():
        model.output.bias[2] = -1e4
    source, _ = sentences()
    assert model.generate(source).shape == (4, 57)


def test_the_noam_schedule():
    rates = [noam_rate(step, 512, 4000) for step in (1, 2000, 4000, 16_000)]
    peak = 512**-0.5 * 4000**-0.5
    assert rates == pytest.approx([peak / 4000, peak / 2, peak, peak / 2])
    assert noam_rate(0) == noam_rate(1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    schedule = noam_schedule(optimizer, 64, warmup=3, factor=2.0)
    found = []
    for _ in range(5):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx([2 * noam_rate(step, 64, 3) for step in range(1, 6)])


def test_it_learns_to_copy():
    model = build(norm_first=True, d_model=32).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(120):
        words = torch.randint(3, 8, (32, 3))
        target = torch.cat([torch.ones(32, 1).long(), words, torch.full((32, 1), 2)], 1)
        optimizer.zero_grad()
        model.loss(words, target).backward()
        optimizer.step()
    assert (model.eval().generate(words, 3) == words).double().mean() > 0.9


def test_compiles_into_one_graph():
    model = build()
    source, target = sentences()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(source, target), model(source, target))


def test_bad_options_are_named():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SMALL.heads = 3
    with pytest.raises(ValueError, match="activation must be one of relu, gelu, silu"):
        TransformerModel(dataclasses.replace(SMALL, activation="mish"))
    with pytest.raises(ValueError, match="layout must be one of"):
        TransformerModel(dataclasses.replace(SMALL, positions="learned"))
    with pytest.raises(TypeError, match="widths"):
        nnarch.create_model("transformer_base", widths=3)
    with pytest.raises(ValueError, match="beams must be at least 1, got 0"):
        build().generate(torch.ones(1, 2, dtype=torch.int64), beams=0)
