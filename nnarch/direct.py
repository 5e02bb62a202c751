"""Operations called past torch's reading of arguments and its dispatcher (ADR 8).

`kernels/cpu/direct_call.cpp` makes a function for an operation, which runs the native kernel where
the dispatcher would do nothing else. It reads two words of a tensor's object that no interface
hands out in less than the time that the whole saves; this module finds them, on tensors of many
kinds whose answers torch gives, and where it does not find them, or part of what it needs is not
there, there are no such functions and everything takes the long way.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from nnarch import nodes

DECLINED = object()
"""What a direct function returns where the call has to go the long way."""
WANTS_GRADIENT = object()
"""What it returns where tensors and numbers are plain, and a tensor requires a gradient."""

NO_DUAL_LEVEL = -1
dual_level: Callable[[], int] = functools.partial(vars(forward_ad).__getitem__, "_current_level")
"""How deep forward-mode differentiation is nested. All in C: every call asks."""

_WORD = 8
_KINDS = {"Tensor": "t", "int": "i", "float": "f", "bool": "b", "List[int]": "l"}


def function(
    library: Any, number: int, schema: Any, first: bool = False, writes: bool = False
) -> Callable[..., Any] | None:
    """The direct function of an operation, or None where there is none.

    Args:
        library: the native library, as :class:`ctypes.CDLL`.
        number: the operation's number in its table.
        schema: of the operation.
        first: whether it returns the first output alone.
        writes: whether it may write its arguments.
    """
    kinds = _kinds(schema, writes)
    if kinds is None or not _set_up(library._name):
        return None
    arguments = schema.arguments
    required = sum(not a.has_default_value() for a in arguments)
    defaults = tuple(a.default_value if a.has_default_value() else None for a in arguments)
    make = _python_library(library._name).nnarch_direct_function
    make.restype = ctypes.py_object
    make.argtypes = [
        ctypes.c_int64, ctypes.c_char_p, ctypes.py_object, ctypes.c_int64, ctypes.c_int64,
        ctypes.c_int64,
    ]  # fmt: skip
    return make(number, kinds.encode(), defaults, required, len(schema.returns), first)


def give_nodes(
    library: Any, of: Any, schema: Any, backwards: Sequence[Any], names: Sequence[str]
) -> None:
    """Let an operation's direct function record its backwards, where nnarch/nodes.py can."""
    if not nodes.available(library._name):
        return
    for backward in backwards:
        if backward.op not in names:  # an older native library
            continue
        its_schema = getattr(torch.ops.nnarch, backward.op).default._schema
        kinds = _kinds(its_schema)
        assert kinds is not None
        number = names.index(backward.op)
        its_function = function(library, number, its_schema)
        formula = nodes.planned(backward, its_function, is_watched)
        planned = dataclasses.replace(backward, formula=formula)
        nodes.give(library._name, of, schema, planned, number, kinds)


def _kinds(schema: Any, writes: bool = False) -> str | None:
    """A letter an argument, as direct_call.cpp reads them."""
    if any(str(r.type) != "Tensor" for r in schema.returns):
        return None
    if not schema.returns and not writes:
        return None
    kinds = ""
    for argument in schema.arguments:
        kind = str(argument.type)
        optional = kind.startswith("Optional[")
        letter = _KINDS.get(kind.removeprefix("Optional[").removesuffix("]") if optional else kind)
        if letter is None or argument.kwarg_only:
            return None
        if argument.alias_info is not None and not writes:
            return None
        kinds += letter.upper() if optional else letter
    return kinds


@functools.cache
def _python_library(path: str) -> ctypes.PyDLL:
    """The native library, for functions that work on Python's objects."""
    return ctypes.PyDLL(path)


