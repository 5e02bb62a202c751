"""Triton's interpreter in half its time, with the same results."""

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
    a process that does nothing but interpret can leave them replaced. It checks every integer sum
    and product for overflow, which takes a quarter of the rest and finds nothing in small tensors.
    """
    interpreter._patch_lang = _patched_for_good(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
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
