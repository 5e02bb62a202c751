"""MobileNetV2 against torchvision, at every width."""

from __future__ import annotations

import pytest
import torch

from nnarch import create_model
from nnarch.models.mobilenet_v2 import make_divisible

torchvision = pytest.importorskip("torchvision")


def shapes(model):
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items()]


@pytest.mark.parametrize("width", [0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.3, 1.4, 2.0])
def test_state_dict_is_torchvisions(width):
    with torch.device("meta"):
        ours = create_model("mobilenet_v2", width_mult=width)
        theirs = torchvision.models.mobilenet_v2(width_mult=width)
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [
        ("mobilenet_v2_x0_25", 0.25, 1_519_112),
        ("mobilenet_v2_x0_5", 0.5, 1_968_680),
        ("mobilenet_v2_x0_75", 0.75, 2_636_424),
        ("mobilenet_v2", 1.0, 3_504_872),
        ("mobilenet_v2_x1_4", 1.4, 6_108_776),
    ],
)
def test_widths_by_name(name, width, parameters):
    with torch.device("meta"):
        model = create_model(name)
        assert shapes(model) == shapes(create_model("mobilenet_v2", width_mult=width))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_initialisation_is_torchvisions():
    torch.manual_seed(3)
    theirs = torchvision.models.mobilenet_v2().state_dict()
    torch.manual_seed(3)
    ours = create_model("mobilenet_v2").state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_where_blocks_add_their_input():
    model = create_model("mobilenet_v2")
    adds = [block.adds_input for block in list(model.features)[1:-1]]
    # All blocks of a stage but its first: 1, 2, 3, 4, 3, 3 and 1 blocks.
    expected = [i > 0 for blocks in (1, 2, 3, 4, 3, 3, 1) for i in range(blocks)]
    assert adds == expected


def test_options():
    model = create_model(
        "mobilenet_v2", num_classes=5, dropout=0.5, width_mult=0.3, round_nearest=4
    )
    assert model.classifier[0].p == 0.5
    assert model.classifier[1].out_features == 5
    assert model.features[0][0].out_channels == make_divisible(9.6, 4)
    with pytest.raises(ValueError, match="MobileNetV2: width_mult must be positive, got 0"):
        create_model("mobilenet_v2", width_mult=0)


@pytest.mark.parametrize(
    ("channels", "divisor", "expected"),
    [(32, 8, 32), (24 * 0.35, 8, 8), (11, 8, 16), (3, 8, 8), (18, 8, 24), (17, 8, 16), (20, 1, 20)],
)
def test_channels_never_fall_below_nine_tenths(channels, divisor, expected):
    assert make_divisible(channels, divisor) == expected
