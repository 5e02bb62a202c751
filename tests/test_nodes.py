"""Nodes of autograd's graph in C++ (ADR 12): they give what torch.autograd.Function gives."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from node_cases import CASES, KEEPING, NAMES, is_node, make, outputs_of, upstream_for
from torch import Tensor

import nnarch
from nnarch import functional as F
from nnarch import library, nodes

pytestmark = pytest.mark.skipif(
    library.native is None or not nodes.available(library.native._name),
    reason="the library of nodes was built for another torch, or not at all",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_of_the_function(name, expanded, dtype):
    function, tensors = make(name, dtype)
    outputs = outputs_of(function(*tensors))
    with nnarch.trace():  # a watcher: the long way
        expected = outputs_of(function(*tensors))
    assert all(map(is_node, outputs)) and not any(map(is_node, expected))
    upstream = upstream_for(outputs, expanded)
    mine = torch.autograd.grad(outputs, tensors, upstream)
    theirs = torch.autograd.grad(expected, tensors, upstream)
    for a, b in zip((*outputs, *mine), (*expected, *theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_each_gradient_alone(name):
    function, tensors = make(name)
    outputs = outputs_of(function(*tensors))
    upstream = upstream_for(outputs)
    everything = torch.autograd.grad(outputs, tensors, upstream, retain_graph=True)
    for i, t in enumerate(tensors):
        (alone,) = torch.autograd.grad(outputs, [t], upstream, retain_graph=True)
        torch.testing.assert_close(alone, everything[i])
        only = [u.detach().requires_grad_(j == i) for j, u in enumerate(tensors)]
        result = outputs_of(function(*only))
        torch.autograd.backward(result, upstream)
        torch.testing.assert_close(only[i].grad, everything[i])
        assert all(u.grad is None for j, u in enumerate(only) if j != i)


@pytest.mark.parametrize("name", ["layer_norm of a sum", "attention"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_of_one_output(name, which):
    function, tensors = make(name, torch.float64)

    def one(*args):
        return function(*args)[which]

    torch.autograd.gradcheck(one, tensors)


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name][2]])
def test_second_derivatives(name):
    function, tensors = make(name, torch.float64)
    torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", ["attention", "cross_entropy"])
def test_no_second_derivative_is_an_error(name):
    function, tensors = make(name)
    output = outputs_of(function(*tensors))[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"nnarch::.*differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("name", KEEPING)
def test_backward_twice(name):
    function, tensors = make(name)
    outputs = outputs_of(function(*tensors))
    upstream = upstream_for(outputs)
    first = torch.autograd.grad(outputs, tensors, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(outputs, tensors, upstream)
    for a, b, c in zip(first, kept, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, tensors, upstream)


def test_an_input_changed_in_place():
    function, tensors = make("linear")
    output = function(*tensors)
    with torch.no_grad():
        tensors[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_output_changed_in_place():
    function, tensors = make("attention")
    output, _ = function(*tensors)
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("name", KEEPING)
def test_hooks_on_saved_tensors(name):
    function, tensors = make(name)
    expected = torch.autograd.grad(
        (outputs := outputs_of(function(*tensors))), tensors, upstream_for(outputs)
    )
    packed, unpacked = [], []

    def pack(t):
        packed.append(t)
        return t.detach().clone()

    def unpack(t):
        unpacked.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        outputs = outputs_of(function(*tensors))
    assert is_node(outputs[0])
    gradients = torch.autograd.grad(outputs, tensors, upstream_for(outputs))
    assert packed and len(unpacked) == len(packed)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_hook_that_raises():
    function, tensors = make("linear")

    def pack(_):
        raise KeyError("no room")

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, pack)
    with hooks, pytest.raises(KeyError, match="room"):
        function(*tensors)
    message = "none here"
    with torch.autograd.graph.disable_saved_tensors_hooks(message):
        function(*tensors).sum().backward()


def test_hooks_on_gradients_and_nodes():
    function, tensors = make("layer_norm")
    output, seen = function(*tensors), []
    output.register_hook(lambda g: seen.append("tensor") or 2 * g)
    output.grad_fn.register_hook(lambda given, taken: seen.append((len(given), len(taken))))
    output.backward(torch.ones_like(output))
    plain = torch.autograd.grad(function(*tensors), tensors, torch.full((3, 5), 2.0))
    torch.testing.assert_close([t.grad for t in tensors], list(plain))
    assert seen == ["tensor", (4, 1)]


def test_checkpointing():
    function, tensors = make("layer_norm")
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
    function, tensors = make(name)
    output = outputs_of(function(*tensors))[0]
    upstream = torch.randn(4, *output.shape)
    many = torch.autograd.grad(output, tensors[:1], upstream, is_grads_batched=True)[0]
    output = outputs_of(function(*tensors))[0]
    for g, expected in zip(upstream, many, strict=True):
        (one,) = torch.autograd.grad(output, tensors[:1], g, retain_graph=True)
        torch.testing.assert_close(one, expected)


def test_a_trace_sees_the_backward():
    function, tensors = make("layer_norm")
    output = function(*tensors)
    with nnarch.trace() as trace:
        output.sum().backward()
    assert "layer_norm_backward" in [call.op for call in trace]


def test_forced_backends_run_the_backward():
    function, tensors = make("linear")
    output = function(*tensors)
    with nnarch.use_backend("reference"):
        gradients = torch.autograd.grad(output.sum(), tensors)
    expected = torch.autograd.grad(torch.nn.functional.linear(*tensors).sum(), tensors)
    torch.testing.assert_close(gradients, expected)


def test_anomaly_mode():
    function, tensors = make("layer_norm")
    with torch.autograd.detect_anomaly(check_nan=True):
        function(*tensors).sum().backward()
        bad = function(tensors[0] * float("nan"), *tensors[1:])
        with pytest.raises(RuntimeError, match="nan"):
            bad.sum().backward()


def test_forward_mode_is_refused():
    function, tensors = make("linear")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], torch.ones(3, 5))
        with pytest.raises(NotImplementedError):
            function(dual, *tensors[1:])


def test_functorch_has_its_own_way():
    function, tensors = make("linear")
    x, w, b = (t.detach() for t in tensors)
    gradient = torch.func.grad(lambda x: function(x, w, b).square().sum())(x)
    expected = torch.func.grad(lambda x: torch.nn.functional.linear(x, w, b).square().sum())(x)
    torch.testing.assert_close(gradient, expected)


def test_compile_does_not_see_nodes():
    function, tensors = make("layer_norm")
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    mine = torch.autograd.grad(compiled(*tensors).sum(), tensors)
    torch.testing.assert_close(mine, torch.autograd.grad(function(*tensors).sum(), tensors))


def test_autocast():
    function, tensors = make("linear")
    with torch.autocast("cpu", torch.bfloat16):
        output = function(*tensors)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_in_memory(name):
    function, tensors = make(name)
    before = [t._use_count() for t in tensors]
    for _ in range(3):
        outputs = outputs_of(function(*tensors))
        gone = [weakref.ref(o) for o in outputs]
        torch.autograd.grad(outputs, tensors, upstream_for(outputs))
        outputs = outputs_of(function(*tensors))  # and one without a backward
        del outputs
    gc.collect()
    assert [t._use_count() for t in tensors] == before
    assert all(g() is None for g in gone)


def test_gradients_are_taken_without_a_copy():
    function, tensors = make("linear")
    function(*tensors).sum().backward()
    assert all(t.grad._use_count() == 2 for t in tensors)  # the tensor's, and Python's


def test_threads():
    function, tensors = make("layer_norm")
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
    function, tensors = make("layer_norm")
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

    function, tensors = make("linear")
    output = function(tensors[0].as_subclass(Mine), *tensors[1:])
    output.sum().backward()
    assert all(t.grad is not None for t in tensors)


def test_the_weight_gradient_of_channels_last_is_channels_last():
    x = torch.randn(2, 4, 5, 6).contiguous(memory_format=torch.channels_last)
    w = torch.randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    output = F.conv2d(x, w)
    assert is_node(output)
    (gradient,) = torch.autograd.grad(output, [w], torch.ones_like(output))
    assert gradient.stride() == w.stride()


def test_a_pooled_input_is_not_kept():
    x = torch.randn(1, 2, 4, 4, requires_grad=True) * 1
    output, gone = F.max_pool2d(x, 2), weakref.ref(x)
    assert is_node(output)
    del x
    assert gone() is None
    output.sum().backward()
