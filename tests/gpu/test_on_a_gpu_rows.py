"""On a real GPU: normalization, embeddings, dropout, losses, linear layers, against torch's."""

import copy

import pytest
import torch
from on_a_gpu import BACKEND, DEVICE, MARKS, assert_ran, by_dtype, check

import nnarch
from nnarch import functional as F
from nnarch import nn
from nnarch.kernels.dropout.op import dropout_op
from nnarch.kernels.layer_norm.op import layer_norm_train

pytestmark = MARKS

TF = torch.nn.functional


# --------------------------------------------------------------------------------- normalization


@pytest.mark.parametrize("size", [(7, 33), (3, 5, 768), (2, 9000)], ids=str)
@by_dtype
def test_layer_norm(size, dtype):
    twin, module = torch.nn.LayerNorm(size[-1]), nn.LayerNorm(size[-1])
    torch.nn.init.normal_(twin.weight)
    torch.nn.init.normal_(twin.bias)
    check(module, twin, [torch.randn(size) + 1], dtype, ulps=8)


@by_dtype
def test_layer_norm_of_a_sum_that_is_returned(dtype):
    def mine(x, r, w, b):
        return F.layer_norm(x, (100,), w, b, residual=r, return_sum=True)

    def torchs(x, r, w, b):
        return TF.layer_norm(x + r, (100,), w, b), x + r

    tensors = [torch.randn(6, 5, 100), torch.randn(6, 5, 100), torch.randn(100), torch.randn(100)]
    check(mine, torchs, tensors, dtype, ulps=8)


@by_dtype
def test_rms_norm(dtype):
    twin, module = torch.nn.RMSNorm(130), nn.RMSNorm(130)
    torch.nn.init.normal_(twin.weight)
    check(module, twin, [torch.randn(11, 130)], dtype, ulps=8)


@by_dtype
def test_rms_norm_with_a_residual(dtype):
    def mine(x, r, w):
        return F.rms_norm(x, (130,), w, 1e-6, residual=r)

    def torchs(x, r, w):
        return TF.rms_norm(x + r, (130,), w, 1e-6)

    check(mine, torchs, [torch.randn(9, 130), torch.randn(9, 130), torch.randn(130)], dtype, ulps=8)


@by_dtype
def test_layer_norm_drops_what_the_cpu_drops(dtype):
    x, w, r = (torch.randn(s).to(dtype) for s in ((40, 37), (37,), (40, 37)))
    found = []
    for device in ("cpu", DEVICE):
        seed = torch.tensor([4711], device=device)
        on = [t.to(device) for t in (x, w, w, r)]
        found.append([t.cpu() for t in layer_norm_train(*on, seed, 37, 1e-5, 0.4, False)[:2]])
    assert torch.equal(found[0][1] == r, found[1][1] == r)  # dropped: the sum is the residual
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("size", [(50, 10), (7, 100), (3, 5000), (2, 6, 5, 7)], ids=str)
@by_dtype
def test_dropout_drops_what_the_cpu_drops(size, dtype):
    x = torch.randn(size).to(dtype)
    a, b = (
        dropout_op(x.to(d), torch.tensor([1 << 60], device=d), 0.3).cpu() for d in ("cpu", DEVICE)
    )
    assert torch.equal(a == 0, b == 0)
    torch.testing.assert_close(a, b)


def test_dropout_module():
    module, x = nn.Dropout(0.25), torch.ones(100, 1000, device=DEVICE, requires_grad=True)
    with nnarch.trace() as record:
        torch.manual_seed(5)
        y = module(x)
        y.sum().backward()
    assert_ran(record)
    assert torch.equal(y, x.grad)
    assert abs(float((y == 0).double().mean()) - 0.25) < 0.01
    torch.manual_seed(5)
    assert torch.equal(module(x), y)
    assert not torch.equal(module(x), y)
    assert module.eval()(x) is x


# ------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
@by_dtype
def test_embedding(options, dtype):
    twin, module = torch.nn.Embedding(50, 33, **options), nn.Embedding(50, 33, **options)
    tokens = torch.randint(50, (6, 35))
    tokens[0] = 3
    check(module, twin, [tokens], dtype, ulps=8)


