"""torch.compile, torch.export, functorch, autocast and copies of a network of ours."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tolerances import assert_as_accurate
from torch import Tensor
from torch.autograd import forward_ad

from nnarch import functional as F
from nnarch import nn


class Net(torch.nn.Module):
    """Every family of operations once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.pointwise = nn.Conv2d(12, 16, 1)
        self.act = nn.SiLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.pool(self.act(self.pointwise(self.depthwise(x))))
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


@pytest.fixture
def net() -> Net:
    return Net()


def _step(function, net: Net, x: Tensor) -> list[Tensor]:
    """The output and the gradients of x and of all parameters."""
    y = function(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True])
def test_compile(net, backend, training):
    net.train(training)
    x = torch.randn(2, 3, 16, 18, requires_grad=True)
    state = copy.deepcopy(net.state_dict())
    expected = _step(net, net, x)
    net.load_state_dict(state)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    torch.testing.assert_close(_step(compiled, net, x), expected, rtol=1e-4, atol=1e-5)


def test_compile_losses_with_symbols():
    """Numbers become symbols with dynamic=True."""
    torch._dynamo.reset()

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(x, target, label_smoothing=0.1, z_loss=0.2)

    x, target = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    compiled = torch.compile(loss, dynamic=True, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), loss(x, target))


def test_compile_with_dynamic_batch(net):
    net.eval()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 16, 16)
        torch.testing.assert_close(compiled(x), net(x))


def test_export(net):
    net.eval()
    x = torch.randn(2, 3, 16, 16)
    program = torch.export.export(net, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    for op in ("conv2d", "depthwise_conv2d", "max_pool2d_taps", "linear"):
        assert f"nnarch.{op}.default" in targets
    torch.testing.assert_close(program.module()(x), net(x))


def test_copies(net):
    net.eval()
    x = torch.randn(2, 3, 16, 16)
    y = net(x)  # packed weights exist from now on
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), y)
    other = Net().eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), y)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap runs one by one
