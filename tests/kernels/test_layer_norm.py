"""Layer and RMS normalization against torch and float64: forward, first and second derivatives."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import (
    DTYPES,
    VIEWS,
    check_under_isa,
    compare,
    name_of,
    needs_poison,
    on_fresh_memory,
)
from tolerances import assert_as_accurate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as TF

import nnarch
from nnarch import functional as F
from nnarch.kernels.dropout.reference import factors
from nnarch.kernels.layer_norm import op as ops

EPS = 1e-5


def _stats(x: Tensor, rms: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    rstd = torch.rsqrt(rows.square().mean(1) + EPS)
    return rstd[None].clone() if rms else torch.stack([rows.mean(1), rstd])


def _samples(name: str) -> list[tuple]:
    x, other, grad = (torch.randn(5, 3, 37) for _ in range(3))
    weight, bias, seed = torch.rand(37) + 0.5, torch.randn(37), torch.tensor([7])
    return {
        "layer_norm": [
            (x, weight, bias, other, 37, EPS, False),
            (x, weight, None, None, 37, EPS, True),
            (x, None, None, None, 111, EPS, False),
        ],
        "layer_norm_train": [
            (x, weight, bias, other, seed, 37, EPS, 0.3, False),
            (x, weight, bias, None, None, 37, EPS, 0.0, False),
            (x, None, None, other, None, 37, EPS, 0.0, True),
        ],
        "layer_norm_backward": [
            (grad, other, x, weight, _stats(x, False), 37, 7),
            (grad, None, x, None, _stats(x, True), 37, 1),
        ],
        "layer_norm_backward_backward": [
            (other, bias, weight, grad, x, weight, _stats(x, rms), 37) for rms in (False, True)
        ],
        "row_dropout": [(x, seed, 37, 0.4)],
    }[name]


SAMPLES = {
    name: lambda name=name: _samples(name)
    for name in (
        "layer_norm", "layer_norm_train", "layer_norm_backward", "layer_norm_backward_backward",
        "row_dropout",
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------ accuracy


def _ours(rms: bool, size: tuple[int, ...], both: bool = False, eps: float = EPS):
    """The public function of tensors by name; with `both`, y and the sum in one tensor."""

    def run(x, weight=None, bias=None, residual=None):
        options = {"residual": residual, "return_sum": both}
        if rms:
            y = F.rms_norm(x, size, weight, eps, **options)
        else:
            y = F.layer_norm(x, size, weight, bias, eps, **options)
        return torch.cat(y) if both else y

    return run


def _theirs(rms: bool, size: tuple[int, ...], both: bool = False, eps: float = EPS):
    def run(x, weight=None, bias=None, residual=None):
        s = x if residual is None else x + residual
        norm = TF.rms_norm if rms else TF.layer_norm
        y = norm(s, size, *([weight] if rms else [weight, bias]), eps)
        return torch.cat([y, s]) if both else y

    return run


def _tensors(rms: bool, shape, columns: tuple[int, ...], dtype, residual=True, mean=0.0):
    x = (torch.randn(shape) + mean).to(dtype)
    return {
        "x": x,
        "weight": (torch.rand(columns) + 0.5).to(dtype),
        "bias": None if rms else torch.randn(columns).to(dtype),
        "residual": torch.randn(shape).to(dtype) if residual else None,
    }


ROWS_AND_COLUMNS = [
    (0, 5), (1, 1), (3, 2), (1, 3), (5, 7), (4, 15), (7, 16), (2, 17), (9, 31), (3, 33), (131, 64),
    (1, 65), (67, 100), (5, 768), (133, 769), (3, 4099), (2, 65536), (3, 0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("size", ROWS_AND_COLUMNS, ids=str)
def test_forward_and_backward(size, rms, dtype):
    columns = size[1:]
    if dtype == torch.float64 and 0 < size[1] < 4:
        pytest.skip("the truth has lost its digits: test_gradcheck has rows as short")
    ulps = 64.0 if dtype == torch.float64 else 8.0
    for residual, both in ((False, False), (True, False), (True, True)):
        tensors = _tensors(rms, size, columns, dtype, residual)
        grad = torch.randn((1 + both) * size[0], *columns)
        y = compare(
            _ours(rms, columns, both), _theirs(rms, columns, both), tensors, grad, ulps=ulps
        )
        assert y.is_contiguous()


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("affine", ["", "weight", "bias"])
def test_parameters_that_are_not_there(affine, rms):
    size = (6, 50)
    tensors = _tensors(rms, size, (50,), torch.float32)
    kept = {n: t for n, t in tensors.items() if n in ("x", "residual") or n == affine}
    compare(_ours(rms, (50,)), _theirs(rms, (50,)), kept, torch.randn(size), ulps=8)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(
    "shape, dims", [((2, 3, 4, 5), 2), ((4, 1, 6), 3), ((3, 5, 1), 1), ((7,), 1)]
)
def test_normalized_shapes(shape, dims, rms):
    size = shape[len(shape) - dims :]
    tensors = _tensors(rms, shape, size, torch.float32)
    compare(_ours(rms, size), _theirs(rms, size), tensors, torch.randn(shape), ulps=8)


def test_a_small_variance_far_from_zero():
    """Two passes: one over x and x² would lose all digits."""
    for mean in (1e3, 1e6):
        tensors = _tensors(False, (5, 777), (777,), torch.float32, residual=False, mean=mean)
        compare(_ours(False, (777,)), _theirs(False, (777,)), tensors, torch.randn(5, 777), ulps=16)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_half_types_beside_parameters_in_float32(rms):
    """Against the definition: torch's fused kernels take no such RMS normalization."""
    for dtype in (torch.float16, torch.bfloat16):
        tensors = _tensors(rms, (9, 130), (130,), torch.float32)
        x, residual = tensors["x"].to(dtype), tensors["residual"].to(dtype)
        vectors = {"weight": tensors["weight"], "bias": tensors["bias"]}
        y = _ours(rms, (130,))(x, residual=residual, **vectors)
        truth = _theirs(rms, (130,))(
            x.double(), residual=residual.double(),
            **{n: v if v is None else v.double() for n, v in vectors.items()},
        )  # fmt: skip
        assert_as_accurate(y, truth.to(dtype), truth)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_views(rms, view):
    """Input, residual and gradient with any strides, stride 0 among them."""
    tensors = _tensors(rms, (3, 4, 5, 24), (24,), torch.float32)
    make = VIEWS[view]
    tensors |= {"x": make(tensors["x"]), "residual": make(tensors["residual"])}
    grad = make(torch.randn(3, 4, 5, 24))
    compare(_ours(rms, (24,)), _theirs(rms, (24,)), tensors, grad, ulps=16)


