"""On a real GPU: every public operation and both kinds of model, against torch in float64.

Elsewhere the same kernels are interpreted (test_interpreted.py) and compiled (test_static.py).
"""

import pytest
import torch
from tolerances import assert_as_accurate

import nnarch
from nnarch import functional as F
from nnarch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

torch_nn = torch.nn

# Layers that exist in both namespaces, with the size of one input.
LAYERS = {
    "conv 1x1": (lambda n: n.Conv2d(64, 96, 1), (2, 64, 14, 14)),
    "conv 3x3": (lambda n: n.Conv2d(33, 65, 3, padding=1), (2, 33, 17, 19)),
    "conv 3x3 s2 dilated": (lambda n: n.Conv2d(16, 24, 3, stride=2, dilation=2), (2, 16, 23, 21)),
    "conv groups": (lambda n: n.Conv2d(24, 36, 3, groups=3), (2, 24, 13, 13)),
    "stem": (lambda n: n.Conv2d(3, 64, 7, stride=2, padding=3), (2, 3, 61, 59)),
    "depthwise": (lambda n: n.Conv2d(40, 80, 5, padding=2, groups=40), (2, 40, 15, 15)),
    "transposed": (lambda n: n.ConvTranspose2d(33, 40, 4, 2, 1), (2, 33, 9, 7)),
    "transposed 3x3": (lambda n: n.ConvTranspose2d(24, 36, 3, 2, 1, 1, 3), (2, 24, 9, 7)),
    "transposed to an image": (lambda n: n.ConvTranspose2d(64, 3, 4, 2, 1), (2, 64, 16, 16)),
    "signal": (lambda n: n.Conv1d(33, 40, 3, padding="same"), (2, 33, 100)),
    "transposed signal": (lambda n: n.ConvTranspose1d(33, 40, 4, 2, 1), (2, 33, 50)),
    "linear": (lambda n: n.Linear(130, 70), (9, 130)),
    "max pool": (lambda n: n.MaxPool2d(3, 2, 1), (2, 17, 25, 25)),
    "average pool": (lambda n: n.AvgPool2d(3, 2, 1), (2, 17, 25, 25)),
    "adaptive average": (lambda n: n.AdaptiveAvgPool2d((3, 1)), (2, 17, 25, 25)),
    "batch norm": (lambda n: n.BatchNorm2d(17), (5, 17, 9, 9)),
    "nearest": (lambda n: n.Upsample(scale_factor=2), (2, 17, 9, 11)),
    "bilinear": (lambda n: n.Upsample((25, 13), mode="bilinear"), (2, 17, 9, 11)),
    "LRN": (lambda n: n.LocalResponseNorm(5, 0.5), (2, 17, 9, 11)),
    "gelu": (lambda n: n.GELU(), (5, 1023)),
}


