"""Language model, classifier, sequence to sequence, forecaster."""

from __future__ import annotations

import re

import pytest
import torch

import nnarch

CELLS = ["lstm", "gru", "rnn"]
SMALL = {
    "language_model": {"vocabulary": 11, "embedding": 6, "hidden": 7},
    "classifier": {"vocabulary": 11, "num_classes": 3, "embedding": 6, "hidden": 7},
    "seq2seq": {"source_vocabulary": 11, "target_vocabulary": 9, "embedding": 6, "hidden": 7},
    "forecaster": {"features": 2, "horizon": 5, "hidden": 7},
}
STEPS, BATCH = 6, 3


def twins(cell, model, **options):
    """(ours, the same on torch.nn's layers)."""
    options = {**SMALL[model], **options}
    ours = nnarch.create_model(f"{cell}_{model}", **options).double()
    theirs = nnarch.create_model(f"{cell}_{model}", nn=torch.nn, **options).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def make_inputs(model):
    if model == "forecaster":
        return (torch.randn(STEPS, BATCH, 2, dtype=torch.float64),)
    tokens = torch.randint(9, (STEPS, BATCH))
    return (tokens, torch.randint(9, (4, BATCH))) if model == "seq2seq" else (tokens,)


def logits(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients_equal_those_on_torch_layers(cell, model):
    ours, theirs = twins(cell, model, dropout=0.2)
    inputs = make_inputs(model)
    for mode in (True, False):
        results = []
        for net in (ours.train(mode), theirs.train(mode)):
            torch.manual_seed(1)  # for dropout
            out = logits(net(*inputs))
            net.zero_grad()
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            results.append([out, *[p.grad for p in net.parameters()]])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    assert not any(type(m).__module__.startswith("nnarch.nn") for m in theirs.modules())


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("cell", CELLS)
def test_example_inputs_and_shapes(cell, model):
    info = nnarch.model_info(f"{cell}_{model}")
    inputs = info.example_inputs(2)
    assert len(inputs) == (2 if model == "seq2seq" else 1)
    assert all(x.shape[1] == 2 and x.is_meta and x.dtype == info.input_dtype for x in inputs)
    net, _ = twins(cell, model)
    y = logits(net(*make_inputs(model)))
    assert (
        y.shape
        == {
            "language_model": (STEPS, BATCH, 11),
            "classifier": (BATCH, 3),
            "seq2seq": (4, BATCH, 9),
            "forecaster": (5, BATCH, 2),
        }[model]
    )


@pytest.mark.parametrize("cell", CELLS)
def test_a_language_model_goes_on_from_its_state(cell):
    net, _ = twins(cell, "language_model")
    (tokens,) = make_inputs("language_model")
    whole, _ = net(tokens)
    first, state = net(tokens[:2])
    rest, _ = net(tokens[2:], state)
    torch.testing.assert_close(torch.cat([first, rest]), whole)


def test_tied_weights():
    net = nnarch.create_model(
        "lstm_language_model", vocabulary=11, embedding=7, hidden=7, tied=True
    )
    assert net.decoder.weight is net.encoder.weight
    with pytest.raises(ValueError, match="tied weights need embedding == hidden, got 200, 300"):
        nnarch.create_model("lstm_language_model", hidden=300, tied=True)


@pytest.mark.parametrize("cell", CELLS)
def test_a_classifier_reads_each_sequence_to_its_end(cell):
    net, theirs = twins(cell, "classifier")
    (tokens,) = make_inputs("classifier")
    lengths = torch.tensor([2, 6, 1])
    y = net(tokens, lengths)
    torch.testing.assert_close(y, theirs(tokens, lengths), rtol=1e-10, atol=1e-12)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(y[b], net(tokens[:length, b : b + 1])[0])


@pytest.mark.parametrize("cell", CELLS)
def test_generation_is_the_greedy_path_of_the_decoder(cell):
    net, _ = twins(cell, "seq2seq")
    source, _ = make_inputs("seq2seq")
    written = net.generate(source, start=0, length=5)
    target = torch.cat([torch.zeros(1, BATCH, dtype=torch.int64), written[:-1]])
    assert torch.equal(net(source, target).argmax(-1), written)
    assert not torch.equal(net.encode(source)[0], net.encode(source.flip(0))[0])


def test_learning_to_reverse():
    """Four tokens written backwards, which needs all of the encoder's state."""
    torch.manual_seed(0)
    net = nnarch.create_model(
        "gru_seq2seq", source_vocabulary=5, target_vocabulary=5, embedding=16, hidden=48, layers=1
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(200):
        source = torch.randint(1, 5, (4, 64))
        target = torch.cat([torch.zeros(1, 64, dtype=torch.int64), source.flip(0)])
        out = net(source, target[:-1]).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(out, target[1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source = torch.randint(1, 5, (4, 64))
    assert (net.eval().generate(source, 0, 4) == source.flip(0)).float().mean() > 0.95


def test_unknown_cells():
    from nnarch.models.forecaster import Forecaster

    with pytest.raises(ValueError, match="cell must be one of lstm, gru, rnn, got 'mgu'"):
        Forecaster("mgu")


def test_recurrent_layers_in_a_summary():
    """Multiply-adds of the gates: every row meets both weights, and the projection."""
    net = torch.nn.Sequential(torch.nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2))
    (row,) = nnarch.summary(net, (7, 4, 3)).rows
    layer1, layer2 = 20 * (3 + 2) + 5 * 2, 20 * (4 + 2) + 5 * 2
    assert row.macs == 7 * 4 * 2 * (layer1 + layer2)
    assert row.output_shape == (7, 4, 4)
    (row,) = nnarch.summary(nnarch.nn.GRUCell(3, 5), (4, 3)).rows
    assert row.macs == 4 * 15 * (3 + 5)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    rows = nnarch.summary(_Packing(), packed.data).rows
    assert rows[0].macs == 5 * 15 * (3 + 5)
    assert re.search("GRU", str(rows[0]))


class _Packing(torch.nn.Module):
    """A layer that gets a packed sequence and returns one."""

    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.GRU(3, 5)

    def forward(self, data):
        sizes = torch.tensor([2, 2, 1])
        return self.rnn(torch.nn.utils.rnn.PackedSequence(data, sizes))[0].data