def test_rows_of_two_strides_are_read_in_place():
    packed = torch.randn(2, 9, 3, 4, 16)  # batch, time, query-key-value, heads, channels
    for x in (packed[:, :, 0], packed[:, 1:, 2], packed[1, :, :, 3], packed[..., 1, :]):
        torch.testing.assert_close(F.layer_norm(x, (16,)), TF.layer_norm(x, (16,)))
        torch.testing.assert_close(F.rms_norm(x, [16]), TF.rms_norm(x, (16,)))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_outputs_that_leave_the_caches(rms):
    """6 MB and more are written past the caches, where rows are whole lines."""
    for columns in (768, 1000):
        size = (2100, columns)
        tensors = _tensors(rms, size, (columns,), torch.float32)
        compare(_ours(rms, (columns,), True), _theirs(rms, (columns,), True), tensors,
                torch.randn(4200, columns), ulps=16)  # fmt: skip


def test_epsilon_of_rms_norm():
    for dtype in DTYPES:
        x = torch.full((2, 8), 1e-4).to(dtype)
        truth = (
            x.double()
            / (x.double().square() + (2**-52 if x.dtype == torch.float64 else 2**-23)).sqrt()
        )
        assert_as_accurate(F.rms_norm(x, (8,)), TF.rms_norm(x, (8,)), truth)


