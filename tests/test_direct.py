"""Direct calls (ADR 8): the dispatcher's results, and when they keep out of the way."""

from __future__ import annotations

import threading

import pytest
import torch
from op_samples import all_ops, outputs, samples
from torch import Tensor

import nnarch
from nnarch import direct, library
from nnarch.direct import DECLINED, WANTS_GRADIENT

NAMES = [name for name in all_ops() if library.OPS[name].direct is not library._declined]


def _layer_norm():
    x = torch.randn(2, 5)
    return library.OPS["layer_norm"].direct, (x, torch.ones(5), None, None, 5, 1e-5, False)


def test_nearly_every_operation_has_a_direct_function():
    assert {"conv2d", "linear", "attention", "layer_norm", "cross_entropy"} <= set(NAMES)
    assert len(NAMES) > 0.9 * len(all_ops())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", NAMES)
def test_same_bits_as_through_the_dispatcher(name, mode):
    op = library.OPS[name]
    for args in samples(name):
        with mode():
            mine, theirs = op.direct(*args), op.overload(*args)
        assert type(mine) is type(theirs)
        for a, b in zip(outputs(mine), outputs(theirs), strict=True):
            assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
            assert a.is_inference() == b.is_inference() and not a.requires_grad
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "name", ["attention", "cross_entropy", "layer_norm_train", "max_pool2d_taps"]
)
def test_a_first_output_alone(name):
    op = library.OPS[name]
    for args in samples(name):
        with torch.no_grad():
            first = op.direct_first(*args)  # makes no others
            after = op.direct(*args)
            expected = outputs(op.overload(*args))
        torch.testing.assert_close(first, expected[0], rtol=0, atol=0, equal_nan=True)
        assert first._use_count() == 1
        for a, b in zip(outputs(after), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_keeps_tensors(name):
    args = samples(name)[0]
    tensors = [a for a in args if isinstance(a, Tensor)]
    with torch.no_grad():
        before = [t._use_count() for t in tensors]
        results = outputs(library.OPS[name].direct(*args))
        assert [t._use_count() for t in results] == [1] * len(results)
        assert library.OPS[name].direct(*args[:-1], "no number") is DECLINED
        assert [t._use_count() for t in tensors] == before


def test_a_refusal_of_the_kernel_declines():
    function, (x, _, *rest) = _layer_norm()
    weight = torch.ones(4)
    assert function(x, weight, *rest) is DECLINED
    assert (x._use_count(), weight._use_count()) == (1, 1)
    with pytest.raises(ValueError, match="weight"):
        nnarch.functional.layer_norm(x, (5,), weight)


def test_arguments_of_pythons_own_types():
    function, (x, weight, *_) = _layer_norm()
    assert isinstance(function(x, weight, None, None, 5, 1, False), Tensor)  # int for a float
    for columns, eps, rms in ((5.0, 1e-5, False), (True, 1e-5, False), (5, None, False),
                              (5, 1e-5, 0), (2**63, 1e-5, False), (5, 10**400, False)):  # fmt: skip
        assert function(x, weight, None, None, columns, eps, rms) is DECLINED
    assert function(x, weight) is DECLINED
    assert function(x, weight, None, None, 5, 1e-5, False, None) is DECLINED


@pytest.mark.parametrize("make", [tuple, list, torch.Size])
def test_lists(make):
    x, weight = torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3)
    function = library.OPS["conv2d"].direct
    rest = (make([0] * 4), make([1, 1]), 1, 0, 0.0)
    assert function(x, weight, *[None] * 5, make([2, 2]), *rest).shape == (1, 4, 2, 2)
    for stride in ([2, 2.0], [2, True], 2, None):
        assert function(x, weight, *[None] * 5, stride, *rest) is DECLINED


class _Subclass(Tensor):
    pass


def test_tensors_with_something_about_them():
    function, (x, *rest) = _layer_norm()
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    for other in (x.as_subclass(_Subclass), negated, x.to("meta"), x.to_sparse(), None, 1.0):
        assert function(other, *rest) is DECLINED
    assert isinstance(function(torch.nn.Parameter(x, requires_grad=False), *rest), Tensor)
    torch.testing.assert_close(
        nnarch.functional.layer_norm(negated, (5,)), nnarch.functional.layer_norm(-x, (5,))
    )


def test_gradients():
    function, (x, *rest) = _layer_norm()
    x.requires_grad_()
    assert function(x, *rest) is WANTS_GRADIENT
    with torch.no_grad():
        assert not function(x, *rest).requires_grad


class _FunctionMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _reference():
    return nnarch.use_backend("reference")


@pytest.mark.parametrize(
    "watcher", [nnarch.trace, _reference, _FunctionMode, torch.autograd.profiler.profile]
)
def test_nothing_hides_from_a_watcher(watcher):
    function, args = _layer_norm()
    with watcher():
        assert function(*args) is DECLINED
    assert function(*args) is not DECLINED


def test_a_default_device_watches_nothing():
    function, args = _layer_norm()
    with torch.device("cpu"):
        assert function(*args) is not DECLINED and not direct.is_watched()
        with _FunctionMode():
            assert function(*args) is DECLINED and direct.is_watched()
    with _FunctionMode(), torch.device("cpu"):
        assert function(*args) is DECLINED and direct.is_watched()


def test_the_profiler_sees_operations():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        nnarch.functional.layer_norm(torch.randn(2, 5), (5,))
    assert any(event.key == "nnarch::layer_norm" for event in profile.key_averages())


def test_transforms_and_traces():
    function, (_, *rest) = _layer_norm()
    seen = []

    def watch(x):
        seen.append(function(x, *rest))
        return nnarch.functional.layer_norm(x, (5,))

    x = torch.randn(3, 2, 5)
    torch.testing.assert_close(torch.vmap(watch)(x), watch(x))
    traced = torch.jit.trace(watch, (x,), check_trace=False)
    assert "nnarch::layer_norm" in str(traced.graph)
    assert [isinstance(result, Tensor) for result in seen] == [False, True, False]


def test_threads():
    function, args = _layer_norm()
    expected = function(*args)
    large = torch.randn(4096, 5)
    wrong = []

    def work():
        for _ in range(200):
            if not torch.equal(function(*args), expected):
                wrong.append(1)
            function(large, *args[1:])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_torch_that_keeps_its_words_elsewhere(monkeypatch):
    monkeypatch.setattr(direct, "_keys", lambda tensor: 12345)
    with pytest.raises(LookupError):
        direct._find_words()
    monkeypatch.undo()
    monkeypatch.setattr(direct, "_find_words", lambda: direct._only_place([], 0, 64))
    direct._set_up.cache_clear()
    try:
        schema = library.OPS["layer_norm"].overload._schema
        assert direct.function(library.native, 0, schema) is None
    finally:
        direct._set_up.cache_clear()