@functools.cache
def _set_up(path: str) -> bool:
    try:
        impl, keys = _find_words()
        adopt = _adopt()
        functions = tuple(itertools.chain.from_iterable(watched()))
    except (AttributeError, LookupError):
        return False
    kinds = (torch.Tensor, torch.nn.Parameter, int, float, tuple, list, torch.Size)
    objects = (*kinds, None, True, False, DECLINED, WANTS_GRADIENT, adopt, "requires_grad")
    set_up = _python_library(path).nnarch_direct_setup
    set_up.restype = None
    set_up.argtypes = [ctypes.py_object, ctypes.py_object] + 2 * [ctypes.c_int64]
    set_up.argtypes += 2 * [ctypes.c_uint64]
    with torch.inference_mode():
        inference = _keys(torch.zeros(1))
    set_up(objects, functions, impl, keys, _keys(torch.zeros(1)), inference)
    return True


def _adopt() -> Callable[[Any], Tensor]:
    """torch's function that makes a Python tensor of a handle, whose owner we stay; LookupError
    where it would free the handle. The name says that it does: no version yet has."""
    handles: Any = torch._C._aoti  # type: ignore[attr-defined]
    adopt, x = handles.alloc_tensor_by_stealing_from_void_ptr, torch.zeros(1)
    handle = handles.unsafe_alloc_void_ptr_from_tensor(x)  # for good: an empty tensor's worth
    if adopt(handle) is not x or x._use_count() != 2:  # type: ignore[attr-defined]
        raise LookupError("it takes the handle")
    return adopt


@functools.cache
def watched() -> tuple[tuple[Callable[[], Any], Any, Callable[[], bool] | None], ...]:
    """Functions, each with what it returns while nothing but the kernel has to run, and one that
    is asked whether that holds all the same where it returns something else, or None."""
    return (
        (torch._C._len_torch_dispatch_stack, 0, None),
        (torch._C._len_torch_function_stack, 0, _is_default_device),
        (torch._C._are_functorch_transforms_active, False, None),
        (torch._C._is_tracing, False, None),  # _get_tracing_state takes 0.1 µs
        (torch.autograd._profiler_enabled, False, None),  # type: ignore[attr-defined]
        (dual_level, NO_DUAL_LEVEL, None),
    )


def _is_default_device() -> bool:
    """Whether torch.set_default_device, which concerns no operation of ours, is the only mode."""
    if torch._C._len_torch_function_stack() != 1:
        return False
    return type(torch._C._get_function_stack_at(0)) is DeviceContext  # type: ignore[attr-defined]


def is_watched() -> bool:
    """Whether more than the kernel has to run."""
    for function, expected, excuse in watched():
        if function() != expected and (excuse is None or not excuse()):
            return True
    return False


def _find_words() -> tuple[int, int]:
    """Where a tensor's object points to what torch calls its `TensorImpl`, and where that has the
    set of its dispatch keys; LookupError unless all of many tensors agree on one place."""
    samples = list(_samples())
    impl = _only_place(
        [(id(t), t._cdata) for t in samples], object.__basicsize__, Tensor.__basicsize__
    )
    # A TensorImpl is at least so long: torch asserts its size, and has not made it smaller.
    keys = _only_place([(t._cdata, _keys(t)) for t in samples], _WORD, 192)
    return impl, keys


def _only_place(words: list[tuple[int, int]], first: int, end: int) -> int:
    """The one offset in [first, end) at which every address of `words` has its word."""
    places = [
        offset
        for offset in range(first, end - _WORD + 1, _WORD)
        if all(ctypes.c_uint64.from_address(at + offset).value == word for at, word in words)
    ]
    if len(places) != 1:
        raise LookupError(f"{len(places)} places")
    return places[0]


def _keys(tensor: Tensor) -> int:
    return torch._C._dispatch_keys(tensor).raw_repr()


def _samples() -> Iterator[Tensor]:
    x = torch.zeros(2, 3)
    yield from (x, x.t(), x[1:], torch.zeros(0), x.bfloat16(), torch.zeros(4, dtype=torch.int64))
    yield from (torch.nn.Parameter(x), x.clone().requires_grad_())
    yield from (x._neg_view(), x.to("meta"), torch.zeros(2, dtype=torch.complex64).conj())
    with torch.inference_mode():
        yield torch.zeros(5)
