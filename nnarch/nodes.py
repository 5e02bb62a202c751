"""Training calls without torch.autograd.Function (ADR 12).

A Function costs a call some 11 µs, in Python before the kernel and in Python again in the backward.
Where an operation's backward is one native operation, `declare` is told so in words, and
`kernels/cpu/nodes` puts a node of torch's own kind behind a plain call, which takes what the words
say and calls that operation. The node needs torch's C++ interface as it was when nnarch was built:
beside another torch, and wherever a call is not plain, there is the Function.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

_GRAD, _INPUT, _OUTPUT, _NUMBER, _INTS, _SIZES, _WANTED, _KEEPS_GRAPH, _NONE = range(9)


_ABSENT, _GIVEN, _ONE_OF = range(3)
Condition = bool | Set[int]


@dataclass(frozen=True)
class Backward:
    """An operation's backward that is one native operation.

    Args:
        op: its name.
        arguments: what it takes, in its order, between commas: "grad 0" is the gradient of the
            first output, "output 0" that output, "sizes x" those of the argument x, which is not
            kept for them, "wanted" the bits of the gradients that are wanted, "keeps graph" whether
            a second backward may come, "none" None; else an argument's name.
        gradients: what its results are the gradients of: arguments' names by result.
        bits: of the arguments in the number "wanted".
        formula: the Python function of the same arguments that runs where these are not plain, or
            a graph of the backward is wanted. It returns as many tensors, or None.
        seen: how many outputs have gradients, from the first.
        shown: how many the caller gets; the others are None. As many as are seen, where None.
        given: what arguments have to be: given (True; numbers: not 0) or not (False), or one of
            some integers (a set).
    """

    op: str
    arguments: str
    gradients: Sequence[Sequence[str]]
    formula: Callable[..., Any]
    bits: Mapping[str, int] = field(default_factory=dict)
    seen: int = 1
    shown: int | None = None
    given: Mapping[str, Condition] = field(default_factory=dict)


def planned(
    backward: Backward, function: Any, is_watched: Callable[[], bool]
) -> Callable[..., Any]:
    """The formula of a backward, which a launch plan repeats on a GPU (ADR 13).

    Args:
        backward: whose formula it is.
        function: the direct function of its operation.
        is_watched: whether more than the kernels has to run.
    """
    formula, plan = backward.formula, None

    def run(*args: Any) -> Any:
        nonlocal plan
        grad = args[0]
        if grad is None or not grad.is_cuda or torch.is_grad_enabled() or is_watched():
            return formula(*args)
        if plan is None:
            try:
                from nnarch.kernels.gpu import plans
            except ImportError:  # no Triton
                return formula(*args)
            plan = plans.planned(formula, function)
        return plan(*args)

    return run


@functools.cache
def available(path: str) -> bool:
    """Whether the library of nodes beside the native library at `path` is for this torch.

    It is loaded and set up then. nnarch.direct has been set up before.
    """
    try:
        nodes = ctypes.CDLL(str(Path(path).resolve().with_name("_nodes.so")))
    except OSError:
        return False
    nodes.nnarch_nodes_torch.restype = ctypes.c_char_p
    built_for = nodes.nnarch_nodes_torch().decode()
    if built_for != f"{torch.__version__} {torch.version.git_version}":
        return False
    functions = (nodes.nnarch_nodes_setup, nodes.nnarch_nodes_record)
    give = ctypes.CDLL(path).nnarch_direct_nodes
    give.restype, give.argtypes = None, 2 * [ctypes.c_void_p]
    give(*(ctypes.cast(f, ctypes.c_void_p) for f in functions))
    return True


def give(
    path: str, function: Any, schema: Any, backward: Backward, number: int, kinds: str
) -> None:
    """Let the direct function of an operation record `backward`.

    Args:
        path: of the native library.
        function: of nnarch.direct.
        schema: of the operation.
        backward: its backward.
        number: of the backward's operation in the native library's table.
        kinds: a letter an argument of the backward's operation (nnarch/direct.py).
    """
    names = [a.name for a in schema.arguments]
    types = [str(a.type) for a in schema.arguments]
    arguments: list[int] = []
    for argument, kind in zip(backward.arguments.split(", "), kinds, strict=True):
        arguments += (*_source(argument, names, types), ord(kind))
    edges: list[int] = []
    for result, of in enumerate(backward.gradients):
        for name in of:
            edges += (names.index(name), result, backward.bits.get(name, 0))
    conditions: list[int] = []
    for name, condition in backward.given.items():
        what, bits = _condition(condition)
        conditions += (what, names.index(name), bits)
    call = ctypes.PyDLL(path).nnarch_direct_backward
    numbers, count = ctypes.POINTER(ctypes.c_int64), ctypes.c_int64
    call.restype = None
    call.argtypes = [
        ctypes.py_object, ctypes.c_char_p, count, numbers, count, numbers, count, count, count,
        count, numbers, count, ctypes.py_object,
    ]  # fmt: skip
    call(
        function, schema.name.partition("::")[2].encode(), number,
        _array(arguments), len(arguments) // 3, _array(edges), len(edges) // 3,
        len(backward.gradients), backward.seen, backward.shown or backward.seen,
        _array(conditions), len(conditions) // 3, backward.formula,
    )  # fmt: skip


def _condition(condition: Condition) -> tuple[int, int]:
    """A condition's number, and its bits."""
    if isinstance(condition, bool):
        return (_GIVEN if condition else _ABSENT), 0
    return _ONE_OF, sum(1 << value for value in condition)


def _source(argument: str, names: list[str], types: list[str]) -> tuple[int, int]:
    """What the native code takes an argument of a backward from, and which one of these."""
    word, _, of = argument.partition(" ")
    if of and word in ("grad", "output"):
        return (_GRAD if word == "grad" else _OUTPUT), int(of)
    if of and word == "sizes":
        return _SIZES, names.index(of)
    for one, source in (("wanted", _WANTED), ("keeps graph", _KEEPS_GRAPH), ("none", _NONE)):
        if argument == one:
            return source, 0
    index = names.index(argument)
    if "Tensor" in types[index]:
        return _INPUT, index
    return (_INTS if "List" in types[index] else _NUMBER), index


def _array(numbers: list[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)