class TestFunctorch:
    """torch.func.grad, vmap and jacrev, alone and nested."""

    x = torch.arange(24, dtype=torch.float64).view(4, 6).cos()
    weight = torch.arange(18, dtype=torch.float64).view(3, 6).sin()

    @staticmethod
    def ours(weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, weight, activation="tanh").square().sum()

    @staticmethod
    def theirs(weight: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(torch.nn.functional.linear(x, weight)).square().sum()

    @pytest.mark.parametrize(
        "transform",
        [
            torch.func.grad,
            lambda f: torch.func.vmap(f, (None, 0)),
            lambda f: torch.func.vmap(torch.func.grad(f), (None, 0)),
            lambda f: torch.func.jacrev(torch.func.grad(f)),
        ],
        ids=["grad", "vmap", "gradients of samples", "Hessian"],
    )
    def test_linear(self, transform):
        mine = transform(self.ours)(self.weight, self.x)
        torch.testing.assert_close(mine, transform(self.theirs)(self.weight, self.x))

    def test_a_network(self, net):
        """Gradients of single samples, through every family of operations."""
        net.eval()
        parameters = dict(net.named_parameters())
        x = torch.randn(3, 3, 16, 16)

        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return torch.func.functional_call(net, parameters, (image[None],)).square().sum()

        mine = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        for i in range(len(x)):
            truth = torch.autograd.grad(net(x[i : i + 1]).square().sum(), list(net.parameters()))
            for name, expected in zip(parameters, truth, strict=True):
                torch.testing.assert_close(mine[name][i], expected)


def _layer(make, *shapes):
    return lambda: (make(), [torch.randn(s) for s in shapes])


LAYERS = {
    "GRU": _layer(lambda: nn.GRU(3, 4, batch_first=True), (2, 5, 3)),
    "LSTM": _layer(lambda: nn.LSTM(3, 4, 2, batch_first=True), (2, 5, 3)),
    "GRUCell": _layer(lambda: nn.GRUCell(3, 4), (2, 3)),
    "DenseCapsules": _layer(lambda: nn.DenseCapsules(6, 4, 3, 5), (2, 6, 4)),
    "PrimaryCapsules": _layer(lambda: nn.PrimaryCapsules(2, 8, 4, 3), (2, 2, 6, 6)),
    "LocalResponseNorm": _layer(lambda: nn.LocalResponseNorm(3), (2, 4, 5, 5)),
    "MultiheadAttention": _layer(lambda: nn.MultiheadAttention(8, 2), *[(5, 2, 8)] * 3),
    "TransformerEncoderLayer": _layer(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (2, 5, 8)
    ),
    "TransformerDecoderLayer": _layer(
        lambda: nn.TransformerDecoderLayer(8, 2, 16, 0.0), (4, 2, 8), (5, 2, 8)
    ),
    "Reservoir": _layer(lambda: nn.Reservoir(3, 20), (2, 5, 3)),
    "Linear": _layer(lambda: nn.Linear(4, 3), (2, 4)),
    "GELU": _layer(nn.GELU, (2, 4)),
    "LayerNorm": _layer(lambda: nn.LayerNorm(4), (2, 4)),
    "MaxPool2d": _layer(lambda: nn.MaxPool2d(2), (1, 2, 4, 4)),
    "Conv2d": _layer(lambda: nn.Conv2d(2, 3, 3), (1, 2, 4, 4)),
}


def _first(output):
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "Reservoir"])
def test_functional_gradients_of_layers(name):
    """torch.func.grad gives what autograd gives, where backwards have no derivative, too."""
    layer, inputs = LAYERS[name]()
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return _first(torch.func.functional_call(layer, parameters, (x, *inputs[1:]))).sin().sum()

    mine = torch.func.grad(loss, (0, 1))(parameters, inputs[0])
    x = inputs[0].requires_grad_()
    truth = torch.autograd.grad(loss(parameters, x), [*parameters.values(), x])
    torch.testing.assert_close([*mine[0].values(), mine[1]], list(truth))


