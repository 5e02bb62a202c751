"""Classifiers, language models, sequence to sequence, forecasters: against torch.nn, and alone."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_as_accurate

import nnarch
from nnarch.models.cells import CELLS
from nnarch.models.registry import model_info

SMALL = {
    "classifier": {"vocabulary": 30, "embedding": 6, "hidden": 9, "layers": 2, "num_classes": 3},
    "language_model": {"vocabulary": 30, "embedding": 6, "hidden": 9},
    "seq2seq": {"vocabulary": 30, "embedding": 6, "hidden": 9},
    "forecaster": {"features": 2, "horizon": 3, "hidden": 9, "layers": 2},
}
NAMES = [f"{cell}_{task}" for cell in CELLS for task in SMALL]


def build(name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return nnarch.create_model(name, **SMALL[name.partition("_")[2]], **options).to(dtype)


def inputs_of(name):
    info = model_info(name)
    if info.vocabulary is None:
        return (torch.randn(4, 11, 2),)
    return tuple(torch.randint(30, (4, 11)) for _ in range(info.inputs))


def outputs_and_gradients(model, inputs):
    inputs = [x if x.dtype == torch.int64 else x.to(next(model.parameters()).dtype) for x in inputs]
    output = model(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    (output * weights).sum().backward()
    return [output, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_torchs(name):
    """Over several samples at once: gradients of biases are small sums of large terms, whose error
    in one sample is a matter of luck, torch's too."""
    samples = [inputs_of(name) for _ in range(6)]

    def of_all(**options):
        each = (outputs_and_gradients(build(name, **options), inputs) for inputs in samples)
        return [torch.stack(results) for results in zip(*each, strict=True)]

    truth = of_all(dtype=torch.float64, nn=torch.nn)
    for found, theirs, exact in zip(of_all(), of_all(nn=torch.nn), truth, strict=True):
        assert_as_accurate(found, theirs, exact)


@pytest.mark.parametrize("cell", CELLS)
def test_a_classifier_reads_only_what_counts(cell):
    model = build(f"{cell}_classifier").eval()
    tokens, lengths = torch.randint(30, (3, 8)), torch.tensor([3, 8, 5])
    found = model(tokens, lengths)
    for i, length in enumerate(lengths.tolist()):
        alone = model(tokens[i : i + 1, :length])
        torch.testing.assert_close(found[i : i + 1], alone)


@pytest.mark.parametrize("cell", CELLS)
def test_a_language_model_reads_on_from_its_state(cell):
    model = build(f"{cell}_language_model").eval()
    tokens = torch.randint(30, (2, 9))
    whole, _ = model(tokens)
    first, state = model(tokens[:, :4])
    second, _ = model(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_tied_weights():
    model = nnarch.create_model(
        "lstm_language_model", vocabulary=30, embedding=9, hidden=9, tied=True
    )
    assert model.output.weight is model.embedding.weight
    with pytest.raises(ValueError, match="tied weights need embedding = hidden, got 6 and 9"):
        nnarch.create_model("lstm_language_model", embedding=6, hidden=9, tied=True)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_what_is_generated_is_what_the_forward_prefers(cell, attention):
    model = build(f"{cell}_seq2seq", attention=attention).eval()
    source = torch.randint(30, (3, 7))
    written = model.generate(source, start=1, end=2, limit=6)
    target = torch.cat([torch.ones(3, 1, dtype=torch.int64), written], 1)
    preferred = model(source, target)[:, :-1].argmax(2)
    for found, likeliest in zip(written.tolist(), preferred.tolist(), strict=True):
        length = found.index(2) + 1 if 2 in found else len(found)
        assert found[:length] == likeliest[:length]
        assert all(token == 2 for token in found[length:])


@pytest.mark.parametrize("cell", CELLS)
def test_padding_of_a_source_changes_nothing(cell):
    model = build(f"{cell}_seq2seq").eval()
    source, target, lengths = torch.randint(30, (2, 7)), torch.randint(30, (2, 4)), [7, 3]
    found = model(source, target, torch.tensor(lengths))
    source[1, 3:] = 0
    assert torch.equal(model(source, target, torch.tensor(lengths)), found)
    torch.testing.assert_close(model(source[1:, :3], target[1:]), found[1:])


def test_a_sentence_that_ends_at_once():
    model = build("gru_seq2seq").eval()
    with torch.no_grad():
        model.output.bias[2] = 1e4
    written = model.generate(torch.randint(30, (3, 7)), start=1, end=2, limit=6)
    assert written.tolist() == [[2]] * 3
    assert model.generate(torch.randint(30, (3, 7)), start=1, end=2, limit=0).shape == (3, 0)


@pytest.mark.parametrize("task", SMALL)
def test_unknown_cells(task):
    kind = type(build(f"gru_{task}"))
    with pytest.raises(ValueError, match="cell must be one of rnn, lstm, gru, got 'rwkv'"):
        kind("rwkv")