def test_infinities_and_nan_stay_in_their_row():
    x = torch.randn(6, 40)
    x[1, 3], x[2, 5], x[3, 39], x[4] = float("inf"), float("nan"), -float("inf"), 0.0
    for ours, theirs in ((F.layer_norm, TF.layer_norm), (F.rms_norm, TF.rms_norm)):
        torch.testing.assert_close(ours(x, (40,)), theirs(x, (40,)), equal_nan=True)


def test_a_residual_of_another_dtype_is_promoted():
    x, residual = torch.randn(3, 20).bfloat16(), torch.randn(3, 20)
    weight = torch.rand(20)
    y, s = F.layer_norm(x, (20,), weight, residual=residual, return_sum=True)
    assert y.dtype == s.dtype == torch.float32
    torch.testing.assert_close(s, x + residual)
    torch.testing.assert_close(y, TF.layer_norm(x + residual, (20,), weight))


def test_the_sum_is_the_input_where_nothing_is_added():
    x = torch.randn(3, 20, requires_grad=True)
    y, s = F.rms_norm(x, (20,), return_sum=True)
    assert s is x
    (y.sum() + s.sum()).backward()


# ------------------------------------------------------------------------------------- dropout


def _dropped(x: Tensor, seed: int, p: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return (rows * factors(torch.tensor([seed]), 1, *rows.shape, p, rows)[0]).view(x.shape)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("residual", [False, True])
def test_dropout_is_that_of_the_definition(residual, rms, monkeypatch):
    for columns, p in itertools.product((1, 4, 63, 64, 65, 768), (0.1, 0.5, 1.0)):
        monkeypatch.setattr(ops, "draw_seed", lambda x: torch.tensor([11**14]))
        function = F.rms_norm if rms else F.layer_norm
        x, other = torch.randn(2, 5, columns), torch.randn(2, 5, columns)
        added = other if residual else None
        leaf = x.clone().requires_grad_()
        y, s = function(leaf, (columns,), eps=EPS, residual=added, dropout_p=p, return_sum=True)
        expected = _dropped(x, 11**14, p) + (other if residual else 0)
        torch.testing.assert_close(s, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(y, _theirs(rms, (columns,))(expected), rtol=1e-4, atol=2e-5)
        weights = torch.randn(2, 5, columns)
        (dx,) = torch.autograd.grad(s, leaf, weights)
        torch.testing.assert_close(dx, _dropped(weights, 11**14, p))


def test_dropout_follows_torchs_generator():
    x = torch.randn(40, 256)
    torch.manual_seed(3)
    one, two = (F.layer_norm(x, (256,), dropout_p=0.25) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(one, F.layer_norm(x, (256,), dropout_p=0.25))
    assert not torch.equal(one, two)
    _, s = F.layer_norm(torch.ones(400, 256), (256,), dropout_p=0.25, return_sum=True)
    assert abs(float((s == 0).double().mean()) - 0.25) < 0.01


# ---------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("rows, columns", [(5, 7), (2, 19), (1, 40), (4, 1), (5, 2), (3, 3)])
def test_gradcheck_and_gradgradcheck(rows, columns, rms, dropout_p):
    """Of the native code, in float64, the gradient that arrives for the sum included."""
    seed = torch.tensor([5]) if dropout_p else None
    x, residual = (torch.randn(rows, columns, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(columns, dtype=torch.float64) + 0.5
    bias = None if rms else torch.randn(columns, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias) if t is not None]

    def run(x, residual, weight, bias=None):
        return ops.layer_norm_train(x, weight, bias, residual, seed, columns, EPS, dropout_p, rms)[
            :2
        ]

    with nnarch.trace() as trace:
        assert gradcheck(run, leaves)
        assert gradgradcheck(run, leaves)
    assert {entry.backend for entry in trace} == {"cpu"}
    assert "layer_norm_backward_backward" in {entry.op for entry in trace}


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_gradcheck_of_the_public_functions(rms):
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, dtype=torch.float64, requires_grad=True)
    run = _ours(rms, (6,))
    assert gradcheck(run, (x, weight))
    assert gradgradcheck(run, (x, weight))


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_wanted_gradients(needed):
    x, weight, bias = (
        t.requires_grad_(need)
        for t, need in zip((torch.randn(5, 9), torch.rand(9), torch.randn(9)), needed, strict=True)
    )
    wanted = [t for t in (x, weight, bias) if t.requires_grad]
    y = F.layer_norm(x, (9,), weight, bias)
    assert y.requires_grad == any(needed)
    if wanted:
        expected = torch.autograd.grad(TF.layer_norm(x, (9,), weight, bias).sum(), wanted)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), wanted), expected)


