"""On a real GPU: accelerated and compiled modules, autocast, CUDA graphs, streams, devices."""

import copy

import pytest
import torch
from on_a_gpu import DEVICE, MARKS, assert_ran, by_dtype, direction
from tolerances import assert_as_accurate

import nnarch
from nnarch import functional as F
from nnarch import nn

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:enable_nested_tensor")]

real = pytest.mark.skipif(DEVICE != "cuda", reason="is about CUDA itself")
torch_nn = torch.nn


def resnet18():
    return nnarch.create_model("resnet18", nn=torch_nn), torch.randn(2, 3, 97, 97)


def encoder():
    layer = torch_nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")
    model = torch_nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, torch.randn(3, 33, 64)


class Tagger(torch_nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = torch_nn.LSTM(32, 48, 2, batch_first=True, bidirectional=True)
        self.out = torch_nn.Linear(96, 7)

    def forward(self, x):
        return self.out(self.lstm(x)[0])


def tagger():
    return Tagger(), torch.randn(5, 9, 32)


@pytest.mark.parametrize("build", [resnet18, encoder, tagger])
@by_dtype
def test_accelerate(build, dtype):
    model, x = build()
    model, x = model.to(dtype).eval(), x.to(dtype)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(x.double())
        expected = copy.deepcopy(model).to(DEVICE)(x.to(DEVICE))
        fast = nnarch.accelerate(copy.deepcopy(model).to(DEVICE))
        with nnarch.trace() as record:
            got = fast(x.to(DEVICE))
    assert_ran(record)
    for module in fast.modules() if DEVICE == "cuda" else ():
        if isinstance(module, torch_nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
    error, torchs = ((y.cpu().double() - truth).norm() / truth.norm() for y in (got, expected))
    # What Winograd may add (ADR 7), and folding BatchNorm into weights of half precision.
    assert error <= 4 * torchs + 4 * torch.finfo(dtype).eps + 5e-6
    with torch.no_grad():  # other shapes, and the first ones again
        other = torch.cat([x, x])[:3].to(DEVICE)
        torch.testing.assert_close(fast(other)[: len(x)], got[:3], rtol=0.05, atol=0.05)
        assert torch.equal(fast(x.to(DEVICE)), got)


def test_accelerated_and_moved():
    """A model that was accelerated on the CPU, where weights are packed, and then moved."""
    model, x = encoder()
    fast = nnarch.accelerate(model.eval())
    with torch.no_grad():
        expected = fast(x)
        with nnarch.trace() as record:
            got = fast.to(DEVICE)(x.to(DEVICE))
        assert_ran(record)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fast.cpu()(x), expected)


class Block(nn.Module):
    """Of a language model: what is compiled in one graph, and captured in a CUDA graph."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.norm, self.after = nn.RMSNorm(64), nn.LayerNorm(64)
        self.qkv, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.forth = nn.GatedFeedForward(64, 128)

    def forward(self, tokens):
        x = self.embedding(tokens)
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 4, 16).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.forth(self.after(x))


def test_compile_in_one_graph():
    block, tokens = Block().to(DEVICE), torch.randint(50, (2, 21), device=DEVICE)
    weights = list(block.parameters())
    found = []
    for module in (torch.compile(block, fullgraph=True), block):
        y = module(tokens)
        found.append([y, *torch.autograd.grad(y.square().mean(), weights)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


AUTOCAST = {
    "linear": lambda n: (n.Linear(33, 40), torch.randn(5, 33)),
    "convolution": lambda n: (n.Conv2d(16, 24, 3), torch.randn(2, 16, 9, 9)),
    "layer norm": lambda n: (n.Sequential(n.Linear(32, 48), n.LayerNorm(48)), torch.randn(5, 32)),
    "encoder": lambda n: (
        n.TransformerEncoderLayer(64, 4, 96, 0.0, batch_first=True),
        torch.randn(2, 17, 64),
    ),
    "lstm": lambda n: (n.LSTM(24, 40), torch.randn(5, 3, 24)),
}


@pytest.mark.parametrize("name", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(name, dtype):
    if DEVICE == "cpu" and (name, dtype) == ("lstm", torch.float16):
        pytest.skip("torch has none on the CPU")
    (ours, x), (twin, _) = (AUTOCAST[name](n) for n in (nn, torch.nn))
    ours.load_state_dict(twin.state_dict())
    found = []
    for module, device, autocast in (
        (ours, DEVICE, True),
        (copy.deepcopy(twin), DEVICE, True),
        (twin.double(), "cpu", False),
    ):
        module = module.to(device)
        here = x.to(device, torch.float32 if autocast else torch.float64).requires_grad_()
        with torch.autocast(device, dtype, enabled=autocast), nnarch.trace() as record:
            y = module(here)
        y = y[0] if isinstance(y, tuple) else y
        if module is ours:
            assert_ran(record)
        parameters = list(module.parameters())
        grads = torch.autograd.grad(y, [here, *parameters], direction(y))
        found.append([t.detach().cpu() for t in (y, *grads)])
    for mine, theirs, truth in zip(*found, strict=True):
        # On the CPU, where autocast leaves LayerNorm alone, ours add the residual in half.
        # torch's LSTM on CUDA is float16 under any autocast.
        cudnn = (name, DEVICE, dtype) == ("lstm", "cuda", torch.bfloat16)
        assert mine.dtype == theirs.dtype or cudnn or (name, DEVICE) == ("encoder", "cpu")
        # Gradients are float32 sums of products that were rounded to `dtype`.
        ulps = 16 * torch.finfo(dtype).eps / torch.finfo(theirs.dtype).eps
        assert_as_accurate(mine.to(theirs.dtype), theirs, truth, factor=4, ulps=ulps)


GRAPHS = {
    "block": (Block, lambda: torch.randint(50, (2, 21))),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        lambda: torch.randn(2, 3, 20, 20),
    ),
    "lstm": (lambda: nn.LSTM(24, 40), lambda: torch.randn(6, 10, 24)),
    "lstm of 70 sequences": (lambda: nn.LSTM(24, 200), lambda: torch.randn(6, 70, 24)),
    "persistent gru": (lambda: nn.GRU(24, 200), lambda: torch.randn(6, 3, 24)),
    "capsules": (lambda: nn.DenseCapsules(50, 8, 10, 16), lambda: torch.randn(3, 50, 8)),
}


@real
@pytest.mark.parametrize("name", GRAPHS)
def test_cuda_graph(name):
    """A captured call reads its static input anew at every replay."""
    build, draw = GRAPHS[name]
    module, static = build().to(DEVICE).eval(), draw().to(DEVICE)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles
            module(static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = module(static)
        y = y[0] if isinstance(y, tuple) else y
        for _ in range(2):
            static.copy_(draw())
            graph.replay()
            expected = module(static)
            expected = expected[0] if isinstance(expected, tuple) else expected
            assert torch.equal(y, expected)


@real
def test_a_captured_dropout_draws_anew():
    module, x = nn.Dropout(0.5), torch.ones(1000, device=DEVICE)
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
    assert 350 < int((y == 0).sum()) < 650


@real
@pytest.mark.parametrize("name", GRAPHS)
def test_a_stream_of_ones_own(name):
    """Kernels run on torch's current stream: behind work that delays the input there."""
    build, draw = GRAPHS[name]
    module, values = build().to(DEVICE).eval(), draw().to(DEVICE)
    with torch.no_grad():
        expected = module(values)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            late = torch.zeros_like(values)
            torch.cuda._sleep(50_000_000)
            late.copy_(values)
            got = module(late)
        stream.synchronize()
    got, expected = (y[0] if isinstance(y, tuple) else y for y in (got, expected))
    assert torch.equal(got, expected)


MISPLACED = {
    "linear": lambda x, c: F.linear(x(5, 8), c(4, 8)),
    "conv2d": lambda x, c: F.conv2d(x(1, 3, 8, 8), c(4, 3, 3, 3)),
    "layer_norm": lambda x, c: F.layer_norm(x(5, 8), (8,), c(8)),
    "attention": lambda x, c: F.attention(x(1, 2, 5, 8), c(1, 2, 5, 8), c(1, 2, 5, 8)),
    "gated_linear": lambda x, c: F.gated_linear(x(5, 8), c(4, 8), c(4, 8)),
    "cross_entropy": lambda x, c: F.cross_entropy(x(5, 8), torch.zeros(5, dtype=torch.int64)),
    "embedding": lambda x, c: F.embedding(torch.zeros(5, dtype=torch.int64).to(DEVICE), c(9, 8)),
    "gru": lambda x, c: F.gru_layer(x(2, 3, 4), c(15, 4), c(15, 5)),
    "capsule_routing": lambda x, c: F.capsule_routing(x(2, 5, 4), c(3, 5, 6, 4)),
}


@real
@pytest.mark.parametrize("op", MISPLACED)
def test_tensors_on_two_devices(op):
    def there(*size):
        return torch.randn(size, device=DEVICE)

    with pytest.raises(ValueError, match=r"\w+: \w+ must be on (cuda:0|cpu) as"):
        MISPLACED[op](there, lambda *size: torch.randn(size))
    with pytest.raises(ValueError, match=r"\w+: \w+ must be on (cuda:0|cpu) as"):
        MISPLACED[op](there, lambda *size: torch.randn(size, requires_grad=True))


def test_other_shapes_after_the_first():
    """Nothing that the first call chose or kept may hold for the second."""
    module = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()).to(DEVICE)
    conv = nn.Conv2d(16, 16, 3, padding=1).to(DEVICE)
    with torch.no_grad():
        for rows in (5, 1, 300, 64, 5):
            x = torch.randn(rows, 64, device=DEVICE)
            expected = torch.nn.functional.linear(x, module[0].weight, module[0].bias)
            expected = torch.nn.functional.gelu(torch.nn.functional.layer_norm(expected, (64,)))
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
            image = torch.randn(1, 16, rows, 7, device=DEVICE)
            torch.testing.assert_close(
                conv(image), torch.nn.Conv2d.forward(conv, image), rtol=5e-3, atol=5e-3
            )
