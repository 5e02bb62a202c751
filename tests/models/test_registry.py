"""create_model, list_models, model_info."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import nnarch
from nnarch.models.registry import register_model

IMAGENET = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "mobilenet_v2": 3_504_872,
}


@pytest.mark.parametrize(("name", "parameters"), IMAGENET.items())
def test_published_parameter_counts(name, parameters):
    assert nnarch.model_info(name).parameters == parameters


@pytest.mark.parametrize("name", nnarch.list_models())
def test_facts_are_those_of_the_model(name):
    info = nnarch.model_info(name)
    with torch.device("meta"):
        model = nnarch.create_model(name)
        inputs = info.example_inputs(device="meta")
    table = nnarch.summary(model, inputs)
    assert model.training
    assert sum(p.numel() for p in model.parameters()) == info.parameters == table.parameters
    assert (table.macs, table.flops) == (info.macs, info.flops)
    assert table.rows[-1].output_shape[-1] == info.num_classes
    assert re.search(r", (19|20)\d\d, ", info.paper)
    assert (info.top1 is None) == (info.reference == "")


def test_published_multiply_adds():
    # torchvision's table and TensorFlow-Slim's, in their precision.
    billions = {"resnet18": 1.814, "resnet50": 4.089, "resnet152": 11.514, "mobilenet_v2": 0.301}
    billions |= {"mobilenet_v2_x0_5": 0.097, "mobilenet_v2_x1_4": 0.582}
    for name, expected in billions.items():
        assert round(nnarch.model_info(name).macs / 1e9, 3) == expected


def test_list_models():
    resnets = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    assert nnarch.list_models("resnet*") == resnets
    assert nnarch.list_models("*_resnet*")[0] == "cifar_resnet20"
    assert set(resnets) < set(nnarch.list_models())
    assert nnarch.list_models("no such") == []


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"create_model: no model is called 'resnet5'; did you me"):
        nnarch.create_model("resnet5")
    with pytest.raises(ValueError, match=r"model_info: .* list_models\(\) shows all names"):
        nnarch.model_info("?")
    with pytest.raises(TypeError, match="create_model: resnet18 has no option 'depth'"):
        nnarch.create_model("resnet18", depth=3)
    with pytest.raises(TypeError, match="mobilenet_v2_x0_5 settles by its name 'width_mult'"):
        nnarch.create_model("mobilenet_v2_x0_5", width_mult=0.5)
    with pytest.raises(TypeError, match="nn must be a namespace of layers, got 3"):
        nnarch.create_model("resnet18", nn=3)


@pytest.mark.parametrize("classes", [0, -3, 2.5, True, None, "10"])
def test_numbers_of_classes(classes):
    with pytest.raises(ValueError, match="num_classes must be a positive int"):
        nnarch.create_model("resnet18", num_classes=classes)


def test_info_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        nnarch.model_info("resnet18").parameters = 1


def test_a_name_is_registered_once():
    def resnet18():
        raise AssertionError

    with pytest.raises(ValueError, match="'resnet18' is registered twice"):
        register_model(paper="", input_size=(1, 1, 1), num_classes=1, parameters=0, macs=0)(
            resnet18
        )