def test_the_operation_without_statistics_has_a_gradient_too():
    """A graph that was captured without gradients may be differentiated."""
    x, residual = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9, requires_grad=True)
    y = ops.layer_norm_op(x, None, None, residual, 9, EPS, False)
    mine = torch.autograd.grad(y, (x, residual), x.detach())
    theirs = torch.autograd.grad(TF.layer_norm(x + residual, (9,)), (x, residual), x.detach())
    torch.testing.assert_close(mine, theirs)


def test_per_sample_gradients():
    x, weight = torch.randn(4, 3, 8), torch.rand(8)

    def loss(norm):
        return lambda w, row: norm(row, (8,), w).square().sum()

    mine, theirs = (
        torch.func.vmap(torch.func.grad(loss(norm)), (None, 0))(weight, x)
        for norm in (F.layer_norm, TF.layer_norm)
    )
    torch.testing.assert_close(mine, theirs)


# ------------------------------------------------------------------- compilers, memory, threads


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compile(dropout_p, dynamic):
    torch._dynamo.reset()

    def block(x, residual, weight):
        y, s = F.rms_norm(
            x * 2, (10,), weight, residual=residual, dropout_p=dropout_p, return_sum=True
        )
        return F.layer_norm(y + s, (10,), weight)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5) if dynamic else (3,):
        tensors = [torch.randn(2, rows, 10), torch.randn(2, rows, 10), torch.rand(10)]
        tensors = [t.requires_grad_() for t in tensors]
        results = []
        for f in (compiled, block):
            torch.manual_seed(1)
            y = f(*tensors)
            results.append([y, *torch.autograd.grad(y.square().sum(), tensors)])
        if dropout_p == 0:
            for mine, expected in zip(*results, strict=True):
                torch.testing.assert_close(mine, expected)
        with torch.no_grad():
            assert compiled(*tensors).shape == tensors[0].shape


def test_export():
    class Block(torch.nn.Module):
        def forward(self, x, residual):
            return F.layer_norm(x, (10,), residual=residual)

    x, residual = torch.randn(3, 10), torch.randn(3, 10)
    exported = torch.export.export(Block(), (x, residual))
    assert torch.equal(exported.module()(x, residual), Block()(x, residual))