def _outputs(module, x):
    x = x.detach().requires_grad_()
    y = module(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    y.backward(weight.to(y))
    return {"y": y, "x.grad": x.grad} | {n: p.grad for n, p in module.named_parameters()}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_forward_and_backward(name, memory_format):
    build, size = LAYERS[name]
    twin, exact, ours = build(torch_nn), build(torch_nn).double(), build(nn)
    ours.load_state_dict(twin.state_dict())
    exact.load_state_dict(twin.state_dict())
    x = torch.randn(size)
    truth = _outputs(exact, x.double())
    if len(size) == 4:
        x = x.contiguous(memory_format=memory_format)
    expected = _outputs(twin.cuda(), x.cuda())
    with nnarch.trace() as record:
        got = _outputs(ours.cuda(), x.cuda())

    assert {entry.backend for entry in record} == {"triton"}
    for key, value in got.items():
        assert_as_accurate(value.cpu(), expected[key].cpu(), truth[key].detach(), what=key)


def test_fused_epilogue():
    x, w = torch.randn(2, 32, 14, 14), torch.randn(48, 32, 3, 3)
    scale, shift, residual = torch.rand(48), torch.randn(48), torch.randn(2, 48, 14, 14)
    got, torchs, truth = (
        op(*(t.to(device, dtype) for t in (x, w, scale, shift, residual)))
        for op, device, dtype in (
            (_fused, "cuda", torch.float32),
            (_unfused, "cuda", torch.float32),
            (_unfused, "cpu", torch.float64),
        )
    )
    assert_as_accurate(got.cpu(), torchs.cpu(), truth)


def _fused(x, w, scale, shift, residual):
    return F.conv2d(x, w, padding=1, scale=scale, shift=shift, residual=residual, activation="relu")


def _unfused(x, w, scale, shift, residual):
    y = torch.nn.functional.conv2d(x, w, padding=1)
    return (y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + residual).relu()


@pytest.mark.parametrize("tile", [2, 4])
def test_winograd(tile, monkeypatch):
    """Both tiles, forward and backward, at a size that fills the GPU."""
    launchers = pytest.importorskip("nnarch.kernels.conv2d.triton_kernel")
    monkeypatch.setattr(launchers, "choose_tile", lambda _: tile)
    monkeypatch.setattr(launchers, "choose_weight_grad", lambda _: True)
    x = torch.randn(4, 96, 35, 37).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(80, 96, 3, 3) * (2 / (9 * 96)) ** 0.5
    grad = torch.randn(4, 80, 35, 37)

    def convolve(op, device, dtype):
        a, b = (t.to(device, dtype).requires_grad_() for t in (x, weight))
        y = op(a, b, padding=1)
        return y.detach().cpu(), *(
            g.cpu() for g in torch.autograd.grad(y, (a, b), grad.to(device, dtype))
        )

    truth = convolve(torch.nn.functional.conv2d, "cpu", torch.float64)
    with nnarch.trace() as record:
        got = convolve(F.conv2d, "cuda", torch.float32)
    algorithms = {entry.algorithm for entry in record}
    assert algorithms == {f"winograd_{tile}x{tile}", "winograd_weight_grad"}
    for value, exact in zip(got, truth, strict=True):
        assert (value - exact).abs().max() <= 5e-6 * exact.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_accelerated_model(name):
    twin = nnarch.create_model(name, nn=torch_nn).eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        truth = twin.double()(x.double())
        twin = twin.float().cuda()
        expected = twin(x.cuda())
        got = nnarch.accelerate(twin)(x.cuda())
    error = (got.cpu() - truth).norm() / truth.norm()
    torchs = (expected.cpu() - truth).norm() / truth.norm()
    assert error <= 4 * torchs + 5e-6  # what Winograd may add (ADR 7)


RECURRENT = {
    "lstm": (F.lstm_layer, torch_nn.LSTM),
    "gru": (F.gru_layer, torch_nn.GRU),
    "rnn": (F.rnn_layer, torch_nn.RNN),
}


@pytest.mark.parametrize("batch, hidden", [(5, 48), (3, 300), (70, 300), (300, 1024)])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layer(name, batch, hidden):
    """Each algorithm: small, persistent, one cooperative launch of all steps, a launch a step."""
    layer, Twin = RECURRENT[name]
    twin = Twin(40, hidden)
    x = torch.randn(7, batch, 40)

    def torchs(device, dtype):
        module = twin.to(device, dtype)
        y, _ = module(x.to(device, dtype))
        grads = torch.autograd.grad(y.square().sum(), list(module.parameters()))
        return [t.detach().cpu() for t in (y, *grads)]

    truth = torchs("cpu", torch.float64)
    expected = torchs("cuda", torch.float32)
    weights = [p.detach().cuda().requires_grad_() for p in twin.float().parameters()]
    with nnarch.trace() as record:
        y, *_ = layer(x.cuda(), *weights)
        grads = torch.autograd.grad(y.square().sum(), weights)
    assert {entry.backend for entry in record} == {"triton"}
    expected_algorithm = {5: "small", 3: "persistent"}.get(batch, "step")
    assert next(iter(record)).algorithm == expected_algorithm
    for three in zip([y, *grads], expected, truth, strict=True):
        assert_as_accurate(three[0].detach().cpu(), *three[1:])


def test_half_precision():
    conv = nn.Conv2d(64, 64, 3, padding=1).cuda().half().eval()
    x = torch.randn(2, 64, 14, 14, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        got = conv(x)
        truth = torch.nn.functional.conv2d(
            x.cpu().double(), conv.weight.cpu().double(), conv.bias.cpu().double(), padding=1
        )
    assert_as_accurate(got.cpu(), truth.half(), truth)


def test_compiles_without_graph_breaks():
    conv = nn.Conv2d(8, 8, 3).cuda().eval()
    x = torch.randn(1, 8, 9, 9, device="cuda")
    with torch.no_grad():
        compiled = torch.compile(conv, fullgraph=True)(x)
        assert torch.equal(compiled, conv(x))
