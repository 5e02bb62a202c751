"""Launch plans: the third call of a kind repeats the second, with the tensors of the third."""

from __future__ import annotations

import weakref

import pytest
import torch
from op_samples import samples

launch = pytest.importorskip("nnarch.kernels.gpu.launch", reason="needs triton")
import nnarch  # noqa: E402
from nnarch import functional as F  # noqa: E402
from nnarch import library  # noqa: E402
from nnarch.direct import DECLINED  # noqa: E402
from nnarch.kernels.gpu import plans  # noqa: E402

OPS = sorted(
    name for name, op in library.OPS.items() if op.gpu is not None and op.gpu_backend == "triton"
)


@pytest.fixture
def replays(monkeypatch):
    """A list that grows with every call that a plan repeats."""
    done = []
    run = plans.Plan.run
    monkeypatch.setattr(plans.Plan, "run", lambda self, *lists: done.append(1) or run(self, *lists))
    return done


def on_the_device(name, arguments):
    """The arguments where the kernels run: sizes of packed sequences stay on the CPU."""
    device = torch.get_default_device()
    names = [argument.name for argument in library.OPS[name].overload._schema.arguments]
    return tuple(
        a.to(device) if isinstance(a, torch.Tensor) and n != "batch_sizes" else a
        for n, a in zip(names, arguments, strict=True)
    )


def other_values(arguments):
    """Tensors of the same kind with other values; integers stay, they may be indices."""
    return tuple(
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device).copy_(a.flip(0))
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.dim()
        else a
        for a in arguments
    )


def tensors_of(result):
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def smallest(name):
    """The sample with the fewest elements, on the CPU: its generators are there."""
    with torch.device("cpu"):
        found = samples(name)
    return min(found, key=lambda s: sum(a.numel() for a in s if isinstance(a, torch.Tensor)))


@pytest.mark.parametrize("name", OPS)
def test_a_plan_does_what_the_launcher_does(name, replays):
    op = library.OPS[name]
    planned = op.implementation("triton")
    arguments = on_the_device(name, smallest(name))
    try:
        planned(*arguments)
    except NotImplementedError as error:
        assert "numba" not in str(error)
        pytest.skip(f"the launcher refuses the sample: {error}")
    planned(*arguments)
    arguments = other_values(arguments)
    got, algorithm = tensors_of(planned(*arguments)), library.ran.algorithm
    expected = tensors_of(op.launcher()(*arguments))
    assert library.ran.algorithm == algorithm
    for mine, direct in zip(got, expected, strict=True):
        assert (mine.shape, mine.stride(), mine.dtype) == (
            direct.shape,
            direct.stride(),
            direct.dtype,
        )
        assert torch.equal(mine.nan_to_num(7.0), direct.nan_to_num(7.0))


# Operations whose plans consist of allocations, copies and kernels, at the samples used here.
NATIVE = {
    "activation", "activation_grad", "affine", "attention", "attention_backward", "avg_pool2d",
    "batch_norm_train", "batch_norm_backward", "channel_sum", "conv2d", "conv2d_input_grad",
    "conv2d_weight_grad", "conv_transpose2d", "depthwise_conv2d", "depthwise_conv2d_backward",
    "depthwise_separable_conv2d", "dropout", "gate", "gate_grad", "gated_linear", "layer_norm",
    "layer_norm_backward", "layer_norm_train", "linear", "local_response_norm", "max_pool2d_taps",
    "squash", "upsample2d",
}  # fmt: skip


if not launch.INTERPRETED:  # the interpreter has no driver to launch with

    @pytest.mark.parametrize("name", OPS)
    def test_the_native_library_does_what_the_launcher_does(name):
        op = library.OPS[name]
        arguments = on_the_device(name, smallest(name))
        planned = op.implementation("triton")
        try:
            planned(*arguments)
        except NotImplementedError as error:
            pytest.skip(f"the launcher refuses the sample: {error}")
        planned(*arguments)
        arguments = other_values(arguments)
        with torch.no_grad():
            got = op.direct(*arguments)
        if got is DECLINED:
            assert name not in NATIVE
            pytest.skip("a plan that runs in Python")
        for mine, direct in zip(
            tensors_of(got), tensors_of(op.launcher()(*arguments)), strict=True
        ):
            kind = (direct.shape, direct.stride(), direct.dtype)
            assert (mine.shape, mine.stride(), mine.dtype) == kind
            assert torch.equal(mine.nan_to_num(7.0), direct.nan_to_num(7.0))


