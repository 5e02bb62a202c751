"""The Transformer's examples on tiny models: resuming bit for bit, accumulation, batches, maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import seq2seq_training as training
import sequence_tasks
import torch
import translation
from rich.console import Console

CONSOLE = Console(quiet=True)
PAIRS = [(f"number {i} and {i * i}", f"numéro {i} et {i * i}") for i in range(120)]


def _run(path: Path, steps: int, seed: int) -> tuple[torch.nn.Module, list[float]]:
    torch.manual_seed(5)
    model = translation.make_transformer(13, width=16, layers=1)
    run = translation.new_run(model, {"d_model": 16, "warmup": 4}, path)
    torch.manual_seed(seed)  # what a new process brings does not matter after the first save

    def batch(n: int) -> training.Batch:
        return sequence_tasks.make_batch("reverse", n, size=4)

    recipe = training.Recipe(steps, accumulate=2)
    losses, _ = training.train(model, model.loss, batch, recipe, run, CONSOLE, "test")
    return model, losses


def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY", 3)
    whole, losses = _run(tmp_path / "whole.pt", 7, seed=5)
    _run(tmp_path / "parts.pt", 3, seed=5)
    resumed, more = _run(tmp_path / "parts.pt", 7, seed=99)
    assert more == losses
    assert len(set(losses)) == 7
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_tasks() -> None:
    source, target = sequence_tasks.make_batch("reverse", 3, size=50)
    for s, t in zip(source.tolist(), target.tolist(), strict=True):
        digits = [d for d in s if d]
        assert [d for d in t if d] == [training.START, *digits[::-1], training.END]
    again = sequence_tasks.make_batch("copy", 3, size=50)
    assert torch.equal(again[0], source)
    assert not torch.equal(again[1], target)


def test_corpus_and_batches() -> None:
    corpus = translation.make_corpus(PAIRS, vocabulary=300)
    assert len(corpus.unseen) == 6
    assert not {corpus.text[i] for i in range(6)} & {p for p in PAIRS if p not in corpus.text}
    source, target = corpus.train[0]
    assert corpus.decode([*target, training.END, 77]) == corpus.decode(target)
    groups = translation.batches(corpus.train)
    assert sorted(i for group in groups for i in group) == list(range(len(corpus.train)))
    batch = translation.training_batch(corpus)
    assert torch.equal(batch(len(groups) + 1)[0], batch(len(groups) + 1)[0])
    assert source


def test_models_of_equal_size_and_their_perplexity() -> None:
    corpus = translation.make_corpus(PAIRS, vocabulary=300)
    model = translation.make_transformer(300, width=32, layers=2)
    lstm = translation.make_lstm(300, 32, translation.count(model))
    assert abs(translation.count(lstm) / translation.count(model) - 1) < 0.35
    for each in (model, lstm):
        assert 30 < translation.perplexity(each, corpus) < 3000  # untrained: near 300 pieces


def test_attention_maps_are_the_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sequence_tasks.make_model().eval()
    source, target = sequence_tasks.make_batch("copy", 0, size=2)
    with torch.no_grad(), training.attention_maps(model) as maps:
        model(source, target)
    (weights,) = maps
    assert weights.shape == (2, 4, target.shape[1], source.shape[1])
    torch.testing.assert_close(weights.sum(3), torch.ones(weights.shape[:3]))
    assert not weights[:, :, :, -1][source[:, -1] == 0].any()
    training.draw_maps(
        weights[0], ["a"] * weights.shape[2], ["b"] * weights.shape[3], tmp_path / "m.png"
    )
    assert (tmp_path / "m.png").stat().st_size > 1000
