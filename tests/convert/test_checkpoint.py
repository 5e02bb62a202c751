"""Checkpoints: formats, wrappers, and errors that leave the model alone."""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

import nnarch.nn as nn
from nnarch.convert import load_checkpoint, load_weights, read_checkpoint


def make_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2))


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


CONTENTS = {
    "bare": lambda weights: weights,
    "trainer": lambda weights: {"epoch": 3, "state_dict": weights, "optimizer": {"lr": 0.1}},
    "model_state_dict": lambda weights: {"model_state_dict": weights},
    "data_parallel": lambda weights: {f"module.{k}": v for k, v in weights.items()},
    "compiled": lambda weights: {"model": {f"module._orig_mod.{k}": v for k, v in weights.items()}},
}


@pytest.mark.parametrize("content", CONTENTS)
def test_torch_files(tmp_path, content):
    source, target = make_net(), make_net()
    torch.save(CONTENTS[content](source.state_dict()), tmp_path / "weights.pth")
    load_checkpoint(target, tmp_path / "weights.pth")
    assert same(source, target)


def test_safetensors(tmp_path):
    source, target = make_net(), make_net()
    save_file(
        {f"module.{k}": v for k, v in source.state_dict().items()}, tmp_path / "w.safetensors"
    )
    load_checkpoint(target, str(tmp_path / "w.safetensors"))
    assert same(source, target)


def test_files_from_before_batch_counters(tmp_path):
    source, target = make_net(), make_net()
    weights = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    torch.save(weights, tmp_path / "old.pth")
    load_checkpoint(target, tmp_path / "old.pth")
    assert same(source, target)


def test_the_models_dtype_is_kept(tmp_path):
    source, target = make_net(), make_net().double()
    torch.save(source.half().state_dict(), tmp_path / "half.pth")
    load_checkpoint(target, tmp_path / "half.pth")
    assert target[0].weight.dtype == torch.float64
    assert torch.equal(target[0].weight, source[0].weight.double())


def test_packed_weights_follow(tmp_path):
    source, target = make_net().eval(), make_net().eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    x = torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        target[0](x)
        load_checkpoint(target, tmp_path / "w.pth")
        torch.testing.assert_close(target[0](x), source[0](x))


def test_every_difference_is_listed_and_nothing_is_loaded():
    net = make_net()
    before = copy.deepcopy(net)
    weights = {k: v + 1 for k, v in net.state_dict().items()}
    weights["0.weight"] = torch.zeros(4, 3, 5, 5)
    weights["head.bias"] = weights.pop("2.bias")
    with pytest.raises(ValueError, match="does not fit Sequential") as caught:
        load_weights(net, weights, source="some.pth")
    message = str(caught.value)
    assert "some.pth" in message
    assert "0.weight is 4×3×5×5, the model has 4×3×3×3" in message
    assert "2.bias is missing" in message
    assert "head.bias is not in the model" in message
    assert same(net, before)


def test_long_lists_of_differences_are_cut():
    with pytest.raises(ValueError, match=r"and 4 more$"):
        load_weights(make_net(), {f"w{i}": torch.zeros(1) for i in range(2)})


def test_not_strict_loads_what_fits_but_never_wrong_shapes():
    source, target = make_net(), make_net()
    weights = source.state_dict()
    del weights["2.bias"]
    weights["extra"] = torch.zeros(1)
    load_weights(target, weights, strict=False)
    assert torch.equal(target[0].weight, source[0].weight)
    assert not torch.equal(target[2].bias, source[2].bias)
    weights["0.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"0\.weight is 1, the model has"):
        load_weights(target, weights, strict=False)


class Malicious:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pth", lambda p: torch.save({"w": Malicious()}, p), "cannot be read as weights only"),
        (
            "b.pth",
            lambda p: p.write_bytes(pickle.dumps(Malicious(), 2)),
            "cannot be read as weights",
        ),
        ("c.pth", lambda p: p.write_bytes(b"not a checkpoint"), "cannot be read as weights only"),
        ("d.pth", lambda p: p.write_bytes(b""), "weights only: it is damaged, or was not written"),
        ("text.pth", lambda p: p.write_text("hello"), "it is damaged, or was not written"),
        ("zip.pth", lambda p: p.write_bytes(b"PK\x03\x04abc"), "it is damaged, or was not written"),
        ("model.pth", lambda p: torch.save(torch.nn.ReLU(), p), r"it holds a torch.*ReLU; save mo"),
        ("e.safetensors", lambda p: p.write_bytes(b"\0" * 20), "is no safetensors file"),
        ("f.pth", lambda p: torch.save([1, 2], p), "must hold a state_dict .* got a list"),
        ("g.pth", lambda p: torch.save({"epoch": 3}, p), "got a mapping with 'epoch'"),
        ("h.pth", lambda p: torch.save({}, p), "got an empty mapping"),
    ],
)
def test_files_that_are_no_weights(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        read_checkpoint(tmp_path / name)
    assert name in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_checkpoint(make_net(), tmp_path / "nothing.pth")
