"""Nodes of autograd's graph in C++ (ADR 12): they give what torch.autograd.Function gives."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor

import nnarch
from nnarch import functional as F
from nnarch import library, nodes

pytestmark = pytest.mark.skipif(
    library.native is None or not nodes.available(library.native._name),
    reason="the library of nodes was built for another torch, or not at all",
)


def _cross_entropy(x):
    return F.cross_entropy(x, torch.arange(x.shape[0]) % x.shape[1])


def _attention(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, return_lse=True)


def _norm_of_sum(x, w, b, r):
    return F.layer_norm(x, (5,), w, b, residual=r, return_sum=True)


def _norm(x, w, b):
    return F.layer_norm(x, (5,), w, b)


def _batch_norm(x, w, b):
    return F.batch_norm(x, None, None, w, b, training=True)


def _conv(x, w, b):
    return F.conv2d(x, w, b, stride=(1, 2), padding=(1, 0), groups=2)


def _depthwise(x, w, b):
    return F.conv2d(x, w, b, padding=1, groups=3)


def _max_pool(x):
    return F.max_pool2d(x, 2, (2, 1))


def _max_pool_indices(x):
    return F.max_pool2d(x, 2, 1, return_indices=True)[0]


def _adaptive_max_pool(x):
    return F.adaptive_max_pool2d(x, (2, 3), return_indices=True)[0]


def _avg_pool(x):
    return F.avg_pool2d(x, (2, 3), 1, (1, 1), count_include_pad=False)


def _upsample(x):
    return F.interpolate(x, (7, 3), mode="bilinear")


# name: (function, shapes of its tensors, whether it has a second derivative)
CASES = {
    "linear": (F.linear, [(3, 5), (4, 5), (4,)], True),
    "linear 3-D": (F.linear, [(2, 3, 5), (4, 5), (4,)], True),
    "linear 1-D": (F.linear, [(5,), (4, 5), (4,)], True),
    "linear empty": (F.linear, [(0, 5), (4, 5), (4,)], False),
    "linear no depth": (F.linear, [(3, 0), (4, 0), (4,)], False),
    "conv2d": (_conv, [(2, 4, 5, 6), (6, 2, 3, 2), (6,)], True),
    "conv2d of nothing": (_conv, [(0, 4, 5, 6), (6, 2, 3, 2), (6,)], False),
    "depthwise": (_depthwise, [(2, 3, 4, 5), (6, 1, 3, 3), (6,)], True),
    "max_pool2d": (_max_pool, [(2, 3, 5, 4)], True),
    "max_pool2d with indices": (_max_pool_indices, [(2, 3, 5, 4)], True),
    "adaptive_max_pool2d": (_adaptive_max_pool, [(2, 3, 5, 4)], True),
    "avg_pool2d": (_avg_pool, [(2, 3, 5, 4)], True),
    "upsample": (_upsample, [(2, 3, 5, 4)], True),
    "layer_norm": (_norm, [(3, 5), (5,), (5,)], True),
    "layer_norm of a sum": (_norm_of_sum, [(3, 5), (5,), (5,), (3, 5)], True),
    "batch_norm": (_batch_norm, [(2, 3, 4, 2), (3,), (3,)], True),
    "attention": (_attention, [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), (1, 1, 3, 5)], False),
    "cross_entropy": (_cross_entropy, [(3, 5)], False),
}
NAMES = list(CASES)
KEEPING = [name for name in NAMES if name not in ("avg_pool2d", "upsample")]  # tensors, that is


def _make(name, dtype=torch.float32, seed=0):
    function, shapes, _ = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
    return function, tensors


def _outputs(result):
    return list(result) if isinstance(result, tuple) else [result]


def _is_node(output):
    return type(output.grad_fn).__name__ == "CppFunction" and "nnarch" in output.grad_fn.name()


def _upstream(outputs, expanded=False):
    generator = torch.Generator().manual_seed(7)
    if expanded:
        return [torch.tensor(1.5, dtype=o.dtype).expand(o.shape) for o in outputs]
    return [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_of_the_function(name, expanded, dtype):
    function, tensors = _make(name, dtype)
    outputs = _outputs(function(*tensors))
    with nnarch.trace():  # a watcher: the long way
        expected = _outputs(function(*tensors))
    assert all(map(_is_node, outputs)) and not any(map(_is_node, expected))
    upstream = _upstream(outputs, expanded)
    mine = torch.autograd.grad(outputs, tensors, upstream)
    theirs = torch.autograd.grad(expected, tensors, upstream)
    for a, b in zip((*outputs, *mine), (*expected, *theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(name):
    function, tensors = _make(name)
    outputs = _outputs(function(*tensors))
    upstream = _upstream(outputs)
    everything = torch.autograd.grad(outputs, tensors, upstream, retain_graph=True)
    for i, t in enumerate(tensors):
        (alone,) = torch.autograd.grad(outputs, [t], upstream, retain_graph=True)
        torch.testing.assert_close(alone, everything[i])
        only = [u.detach().requires_grad_(j == i) for j, u in enumerate(tensors)]
        result = _outputs(function(*only))
        torch.autograd.backward(result, upstream)
        torch.testing.assert_close(only[i].grad, everything[i])
        assert all(u.grad is None for j, u in enumerate(only) if j != i)


@pytest.mark.parametrize("name", ["layer_norm of a sum", "attention"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_of_one_output(name, which):
    function, tensors = _make(name, torch.float64)

    def one(*args):
        return function(*args)[which]

    torch.autograd.gradcheck(one, tensors)


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name][2]])
def test_second_derivatives(name):
    function, tensors = _make(name, torch.float64)
    torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", ["attention", "cross_entropy"])
def test_no_second_derivative_is_an_error(name):
    function, tensors = _make(name)
    output = _outputs(function(*tensors))[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"nnarch::.*differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", KEEPING)
def test_backward_twice(name):
    function, tensors = _make(name)
    outputs = _outputs(function(*tensors))
    upstream = _upstream(outputs)
    first = torch.autograd.grad(outputs, tensors, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(outputs, tensors, upstream)
    for a, b, c in zip(first, kept, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, tensors, upstream)


def test_an_input_changed_in_place():
    function, tensors = _make("linear")
    output = function(*tensors)
    with torch.no_grad():
        tensors[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_output_changed_in_place():
    function, tensors = _make("attention")
    output, _ = function(*tensors)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", KEEPING)
def test_hooks_on_saved_tensors(name):
    function, tensors = _make(name)
    expected = torch.autograd.grad(
        (outputs := _outputs(function(*tensors))), tensors, _upstream(outputs)
    )
    packed, unpacked = [], []

    def pack(t):
        packed.append(t)
        return t.detach().clone()

    def unpack(t):
        unpacked.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        outputs = _outputs(function(*tensors))
    assert _is_node(outputs[0])
    gradients = torch.autograd.grad(outputs, tensors, _upstream(outputs))
    assert packed and len(unpacked) == len(packed)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_hook_that_raises():
    function, tensors = _make("linear")

    def pack(_):
        raise KeyError("no room")

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, pack)
    with hooks, pytest.raises(KeyError, match="room"):
        function(*tensors)
    message = "none here"
    with torch.autograd.graph.disable_saved_tensors_hooks(message):
        function(*tensors).sum().backward()


def test_hooks_on_gradients_and_nodes():
    function, tensors = _make("layer_norm")
    output, seen = function(*tensors), []
    output.register_hook(lambda g: seen.append("tensor") or 2 * g)
    output.grad_fn.register_hook(lambda given, taken: seen.append((len(given), len(taken))))
    output.backward(torch.ones_like(output))
    plain = torch.autograd.grad(function(*tensors), tensors, torch.full((3, 5), 2.0))
    torch.testing.assert_close([t.grad for t in tensors], list(plain))
    assert seen == ["tensor", (4, 1)]


def test_checkpointing():
    function, tensors = _make("layer_norm")
    for reentrant in (False, True):
        output = torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=reentrant)
        gradients = torch.autograd.grad if not reentrant else None
        if gradients:
            gradients(output.sum(), tensors)
        else:
            output.sum().backward()


@pytest.mark.parametrize(
    "name", ["linear", "conv2d", "depthwise", "max_pool2d", "layer_norm", "batch_norm", "attention"]
)
def test_batched_gradients(name):
    function, tensors = _make(name)
    output = _outputs(function(*tensors))[0]
    upstream = torch.randn(4, *output.shape)
    many = torch.autograd.grad(output, tensors[:1], upstream, is_grads_batched=True)[0]
    output = _outputs(function(*tensors))[0]
    for g, expected in zip(upstream, many, strict=True):
        (one,) = torch.autograd.grad(output, tensors[:1], g, retain_graph=True)
        torch.testing.assert_close(one, expected)


def test_a_trace_sees_the_backward():
    function, tensors = _make("layer_norm")
    output = function(*tensors)
    with nnarch.trace() as trace:
        output.sum().backward()
    assert "layer_norm_backward" in [call.op for call in trace]


def test_forced_backends_run_the_backward():
    function, tensors = _make("linear")
    output = function(*tensors)
    with nnarch.use_backend("reference"):
        gradients = torch.autograd.grad(output.sum(), tensors)
    expected = torch.autograd.grad(torch.nn.functional.linear(*tensors).sum(), tensors)
    torch.testing.assert_close(gradients, expected)


def test_anomaly_mode():
    function, tensors = _make("layer_norm")
    with torch.autograd.detect_anomaly(check_nan=True):
        function(*tensors).sum().backward()
        bad = function(tensors[0] * float("nan"), *tensors[1:])
        with pytest.raises(RuntimeError, match="nan"):
            bad.sum().backward()


def test_forward_mode_is_refused():
    function, tensors = _make("linear")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones(3, 5))
        with pytest.raises(NotImplementedError):
            function(dual, *tensors[1:])


def test_functorch_has_its_own_way():
    function, tensors = _make("linear")
    x, w, b = (t.detach() for t in tensors)
    gradient = torch.func.grad(lambda x: function(x, w, b).square().sum())(x)
    expected = torch.func.grad(lambda x: torch.nn.functional.linear(x, w, b).square().sum())(x)
    torch.testing.assert_close(gradient, expected)


def test_compile_does_not_see_nodes():
    function, tensors = _make("layer_norm")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    mine = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    torch.testing.assert_close(mine, torch.autograd.grad(function(*tensors).sum(), tensors))


def test_autocast():
    function, tensors = _make("linear")
    with torch.autocast("cpu", torch.bfloat16):
        output = function(*tensors)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_in_memory(name):
    function, tensors = _make(name)
    before = [t._use_count() for t in tensors]
    for _ in range(3):
        outputs = _outputs(function(*tensors))
        gone = [weakref.ref(o) for o in outputs]
        torch.autograd.grad(outputs, tensors, _upstream(outputs))
        outputs = _outputs(function(*tensors))  # and one without a backward
        del outputs
    gc.collect()
    assert [t._use_count() for t in tensors] == before
    assert all(g() is None for g in gone)


def test_gradients_are_taken_without_a_copy():
    function, tensors = _make("linear")
    function(*tensors).sum().backward()
    assert all(t.grad._use_count() == 2 for t in tensors)  # the tensor's, and Python's


def test_threads():
    function, tensors = _make("layer_norm")
    expected = torch.autograd.grad(function(*tensors).sum(), tensors)
    failures = []

    def work():
        for _ in range(50):
            mine = torch.autograd.grad(function(*tensors).sum(), tensors)
            if not all(map(torch.equal, mine, expected)):
                failures.append(mine)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_the_error_of_a_formula(monkeypatch):
    function, tensors = _make("layer_norm")
    output = function(*tensors)

    def refuse(*_):
        raise NotImplementedError("layer_norm_backward: not here")

    monkeypatch.setattr("nnarch.kernels.layer_norm.op.layer_norm_backward", refuse)
    with nnarch.trace(), pytest.raises(NotImplementedError, match="not here"):
        output.sum().backward()


def test_another_torch_has_none(tmp_path):
    assert not nodes.available.__wrapped__(str(tmp_path / "_native.so"))


def test_a_tensor_subclass_goes_the_long_way():
    class Mine(Tensor):
        pass

    function, tensors = _make("linear")
    output = function(tensors[0].as_subclass(Mine), *tensors[1:])
    output.sum().backward()
    assert all(t.grad is not None for t in tensors)


def test_the_weight_gradient_of_channels_last_is_channels_last():
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    w = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = F.conv2d(x, w)
    assert _is_node(output)
    (gradient,) = torch.autograd.grad(output, [w], torch.ones_like(output))
    assert gradient.stride() == w.stride()


def test_a_pooled_input_is_not_kept():
    x = torch.randn(1, 2, 4, 4, requires_grad=True) * 1
    output, gone = F.max_pool2d(x, 2), weakref.ref(x)
    assert _is_node(output)
    del x
    assert gone() is None
    output.sum().backward()