def test_sparse_gradient_of_an_embedding():
    grads = []
    weight, tokens = torch.randn(50, 20), torch.randint(50, (40,), device=DEVICE)
    for namespace in (nn, torch.nn):
        module = namespace.Embedding(50, 20, sparse=True, _weight=weight.clone()).to(DEVICE)
        module(tokens).square().sum().backward()
        grads.append(module.weight.grad)
    assert grads[0].is_sparse
    torch.testing.assert_close(grads[0].to_dense(), grads[1].to_dense())


@by_dtype
def test_fused_embedding(dtype):
    tokens, segments = torch.randint(60, (3, 17)), torch.randint(2, (3, 17))
    tables = [torch.randn(n, 48) for n in (60, 30, 2)]

    def mine(tokens, segments, t, p, s, w, b):
        return F.embedding_layer_norm(
            tokens, t, p, segments, s, norm_weight=w, norm_bias=b, offset=2, padding_idx=4
        )

    def torchs(tokens, segments, t, p, s, w, b):
        rows = torch.arange(2, 19, device=t.device)
        total = TF.embedding(tokens, t, 4) + TF.embedding(rows, p) + TF.embedding(segments, s)
        return TF.layer_norm(total, (48,), w, b)

    tensors = [tokens, segments, *tables, torch.randn(48), torch.randn(48)]
    check(mine, torchs, tensors, dtype, factor=4, ulps=8)


# ----------------------------------------------------------------------------------------- losses


def wide(x):
    """Half precision in float32: in it, torch's sums over classes overflow."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def in_float32(function):
    """torch's function as under autocast, with results in the dtype of the input."""
    return lambda x, *rest, **options: function(wide(x), *rest, **options).to(x.dtype)


LOSSES = {
    "mean": {},
    "sum of smoothed": {"reduction": "sum", "label_smoothing": 0.1},
    "each": {"reduction": "none", "ignore_index": 2},
}


def _targets(rows, classes):
    targets = torch.randint(classes, (rows,))
    targets[::5] = 2
    return targets


@pytest.mark.parametrize("classes", [7, 3001])
@pytest.mark.parametrize("name", LOSSES)
@by_dtype
def test_cross_entropy(name, classes, dtype):
    options, weight = LOSSES[name], torch.rand(classes) + 0.5

    def mine(x, target):
        return F.cross_entropy(x, target, weight.to(dtype).to(x), **options)

    def torchs(x, target):
        return TF.cross_entropy(x, target, weight.to(dtype).to(x), **options)

    tensors = [3 * torch.randn(45, classes), _targets(45, classes)]
    check(mine, in_float32(torchs), tensors, dtype, factor=4, ulps=16)


@by_dtype
def test_cross_entropy_of_probabilities_and_of_images(dtype):
    loss, twin = (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        torch.nn.CrossEntropyLoss(label_smoothing=0.1),
    )
    images, wanted = torch.randn(2, 9, 5, 6), torch.randint(9, (2, 5, 6))
    check(loss, in_float32(twin), [images, wanted], dtype, factor=4, ulps=16)
    shares, x = torch.randn(20, 9).softmax(-1), torch.randn(20, 9)
    plain = in_float32(lambda x, shares: twin(x, wide(shares)))
    check(loss, plain, [x, shares], dtype, factor=4, ulps=16)


@by_dtype
def test_z_loss(dtype):
    tensors = [torch.randn(30, 200), torch.randint(200, (30,))]

    def torchs(x, target):
        z = x.logsumexp(-1).square().mean()
        return TF.cross_entropy(x, target) + 0.1 * z

    def mine(x, target):
        return F.cross_entropy(x, target, z_loss=0.1)

    check(mine, in_float32(torchs), tensors, dtype, factor=4, ulps=16)


@pytest.mark.parametrize("name", LOSSES)
@by_dtype
def test_linear_cross_entropy(name, dtype):
    """Against the two steps: logits in the inputs' dtype as torch's, the loss in float32."""
    options = LOSSES[name]
    weight = torch.rand(1003) + 0.5

    def mine(x, w, b, target):
        return F.linear_cross_entropy(
            x, w, target, linear_bias=b, weight=weight.to(dtype).to(x), **options
        )

    def torchs(x, w, b, target):
        logits = wide(TF.linear(x, w, b))
        return TF.cross_entropy(logits, target, weight.to(dtype).to(logits), **options)

    tensors = [torch.randn(75, 72), torch.randn(1003, 72) / 8, torch.randn(1003)]
    check(mine, torchs, [*tensors, _targets(75, 1003)], dtype, factor=4, ulps=16)


