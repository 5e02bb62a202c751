"""Launch plans: an operation that was called before is repeated without deciding anything again.

A launcher looks at its arguments, chooses a tile, builds 20 to 40 arguments and lets Triton look at
each of them: 60 to 100 µs of Python for a kernel of 10. All of that depends on shapes, strides,
dtypes, alignment, scalars and a few settings, not on values. So the second call with the same ones
is recorded: which kernels ran, on which grid, and where each pointer came from (an argument, or
memory that the launcher allocated). Every later call allocates, fills in the pointers and launches.

What cannot be repeated that way is never planned: a launcher that reads a value on the host,
launches something that is no Triton kernel, or takes a list of tensors.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from nnarch import library, precision
from nnarch.kernels.gpu import replay
from nnarch.kernels.gpu.plan import Allocate, KernelLaunch, Place, Plan, TorchCall

LIMIT = 1024
"""Plans kept at most for one operation; then all of them are dropped."""

_aten = torch.ops.aten
_EMPTY = {
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}


# ----------------------------------------------------------------------------------- recording


class _Local(threading.local):
    recorder: _Recorder | None = None
    paused = 0


_local = _Local()


class _Refused(Exception):
    pass


class _Recorder(TorchDispatchMode):
    """Watches one run of a launcher."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self.plan = Plan()
        self.refused = ""
        self.launching = False
        self._inputs = self._slots = len(inputs)
        self._seen = list(inputs)  # kept alive, so that an id stays a tensor's own
        self._places = {id(t): (i, 0) for i, t in enumerate(inputs)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        launcher = None if self.launching else _launcher(func)
        if launcher is not None:
            try:
                with self:  # its steps are the plan's
                    return launcher(*args)
            except (ImportError, NotImplementedError) as error:  # the reference runs instead
                self.refused = str(error)
        result = func(*args, **kwargs)
        if not self.launching and not self.refused:  # the interpreter uses torch for itself
            try:
                self._note(func, args, kwargs, result)
            except _Refused as error:
                self.refused = str(error)
        return result

    def _note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        results = result if isinstance(result, (list, tuple)) else (result,)
        if not all(isinstance(r, torch.Tensor) for r in results):
            raise _Refused(str(func))  # a value on the host
        if func in _EMPTY:
            self.plan.steps.append(_allocation(result))
            self._made(result)
            return
        writes = func._schema.is_mutable
        if not writes and all(self._is_view(r, args) for r in results):
            return
        if any(r.device != self._seen[0].device for r in results):
            raise _Refused(str(func))

        places: list[tuple[int, Place | list[Place]]] = []
        for i, a in enumerate(args):
            if isinstance(a, torch.Tensor):
                places.append((i, self.place(a)))
            elif isinstance(a, (list, tuple)) and any(isinstance(t, torch.Tensor) for t in a):
                places.append((i, [self.place(t) for t in a]))  # an absent one refuses
        if any(isinstance(a, torch.Tensor) for a in kwargs.values()):
            raise _Refused(str(func))
        tensors = {i for i, _ in places}  # a plan holds no memory
        others = tuple(None if i in tensors else a for i, a in enumerate(args))
        new = () if writes else results
        self.plan.steps.append(TorchCall(func, others, kwargs, places, [*map(_allocation, new)]))
        for r in new:
            self._made(r)

    def _is_view(self, result: torch.Tensor, args: Any) -> bool:
        """Whether `result` lies in the memory of an argument; if so, remember where."""
        storage = result.untyped_storage()._cdata
        for source in args:
            known = self._places.get(id(source))
            if known is not None and source.untyped_storage()._cdata == storage:
                slot, offset = known
                self._remember(result, slot, offset + _start(result) - _start(source))
                return True
        return False

    def _made(self, new: torch.Tensor) -> None:
        self._remember(new, self._slots, 0)
        self._slots += 1

    def _remember(self, tensor: torch.Tensor, slot: int, offset: int) -> None:
        self._seen.append(tensor)
        self._places[id(tensor)] = (slot, offset)

    def place(self, tensor: torch.Tensor) -> Place:
        """Where a tensor lies; refuses what is none of the arguments and was not made here."""
        known = self._places.get(id(tensor))
        if known is None:
            raise _Refused("a tensor of unknown origin")
        return Place(*known, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def launched(self, kernel: Any, compiled: Any, grid: Any, arguments: dict[str, Any]) -> None:
        names = list(kernel.arg_names)
        if compiled is None:
            start, values = kernel[grid], [arguments[name] for name in names]
        else:
            start = compiled[(*grid, 1, 1)[:3]]
            values = [arguments.get(p.name, p.default) for p in kernel.params]
        places = [(i, self.place(v)) for i, v in enumerate(values) if isinstance(v, torch.Tensor)]
        described = [
            (i, self.place(v.base), without_base(v))
            for i, v in enumerate(values)
            if isinstance(v, TensorDescriptor)
        ]
        for position, *_ in places + described:
            values[position] = None
        step = KernelLaunch(start, compiled, grid, names, values, places, described)
        self.plan.steps.append(step)

    def finish(self, result: Any) -> Plan | None:
        """The plan, or None where the run cannot be repeated."""
        if self.refused:
            return None
        try:
            if isinstance(result, torch.Tensor):
                self.plan.results = self._output(result)
            else:
                self.plan.results = tuple(r if r is None else self._output(r) for r in result)
        except _Refused:
            return None
        self.plan.algorithm = library.ran.algorithm
        return self.plan

    def _output(self, tensor: torch.Tensor) -> Place:
        place = self.place(tensor)
        if place.slot < self._inputs:
            raise _Refused("an argument is returned")
        return place


def _launcher(func: Any) -> Callable[..., Any] | None:
    """What runs on a GPU where `func` is an operation of ours; launchers may call others."""
    namespace, _, name = func._schema.name.partition("::")
    op = library.OPS.get(name) if namespace == library.NAMESPACE else None
    planned = op is not None and op.gpu is not None and op.gpu_backend == "triton"
    return op.checked(op.launcher()) if op is not None and planned else None


def _allocation(new: torch.Tensor) -> Allocate:
    return Allocate(tuple(new.shape), new.stride(), new.dtype, new.device)


def without_base(descriptor: TensorDescriptor) -> TensorDescriptor:
    """A descriptor without its tensor: a plan holds no memory."""
    found = copy.copy(descriptor)
    found.base = None
    return found


def _start(tensor: torch.Tensor) -> int:
    """Bytes from the start of the storage; an empty tensor's pointer would not tell."""
    return tensor.storage_offset() * tensor.element_size()


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: Any) -> None:
    """Launch a Triton kernel; note it in the plan that is being recorded, if any."""
    recorder = _local.recorder
    if recorder is None or recorder.refused:
        kernel[grid](**arguments, **options)
        return
    recorder.launching = True
    try:
        compiled = kernel[grid](**arguments, **options)
    finally:
        recorder.launching = False
    try:
        recorder.launched(kernel, compiled, grid, arguments)
    except _Refused as error:
        recorder.refused = str(error)


def refuse(why: str) -> None:
    """Say that what the launcher does now cannot be repeated by a plan."""
    if _local.recorder is not None:
        _local.recorder.refused = why


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Neither record nor use plans: something else than the arguments decides in the block."""
    _local.paused += 1
    try:
        yield
    finally:
        _local.paused -= 1


# --------------------------------------------------------------------------------------- using


_SEEN_ONCE, _NEVER = object(), object()
_caches: list[dict[Any, Any]] = []


def forget() -> None:
    """Drop all plans: of use where a test changes what launchers decide."""
    for cache in _caches:
        cache.clear()
    replay.forget()


def planned(launcher: Callable[..., Any], direct: Any = None) -> Callable[..., Any]:
    """`launcher`, whose calls are repeated by plan where they can be.

    The first call of a kind only runs; the second is recorded, so that shapes that never come back
    (a growing cache of keys) cost nothing more. `direct` is the operation's direct function, which
    repeats the plan itself from then on where it can (`replay.py`).
    """
    plans: dict[Any, Any] = {}
    _caches.append(plans)

    @functools.wraps(launcher)
    def run(*args: Any) -> Any:
        if _local.paused or _local.recorder is not None:
            return launcher(*args)
        inputs: list[torch.Tensor] = []
        pointers: list[int] = []
        key = _key(args, inputs, pointers)
        if key is None:
            return launcher(*args)
        known = plans.get(key)
        if known is None:
            if len(plans) >= LIMIT:
                plans.clear()
            plans[key] = _SEEN_ONCE
        elif known is _SEEN_ONCE:
            result, plan = _record(launcher, args, inputs)
            plans[key] = plan or _NEVER
            if plan is not None and direct is not None:
                replay.give(direct, args, plan, LIMIT)
            return result
        elif known is not _NEVER:
            return known.run(inputs, pointers)
        return launcher(*args)

    return run


def _record(launcher: Callable[..., Any], args: Any, inputs: list[torch.Tensor]) -> Any:
    recorder = _Recorder(inputs)
    _local.recorder = recorder
    try:
        with recorder:
            result = launcher(*args)
    finally:
        _local.recorder = None
    return result, recorder.finish(result)


_SCALARS = {int, float, bool, type(None), str, torch.dtype}


def _key(args: Any, inputs: list[torch.Tensor], pointers: list[int]) -> Any:
    """What a launcher may look at, or None where no plan is possible; fills the two lists."""
    parts: list[Any] = []
    device = None
    exact = False
    for a in args:
        if type(a) in _SCALARS:
            parts.append(a)
        elif isinstance(a, torch.Tensor):
            pointer, dtype = a.data_ptr(), a.dtype
            if device is None:
                device = a.get_device()
            elif a.get_device() != device:
                return None  # lengths on the host, say: their values may be read
            inputs.append(a)
            pointers.append(pointer)
            parts += (a.shape, a.stride(), dtype, pointer & 15)
            exact = exact or dtype is torch.float32
        elif a and isinstance(a[0], torch.Tensor):
            return None
        else:
            parts.append(tuple(a))
    if device is None or (device >= 0 and device != torch._C._cuda_getDevice()):
        return None
    parts.append(device)
    if len({id(t) for t in inputs}) < len(inputs):  # one tensor for two arguments: so in the plan
        parts.append(tuple([id(t) for t in inputs].index(id(t)) for t in inputs))
    if exact:  # what decides how float32 is multiplied
        parts += (precision.get_precision(), _fp32_precision("cuda", "conv"))
        parts.append(_fp32_precision("cuda", "matmul"))
    return tuple(parts)


_fp32_precision = torch._C._get_fp32_precision_getter
