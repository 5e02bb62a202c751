"""Triton's interpreter in a third of its time, with the same results."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from types import FunctionType, ModuleType

from triton import language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Do once what the interpreter does for every operation, or for every call of a function.

    It replaces members of triton.language at every launch and at every call of a jitted function;
    a process that does nothing but interpret can leave them replaced. It describes the shape of
    every value anew. It checks every integer sum and product for overflow, which takes a quarter
    of the rest and finds nothing in small tensors.
    """
    interpreter._patch_lang = _patched_for_good(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    _share_attributes(tl.block_type, _type_key)
    _share_attributes(tl.tensor, lambda handle, type: type.name, own=("handle", "type"))
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


class _Kept:
    """A scope whose end takes nothing back."""

    def restore(self) -> None:
        pass


def _patched_for_good(patch: Callable) -> Callable:
    seen: set[FunctionType] = set()
    patched: set[ModuleType] = set()

    def patch_lang(function: FunctionType) -> _Kept:
        if function not in seen:
            seen.add(function)
            modules = {m for m in function.__globals__.values() if inspect.ismodule(m)}
            modules &= {tl, tl.core}
            if not modules <= patched:
                patch(function)
                patched.update(modules)
        return _Kept()

    return patch_lang


def _remembered(numpy_dtype: Callable) -> Callable:
    of_scalar = functools.cache(numpy_dtype)  # pointers have no hash
    return lambda dtype: (numpy_dtype if dtype.scalar.is_ptr() else of_scalar)(dtype.scalar)


def _type_key(element_ty: tl.dtype, shape: object) -> tuple[str, ...]:
    lengths = shape.value if isinstance(shape, tl.constexpr) else shape
    return element_ty.name, *(str(n) for n in lengths)


def _share_attributes(cls: type, key: Callable, own: tuple[str, ...] = ()) -> None:
    """Give a new object those of the first that was made with arguments of the same key."""
    make = cls.__init__
    made: dict[object, dict[str, object]] = {}

    def __init__(self: object, *arguments: object) -> None:
        attributes = made.get(k := key(*arguments))
        if attributes is None:
            make(self, *arguments)
            made[k] = {n: v for n, v in self.__dict__.items() if n not in own}
        else:
            self.__dict__ = attributes | dict(zip(own, arguments, strict=True) if own else ())

    cls.__init__ = __init__
