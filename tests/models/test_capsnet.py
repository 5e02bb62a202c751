"""CapsNet: counts, both layouts, both conventions of the gradient, XifengGuo's checkpoints."""

from __future__ import annotations

import pytest
import torch

import nnarch
from nnarch.models.capsnet import CapsNet
from nnarch.objectives import CapsuleLoss


def test_published_counts():
    with torch.device("meta"):
        net = nnarch.create_model("capsnet")
    decoder = sum(p.numel() for p in net.decoder.parameters())
    total = sum(p.numel() for p in net.parameters())
    assert (total - decoder, decoder, total) == (6_804_224, 1_411_344, 8_215_568)


def test_names_of_xifengguo_s_checkpoints():
    with torch.device("meta"):
        state = nnarch.create_model("capsnet").state_dict()
    names = {
        "conv1.weight": (256, 1, 9, 9),
        "conv1.bias": (256,),
        "primarycaps.conv2d.weight": (256, 256, 9, 9),
        "primarycaps.conv2d.bias": (256,),
        "digitcaps.weight": (10, 1152, 16, 8),
        "decoder.0.weight": (512, 160),
        "decoder.0.bias": (512,),
        "decoder.2.weight": (1024, 512),
        "decoder.2.bias": (1024,),
        "decoder.4.weight": (784, 1024),
        "decoder.4.bias": (784,),
    }
    assert {name: tuple(t.shape) for name, t in state.items()} == names


def _xifengguo(state, x, y):
    """CapsNet-Pytorch's forward, from its description: lengths and reconstruction."""
    nf = torch.nn.functional

    def squash(t):
        norm = torch.norm(t, dim=-1, keepdim=True)
        return norm**2 / (1 + norm**2) * t / (norm + 1e-8)

    h = nf.relu(nf.conv2d(x, state["conv1.weight"], state["conv1.bias"]))
    h = nf.conv2d(h, state["primarycaps.conv2d.weight"], state["primarycaps.conv2d.bias"], 2)
    u = squash(h.contiguous().view(x.shape[0], -1, 8))
    hat = (state["digitcaps.weight"] @ u[:, None, :, :, None]).squeeze(-1)
    b = torch.zeros(hat.shape[:3], dtype=x.dtype)
    for i in range(3):
        c = b.softmax(1)
        v = squash((c[..., None] * (hat if i == 2 else hat.detach())).sum(-2, keepdim=True))
        b = b + (v * hat.detach()).sum(-1) if i < 2 else b
        b = b.detach()
    v = v.squeeze(-2)
    h = (v * nf.one_hot(y, 10)[..., None]).flatten(1)
    for i in (0, 2):
        h = nf.relu(nf.linear(h, state[f"decoder.{i}.weight"], state[f"decoder.{i}.bias"]))
    h = nf.linear(h, state["decoder.4.weight"], state["decoder.4.bias"]).sigmoid()
    return v.norm(dim=-1), h.view(x.shape)


def _strong(net):
    """Weights with which routing is far from uniform."""
    with torch.no_grad():
        net.digitcaps.weight.mul_(40)
        net.conv1.weight.mul_(4)
        net.primarycaps.conv2d.weight.mul_(4)
    return net


def test_quarter_width_computes_what_xifengguo_s_does():
    """Outputs and gradients, in float64: layout and detached routing are its defaults."""
    net = _strong(nnarch.create_model("capsnet_x0_25").double())
    x, y = torch.rand(3, 1, 28, 28, dtype=torch.float64), torch.tensor([3, 0, 9])
    state = {k: t.detach().clone().requires_grad_() for k, t in net.state_dict().items()}
    lengths, images = net.reconstruct(x, y)
    expected = _xifengguo(state, x, y)
    torch.testing.assert_close((lengths, images), expected, rtol=1e-6, atol=1e-8)
    CapsuleLoss()(lengths, y, images, x).backward()
    CapsuleLoss()(expected[0], y, expected[1], x).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-5, atol=1e-9, msg=name)


@pytest.mark.parametrize("layout", ["spatial", "channels"])
@pytest.mark.parametrize("detach", [False, True])
def test_the_twin_in_plain_torch(layout, detach):
    options = {"width": 0.0625, "capsule_layout": layout, "detach_routing": detach}
    ours, twin = CapsNet(**options), CapsNet(**options, nn=torch.nn)
    twin.load_state_dict(ours.state_dict())
    _strong(ours), _strong(twin)
    x, y = torch.rand(2, 1, 28, 28), torch.tensor([1, 7])
    for net in (ours, twin):
        lengths, images = net.reconstruct(x, y)
        CapsuleLoss()(lengths, y, images, x).backward()
    torch.testing.assert_close(ours(x), twin(x))
    for (name, a), b in zip(ours.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_options_differ():
    """Layouts give other outputs, conventions of the gradient other gradients."""
    x, results = torch.rand(2, 1, 28, 28), {}
    for layout, detach in (("spatial", True), ("spatial", False), ("channels", True)):
        torch.manual_seed(1)
        net = _strong(CapsNet(width=0.0625, capsule_layout=layout, detach_routing=detach))
        lengths = net(x)
        lengths.square().sum().backward()
        results[layout, detach] = (lengths.detach(), net.digitcaps.weight.grad)
    same, other = results["spatial", False], results["channels", True]
    assert torch.equal(results["spatial", True][0], same[0])
    assert not torch.allclose(results["spatial", True][1], same[1], rtol=1e-2)
    assert not torch.allclose(results["spatial", True][0], other[0], rtol=1e-2)


def test_convolutional_capsules_learn():
    torch.manual_seed(0)
    net = nnarch.create_model("conv_capsnet")
    x, y = torch.rand(8, 1, 28, 28), torch.arange(8)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        lengths, images = net.reconstruct(x, y)
        loss = CapsuleLoss()(lengths, y, images, x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert images.shape == x.shape
    assert losses[-1] < 0.9 * losses[0]


def test_convolutional_capsules_without_kernels():
    """On torch.nn, with the same weights: the same lengths and gradients."""
    ours = nnarch.create_model("conv_capsnet").double()
    theirs = nnarch.create_model("conv_capsnet", nn=torch.nn).double()
    theirs.load_state_dict(ours.state_dict())
    with nnarch.trace() as trace:
        truth = theirs(torch.rand(1, 1, 28, 28, dtype=torch.float64))
    assert not list(trace)
    x, y = torch.rand(3, 1, 28, 28, dtype=torch.float64), torch.tensor([1, 5, 9])
    (mine, image), (truth, other) = ours.reconstruct(x, y), theirs.reconstruct(x, y)
    torch.testing.assert_close([mine, image], [truth, other])
    (mine.sin().sum() + image.sum()).backward(), (truth.sin().sum() + other.sum()).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_bad_options():
    with pytest.raises(ValueError, match="images of at least 17×17"):
        CapsNet(image_size=(1, 16, 28))