def _linear(x, weight):
    with nnarch.use_backend("triton"):
        return F.linear(x, weight)


def _formulas():
    """Backwards that are one native operation on the CPU, and several kernels on a GPU."""
    from nnarch.kernels.conv2d.op import _gradients as conv2d
    from nnarch.kernels.linear.op import _gradients as linear

    def linear_arguments():
        return torch.randn(6, 8), torch.randn(6, 32), torch.randn(8, 32)

    def conv2d_arguments():
        grad = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
        return grad, torch.randn(2, 4, 5, 5), torch.randn(8, 4, 3, 3)

    for wanted in (1, 2, 4, 7):
        yield f"linear {wanted}", linear, linear_arguments, (wanted,)
        geometry = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
        yield f"conv2d {wanted}", conv2d, conv2d_arguments, (*geometry, wanted)


@pytest.mark.parametrize(
    ("formula", "tensors", "rest"), [pytest.param(*rest, id=name) for name, *rest in _formulas()]
)
def test_the_formula_of_a_backward_is_one_plan(formula, tensors, rest, replays):
    planned = plans.planned(formula)
    with torch.no_grad():
        for _ in range(2):
            planned(*tensors(), *rest)
        assert not replays
        arguments = tensors()
        got = planned(*arguments, *rest)
        assert len(replays) == 1
        with nnarch.use_backend("triton"):
            expected = formula(*arguments, *rest)
    for mine, true in zip(got, expected, strict=True):
        assert (mine is None) == (true is None)
        assert mine is None or (mine.stride() == true.stride() and torch.equal(mine, true))


def test_what_is_repeated(replays):
    x, weight = torch.randn(6, 32), torch.randn(8, 32)
    for count in (0, 0, 1, 2):
        _linear(x, weight)
        assert len(replays) == count
    _linear(x[:5], weight)  # another shape
    _linear(x.half(), weight.half())  # another dtype
    _linear(x.t().contiguous().t(), weight)  # other strides
    _linear(torch.randn(6 * 32 + 1)[1:].view(6, 32), weight)  # another alignment
    assert len(replays) == 2
    with plans.paused():
        _linear(x, weight)
    plans.forget()
    _linear(x, weight)
    assert len(replays) == 2


def test_results_do_not_share_memory(replays):
    x, weight = torch.randn(6, 32), torch.randn(8, 32)
    results = [_linear(x * k, weight) for k in range(5)]
    assert len(replays) == 3
    for k, y in enumerate(results):
        torch.testing.assert_close(y, (x * k) @ weight.t())


def test_values_on_the_host_are_never_planned(replays):
    def read(x):
        return x.new_full((2,), float(x.sum().item()))

    planned = plans.planned(read)
    for k in range(4):
        assert planned(torch.full((3,), float(k)))[0] == 3 * k
    assert not replays


def test_torch_operations_are_repeated(replays):
    def make(x, factor):
        y = torch.zeros_like(x)
        y[1:].copy_(x.t().contiguous().t()[1:] * factor)
        return y, None, x.chunk(2)[1] + 1

    planned = plans.planned(make)
    for k in range(4):
        x = torch.full((4, 2), float(k))
        y, nothing, half = planned(x, 3)
        assert nothing is None
        assert y[0].eq(0).all() and y[1:].eq(3 * k).all() and half.eq(k + 1).all()
    assert len(replays) == 2


def test_an_argument_is_never_a_result(replays):
    planned = plans.planned(lambda x: x)
    x = torch.randn(3)
    assert all(planned(x) is x for _ in range(4))
    assert not replays


def test_a_tensor_given_twice_is_a_plan_of_its_own(replays):
    x, other = torch.randn(8, 32), torch.randn(8, 32)
    for a, b in ((x, x), (x, x), (x, x), (x, other), (x, other), (x, other), (other, x)):
        torch.testing.assert_close(_linear(a, b), a @ b.t())
    assert len(replays) == 3


def test_a_plan_holds_no_memory():
    planned = plans.planned(lambda x: x.t().contiguous() + 1)
    x = torch.randn(4, 3)
    for _ in range(3):
        planned(x)
    alive = weakref.ref(x)
    del x
    assert alive() is None
