"""The character model: a killed run goes on bit for bit; what judges it is right."""

from __future__ import annotations

import math

import char_lm
import pytest
import torch
from checkpoint import Checkpoint

import nnarch

TEXT = char_lm.Text("".join(f"{i * i} is the square of {i}.\n" for i in range(900)))


def new_run(path, monkeypatch, cell="lstm"):
    monkeypatch.setattr(char_lm, "SAVE_EVERY", 3)
    torch.manual_seed(0)
    model = nnarch.create_model(
        f"{cell}_language_model",
        vocabulary=len(TEXT.alphabet), embedding=8, hidden=16, layers=2, dropout=0.1,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters())
    return model, Checkpoint(path, model=model, optimizer=optimizer)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, monkeypatch, cell):
    model, checkpoint = new_run(tmp_path / "whole.pt", monkeypatch, cell)
    whole = char_lm.train(model, TEXT, 7, checkpoint)

    killed_model, checkpoint = new_run(tmp_path / "killed.pt", monkeypatch, cell)
    step = checkpoint.parts["optimizer"].step

    def killed(*arguments):
        step(*arguments)
        if len(killed.steps) == 4:
            raise KeyboardInterrupt
        killed.steps.append(None)

    killed.steps = []
    monkeypatch.setattr(checkpoint.parts["optimizer"], "step", killed)
    with pytest.raises(KeyboardInterrupt):
        char_lm.train(killed_model, TEXT, 7, checkpoint)

    resumed, checkpoint = new_run(tmp_path / "killed.pt", monkeypatch, cell)
    torch.manual_seed(99)
    assert char_lm.train(resumed, TEXT, 7, checkpoint) == whole
    for ours, theirs in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_streams_read_on_and_targets_are_the_next_characters():
    first, target = TEXT.batch(0)
    second, _ = TEXT.batch(1)
    assert torch.equal(first[:, 1:], target[:, :-1])
    assert torch.equal(second[:, 0], target[:, -1])


def test_a_trigram_model_of_noise_knows_nothing_and_of_a_cycle_everything():
    generator = torch.Generator().manual_seed(0)
    noise = "".join("abcd"[i] for i in torch.randint(4, (40_000,), generator=generator))
    assert char_lm.trigram_nats(char_lm.Text(noise)) == pytest.approx(math.log(4), abs=0.01)
    assert char_lm.trigram_nats(char_lm.Text("abcd" * 9000)) < 0.01


def test_cross_entropy_of_an_untrained_model_is_that_of_the_alphabet(tmp_path, monkeypatch):
    model, _ = new_run(tmp_path / "new.pt", monkeypatch)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert char_lm.unseen_nats(model, TEXT) == pytest.approx(math.log(len(TEXT.alphabet)))