def test_autocast_keeps_the_dtype_of_the_input():
    x, weight = torch.randn(3, 16), torch.rand(16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.layer_norm(x, (16,), weight).dtype == torch.float32
        assert F.layer_norm(x.bfloat16(), (16,), weight, weight).dtype == torch.bfloat16


@needs_poison
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_reads_no_uninitialised_memory(dtype):
    x, other, grad = (torch.randn(70, 67).to(dtype) for _ in range(3))
    weight, seed = torch.rand(67).to(dtype), torch.tensor([3])

    def everything():
        y, s, stats = ops.layer_norm_train(x, weight, weight, other, seed, 67, EPS, 0.3, False)
        first = ops.layer_norm_backward(grad, other, s, weight, stats, 67, 7)
        second = ops.layer_norm_backward_backward(
            other, weight.to(stats.dtype) if dtype == torch.float64 else weight, weight,
            grad, s, weight, stats, 67,
        )  # fmt: skip
        return [y, s, stats, *first, *second, ops.row_dropout(x, seed, 67, 0.5)]

    for fresh, usual in zip(on_fresh_memory(everything), everything(), strict=True):
        assert torch.equal(fresh, usual)


def _everything(rms: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    results = []
    for rows, columns in ((1, 3000), (700, 130), (1033, 48), (67, 768)):
        generator = torch.Generator().manual_seed(rows)
        leaves = [
            torch.randn(rows, columns, generator=generator).to(dtype).requires_grad_()
            for _ in range(2)
        ]
        weight = torch.randn(columns, generator=generator).to(dtype).requires_grad_()
        y, s = _both(rms, leaves, weight, columns)
        first = torch.autograd.grad((y.square() * s).sum(), [*leaves, weight], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [*leaves, weight])
        results += [t.detach() for t in (y, s, *first, *second)]
    return results


def _both(rms: bool, leaves: list[Tensor], weight: Tensor, columns: int):
    if rms:
        return F.rms_norm(leaves[0], (columns,), weight, residual=leaves[1], return_sum=True)
    return F.layer_norm(leaves[0], (columns,), weight, weight, residual=leaves[1], return_sum=True)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_one_and_two_threads_agree(rms):
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(_everything(rms))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def _against_reference() -> None:
    """What the subprocess of the next test runs."""
    for rms, dtype in itertools.product((False, True), DTYPES[:2]):
        results = _everything(rms, dtype)
        with nnarch.use_backend("reference"):
            expected = _everything(rms, dtype)
        for mine, definition in zip(results, expected, strict=True):
            scale = float(definition.abs().max())
            torch.testing.assert_close(mine, definition, rtol=1e-4, atol=1e-5 * scale)
    test_every_half_survives_its_conversion()
    for dtype in DTYPES[2:]:
        for size in ((7, 16), (9, 31), (2, 4099), (67, 100)):
            test_forward_and_backward(size, False, dtype)
    for p, columns in itertools.product((0.1, 0.9), (3, 64, 130)):
        x, seed = torch.randn(5, columns), torch.tensor([2**40 + 17])
        assert torch.equal(ops.row_dropout(x, seed, columns, p), _dropped(x, int(seed), p))


def test_every_half_survives_its_conversion():
    """All 2¹⁶ of each type, by dropping nothing: denormals, infinities and NaN among them."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype, columns in itertools.product((torch.float16, torch.bfloat16), (2**16, 2**8, 1)):
        x = bits.view(dtype).view(-1, columns)
        y = ops.row_dropout(x, torch.tensor([1]), columns, 0.0)
        if dtype == torch.bfloat16:  # its denormals are those of float32, which are flushed
            x = torch.where(x.abs() < torch.finfo(dtype).tiny, torch.zeros_like(x), x)
            y = torch.where(y.abs() < torch.finfo(dtype).tiny, torch.zeros_like(y), y)
        assert torch.equal(y.isnan(), x.isnan())
        assert torch.equal(y[~y.isnan()], x[~x.isnan()])


def test_rounding_to_halves_is_torchs():
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(50, 64).to(dtype)
        scale = torch.logspace(-9, 4, 50)[:, None].to(dtype)
        y = ops.row_dropout((x * scale), torch.tensor([1]), 64, 1 - 1 / 1.37)
        expected = _dropped((x * scale).float(), 1, 1 - 1 / 1.37).to(dtype)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    check_under_isa(isa, "test_layer_norm", "_against_reference")


def test_arrays_of_numpy():
    x, residual = torch.randn(3, 8), torch.randn(3, 8)
    y, s = F.layer_norm(x.numpy(), (8,), residual=residual.numpy(), return_sum=True)
    assert torch.equal(torch.from_numpy(s), x + residual)
    torch.testing.assert_close(torch.from_numpy(y), TF.layer_norm(x + residual, (8,)))


# ------------------------------------------------------------------------------------ bad input

X = torch.randn(4, 6)
W = torch.rand(6)
BAD = [
    (lambda: F.layer_norm([1.0], (1,)), TypeError, "input must be a tensor.*list|DLPack"),
    (lambda: F.layer_norm(X.long(), (6,)), TypeError, "input must be floating.*int64"),
    (lambda: F.layer_norm(X, (5,)), ValueError, r"layer_norm.*normalized_shape \(5,\).*\(4, 6\)"),
    (lambda: F.rms_norm(X, (5,)), ValueError, r"rms_norm.*normalized_shape \(5,\).*\(4, 6\)"),
    (lambda: F.layer_norm(X, (2, 4, 6)), ValueError, r"normalized_shape \(2, 4, 6\)"),
    (lambda: F.layer_norm(X, ()), ValueError, "at least one dimension"),
    (lambda: F.layer_norm(X, 6), TypeError, "sequence of ints, got 6"),
    (lambda: F.layer_norm(X, (6.0,), W[:5]), (TypeError, ValueError), "normalized_shape|weight"),
    (lambda: F.layer_norm(X, (6,), W[:5]), ValueError, r"weight must have shape \(6,\).*\(5,\)"),
    (lambda: F.layer_norm(X, (4, 6), W), ValueError, r"weight must have shape \(4, 6\)"),
    (lambda: F.layer_norm(X, (6,), W, W[None]), ValueError, r"bias must have shape \(6,\)"),
    (lambda: F.layer_norm(X, (6,), W.double()), TypeError, "weight must be.*float32.*float64"),
    (lambda: F.layer_norm(X, (6,), W, eps="1"), TypeError, "eps must be a number, got '1'"),
    (lambda: F.layer_norm(X, (6,), residual=X[:3]), ValueError, "residual must have the shape"),
    (lambda: F.layer_norm(X, (6,), residual=3.0), TypeError, "residual must be a tensor"),
    (lambda: F.layer_norm(X, (6,), residual=X.long()), TypeError, "residual must be floating"),
    (lambda: F.layer_norm(X, (6,), dropout_p=1.5), ValueError, "between 0 and 1, got 1.5"),
    (lambda: F.layer_norm(X, (6,), dropout_p="x"), TypeError, "dropout_p must be a number"),
    (lambda: F.rms_norm(X, (6,), W, None, residual=X[:3]), ValueError, "rms_norm: residual"),
    (lambda: ops.layer_norm_train(X, W, None, None, None, 6, 1e-5, 0.5, False), ValueError, "seed"),
    (lambda: ops.layer_norm_train(X, W, None, None, W, 6, 1e-5, 0.5, False), TypeError, "int64"),
    (lambda: ops.layer_norm_op(X, W, W, None, 6, 1e-5, True), ValueError, "bias must be None"),
    (lambda: ops.layer_norm_backward(X, None, X, W, W[None], 6, 7), ValueError, "stats must have"),
    (lambda: ops.layer_norm_backward(X[:3], None, X, W, _stats(X, True), 6, 7), ValueError, "grad"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_on_cuda_gives_float32_as_torch(enabled):
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    try:
        with FakeTensorMode():
            x, w = (torch.empty(s, dtype=torch.float16, device="cuda") for s in ((5, 8), (8,)))
            mine = F.layer_norm(x, (8,), w, w)
            others = (F.rms_norm(x, (8,), w), *F.layer_norm(x, (8,), residual=x, return_sum=True))
            torchs = torch.nn.functional.layer_norm(x, (8,), w, w)
            on_the_cpu = F.layer_norm(torch.empty(5, 8, dtype=torch.float16), (8,))
    finally:
        torch.set_autocast_enabled("cuda", before)
    assert torchs.dtype == (torch.float32 if enabled else torch.float16)
    assert {y.dtype for y in (mine, *others)} == {torchs.dtype}
    assert on_the_cpu.dtype == torch.float16
