"""Residual networks against torchvision and against the paper's numbers."""

from __future__ import annotations

import pytest
import torch

import nnarch.nn
from nnarch import create_model
from nnarch.models.resnet import CifarResNet

torchvision = pytest.importorskip("torchvision")

IMAGENET = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def shapes(model):
    return [(name, tuple(value.shape)) for name, value in model.state_dict().items()]


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", IMAGENET)
def test_state_dict_is_torchvisions(name):
    with torch.device("meta"):
        assert shapes(create_model(name)) == shapes(getattr(torchvision.models, name)())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_initialisation_is_torchvisions(name):
    torch.manual_seed(3)
    theirs = getattr(torchvision.models, name)(zero_init_residual=True).state_dict()
    torch.manual_seed(3)
    ours = create_model(name, zero_init_residual=True).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize(
    ("depth", "option_a"),
    [
        (20, 269_722),
        (32, 464_154),
        (44, 658_586),
        (56, 853_018),
        (110, 1_727_962),
        pytest.param(1202, 19_421_274, marks=pytest.mark.slow),
    ],
)
def test_cifar_parameter_counts(depth, option_a, shortcut):
    # Option B projects twice: 16 to 32 and 32 to 64 channels, each with BatchNorm's two values.
    # Option C projects in every other block too.
    blocks = (depth - 2) // 6
    widths = {16: blocks, 32: blocks - 1, 64: blocks - 1}
    projections = {
        "A": 0,
        "B": 2_752,
        "C": 2_752 + sum(n * (w * w + 2 * w) for w, n in widths.items()),
    }
    with torch.device("meta"):
        model = create_model(f"cifar_resnet{depth}", shortcut=shortcut)
    assert parameters(model) == option_a + projections[shortcut]


def strides_of_first_bottleneck(model):
    block = model.layer2[0]
    return block.conv1.stride[0], block.conv2.stride[0], block.conv3.stride[0]


def test_where_a_bottleneck_strides():
    with torch.device("meta"):
        published, paper = create_model("resnet50"), create_model("resnet50", stride_on_1x1=True)
    assert strides_of_first_bottleneck(published) == (1, 2, 1)
    assert strides_of_first_bottleneck(paper) == (2, 1, 1)
    assert shapes(published) == shapes(paper)
    x = torch.empty(2, 3, 64, 64, device="meta")
    assert paper.eval()(x).shape == (2, 1000)


def test_option_a_pads_channels_with_zeros_and_subsamples():
    model = create_model("cifar_resnet20").eval()
    x = torch.randn(2, 16, 8, 8)
    y = model.layer2[0].downsample(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert y.shape == (2, 32, 4, 4)
    assert not y[:, 16:].any()
    assert model.layer1[0].downsample is None


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_shortcut_options_of_the_imagenet_family(shortcut):
    with torch.device("meta"):
        model = create_model("resnet18", shortcut=shortcut, num_classes=7).eval()
        assert model(torch.empty(1, 3, 65, 67)).shape == (1, 7)
    projected = [n for n, m in model.named_modules() if n.endswith("downsample.0")]
    assert len(projected) == {"A": 0, "B": 3, "C": 8}[shortcut]


def test_our_layers_and_torchs_make_the_same_model():
    ours = create_model("cifar_resnet20", shortcut="B").eval()
    twin = create_model("cifar_resnet20", shortcut="B", nn=torch.nn).eval()
    twin.load_state_dict(ours.state_dict())
    assert not any(type(m).__module__.startswith("nnarch.nn") for m in twin.modules())
    assert all(
        type(m).__module__.startswith("nnarch")
        for m in ours.modules()
        if isinstance(m, torch.nn.Conv2d | torch.nn.Linear | torch.nn.BatchNorm2d)
    )
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), twin(x), rtol=1e-4, atol=1e-5)


def test_zero_init_residual_starts_blocks_as_the_identity():
    block = create_model("cifar_resnet20", zero_init_residual=True).layer1[0].eval()
    x = torch.rand(1, 16, 5, 5)
    with torch.no_grad():
        assert torch.equal(block(x.clone()), x)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CifarResNet(21), r"CifarResNet: depth must be 6n \+ 2 with n >= 1, got 21"),
        (lambda: CifarResNet(2), "depth must be"),
        (lambda: CifarResNet(20, shortcut="D"), "CifarResNet: shortcut must be 'A', 'B' or 'C'"),
        (lambda: create_model("resnet18", shortcut="b"), "ResNet: shortcut must be"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_default_namespace_is_nnarch():
    with torch.device("meta"):
        assert type(create_model("resnet18").conv1) is nnarch.nn.Conv2d