@by_dtype
def test_linear_cross_entropy_with_z_loss(dtype):
    def mine(x, w, target):
        return F.linear_cross_entropy(x, w, target, z_loss=0.01, label_smoothing=0.05)

    def torchs(x, w, target):
        logits = wide(TF.linear(x, w))
        loss = TF.cross_entropy(logits, target, label_smoothing=0.05)
        return loss + 0.01 * logits.logsumexp(-1).square().mean()

    tensors = [torch.randn(33, 40), torch.randn(501, 40) / 6, torch.randint(501, (33,))]
    check(mine, torchs, tensors, dtype, factor=4, ulps=16)


# --------------------------------------------------------------------------------- linear layers


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@by_dtype
def test_gated_linear(activation, dtype):
    function = {
        "silu": TF.silu,
        "gelu": TF.gelu,
        "gelu_tanh": lambda x: TF.gelu(x, approximate="tanh"),
    }[activation]

    def mine(x, a, b, c, d):
        return F.gated_linear(x, a, b, c, d, activation=activation)

    def torchs(x, a, b, c, d):
        return function(TF.linear(x, a, c)) * TF.linear(x, b, d)

    weights = [torch.randn(90, 70) / 8, torch.randn(90, 70) / 8, torch.randn(90), torch.randn(90)]
    check(mine, torchs, [torch.randn(37, 70), *weights], dtype, factor=4, ulps=16)


@pytest.mark.parametrize("rows", [1, 37])
@by_dtype
def test_gated_feed_forward_without_gradients(rows, dtype):
    module = nn.GatedFeedForward(64, 100)
    weights = [p.detach() for p in module.parameters()]
    assert len(weights) == 3

    def mine(x, *w):
        there = copy.deepcopy(module).to(x)
        return there(x)

    def torchs(x, gate, up, down):
        return (TF.silu(x @ gate.t()) * (x @ up.t())) @ down.t()

    by_name = dict(module.named_parameters())
    names = sorted(by_name, key=lambda n: ("gate" not in n, "up" not in n))
    weights = [by_name[n].detach() for n in names]
    tensors = [torch.randn(rows, 64), *weights]
    check(mine, torchs, tensors, dtype, gradients=False, factor=4, ulps=16)


@pytest.mark.parametrize("activation", ["gelu", "silu", "relu"])
@pytest.mark.parametrize("rows", [1, 150])
@by_dtype
def test_linear_with_residual_and_activation(rows, activation, dtype):
    def mine(x, w, b, r):
        return F.linear(x, w, b, residual=r, activation=activation)

    def torchs(x, w, b, r):
        return getattr(TF, activation)(TF.linear(x, w, b) + r)

    sizes = ((rows, 130), (70, 130), (70,), (rows, 70))
    tensors = [torch.randn(s) / (11 if s == (70, 130) else 1) for s in sizes]
    check(mine, torchs, tensors, dtype, factor=4, ulps=16)


@by_dtype
def test_gate_of_two_tensors(dtype):
    check(F.gated_activation, lambda g, v: TF.silu(g) * v, torch.randn(2, 33, 65), dtype, ulps=8)


def test_two_runs_are_bitwise_equal():
    x, w = torch.randn(500, 64, device=DEVICE), torch.randn(3000, 64, device=DEVICE)
    table, tokens = torch.randn(9, 64, device=DEVICE), torch.randint(9, (500,), device=DEVICE)
    target = torch.randint(3000, (500,), device=DEVICE)
    leaves = [t.requires_grad_() for t in (x, w, table)]
    runs = []
    for _ in range(2):
        hidden = F.layer_norm(x + F.embedding(tokens, table), (64,))
        loss = F.linear_cross_entropy(hidden, w, target)
        runs.append([loss, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_infinite_logits_as_torch():
    x = torch.randn(4, 50)
    x[0, 3], x[1, 2], x[2] = torch.inf, torch.nan, -torch.inf
    target = torch.tensor([1, 2, 3, 4])
    with nnarch.trace() as record:
        got = F.cross_entropy(x.to(DEVICE), target.to(DEVICE), reduction="none")
    assert {e.backend for e in record} == {BACKEND}
    torch.testing.assert_close(
        got.cpu(), TF.cross_entropy(x, target, reduction="none"), equal_nan=True
    )