@pytest.mark.parametrize("name", LAYERS)
def test_forward_mode_is_refused(name):
    """Not lost without a word where nothing requires a gradient."""
    layer, inputs = LAYERS[name]()
    layer.requires_grad_(False)

    def function(x: Tensor) -> Tensor:
        return _first(layer(x, *inputs[1:]))

    tangent = torch.ones_like(inputs[0])
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(function, (inputs[0],), (tangent,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        function(forward_ad.make_dual(inputs[0], tangent))
    with forward_ad.dual_level():
        torch.testing.assert_close(function(inputs[0]), function(inputs[0].clone()))


# --------------------------------------------------------------------------------------- autocast


def _pair(kind: str) -> tuple:
    x = torch.randn(2, 12, 7, 7) if kind != "linear" else torch.randn(9, 12)
    if kind == "linear":
        return F.linear, torch.nn.functional.linear, x, torch.randn(8, 12), {}
    groups = {"conv2d": 1, "grouped": 3, "depthwise": 12}[kind]
    weight = torch.randn(12, 12 // groups, 3, 3)
    return F.conv2d, torch.nn.functional.conv2d, x, weight, {"groups": groups}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["conv2d", "grouped", "depthwise", "linear"])
def test_autocast(kind, dtype):
    """Inputs are rounded as torch rounds them; parameters get float32 gradients."""
    ours, theirs, x, weight, options = _pair(kind)
    bias = torch.randn(weight.shape[0])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def step(function) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            y = function(*leaves, **options)
        return [y.detach(), *torch.autograd.grad(y.float().sum(), leaves)]

    mine = step(ours)
    assert mine[0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in mine[1:])
    rounded = [t.detach().to(dtype).double().requires_grad_() for t in leaves]
    y64 = theirs(*rounded, **options)
    truth = [y64.detach(), *torch.autograd.grad(y64.sum(), rounded)]
    for a, b, c in zip(mine, step(theirs), truth, strict=True):
        assert_as_accurate(a, b, c)


def test_autocast_takes_mixed_dtypes():
    """What a half-precision layer hands to one with float32 parameters, epilogue included."""
    x, weight = torch.randn(2, 9, 6, 6).bfloat16(), torch.randn(4, 9, 3, 3, requires_grad=True)
    vectors = {"scale": torch.rand(4), "shift": torch.randn(4)}
    residual = torch.randn(2, 4, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for activation in (None, "relu", "silu"):
            y = F.conv2d(x, weight, **vectors, residual=residual, activation=activation)
            assert y.dtype == torch.bfloat16


# Tracing warns of every size that Python looks at; torch 2.13 prefers export.
_tracing = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace:DeprecationWarning"
)


@_tracing
def test_jit_trace(net):
    """A traced graph has the registered operations, and no weight packed for this machine."""
    net.eval()
    x = torch.randn(2, 3, 16, 18)
    with torch.no_grad():
        expected = net(x)  # packs
        traced = torch.jit.trace(net, torch.randn(2, 3, 16, 18))
        torch.testing.assert_close(traced(x), expected)
    graph = str(traced.inlined_graph)
    assert "nnarch::conv2d" in graph and "nnarch::linear" in graph
    assert "value=<Tensor>" not in graph


@_tracing
@pytest.mark.parametrize(
    "module, size",
    [
        (nn.LSTM(4, 5), (3, 2, 4)),
        (nn.GRUCell(4, 5), (2, 4)),
        (nn.LayerNorm(6), (2, 6)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.MaxPool2d(2)), (2, 3, 8, 8)),
        (nn.TransformerEncoderLayer(8, 2, batch_first=True), (2, 3, 8)),
        (nn.DenseCapsules(8, 4, 5, 6), (2, 8, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_jit_trace_with_and_without_gradients(module, size, grad, frozen):
    """torch compares the graph with that of a run without gradients; it can be trained."""
    module = copy.deepcopy(module).eval().requires_grad_(not frozen)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, torch.randn(size))
    x = torch.randn(size)
    actual, expected = traced(x), module(x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    if frozen:
        return
    actual, expected = (y[0] if isinstance(y, tuple) else y for y in (actual, expected))
    weight = torch.randn(expected.shape)
    parameters = list(module.parameters())
    torch.testing.assert_close(
        torch.autograd.grad((actual * weight).sum(), parameters),
        torch.autograd.grad((expected * weight).sum(), parameters),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_autocast_leaves_float64_alone():
    x, weight = torch.randn(3, 4).double(), torch.randn(2, 4).double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x, weight).dtype == torch.float64


def test_autocast_switched_off_inside():
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert F.linear(torch.randn(3, 4), torch.randn(2, 4)).dtype == torch.float32


@pytest.mark.parametrize("training", [False, True])
def test_autocast_of_a_network(net, training):
    """Outputs are as close to float32's as torch.nn's own network is."""
    net.train(training)
    twin = copy.deepcopy(net)
    x = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
        loss = y.float().square().sum()
    loss.backward()
    exact = twin(x)
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.05)
    assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters())


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_autocast_under_compile(net, backend):
    net.eval()
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    x = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = net(x)
        y = compiled(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


def test_batched_gradients_of_a_reduced_loss():
    """Several gradients of a reduced loss at once: autograd.grad's is_grads_batched."""
    logits, target = torch.randn(5, 7, requires_grad=True), torch.arange(5)
    grads = torch.tensor([1.0, -2.0, 0.0])
    ours, theirs = (
        torch.autograd.grad(f(logits, target), logits, grads, is_grads_batched=True)[0]
        for f in (F.cross_entropy, torch.nn.functional.cross_entropy)
    )
    torch.testing.assert_close(ours, theirs)
