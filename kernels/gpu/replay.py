"""Launch plans that run without Python (ADR 13): `replay.cpp` is told here what a plan does.

A plan in Python takes 20 to 30 µs a call, most of a small kernel's time, and a training step runs
it twice an operation, the second time in a thread that has to wait for Python's lock. Where all its
steps are allocations, copies and kernels, the native library repeats it, called by the direct
functions (ADR 8) and by the nodes of autograd's graph (ADR 12).
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.tools.tensor_descriptor import TensorDescriptor

from nnarch import direct, library
from nnarch.kernels.gpu.plan import Allocate, KernelLaunch, Place, Plan, Step, TorchCall

_aten = torch.ops.aten
_NOTHING, _ZEROS, _COPY = range(3)  # what a new tensor holds
_COPIED = {
    _aten.clone.default, _aten._to_copy.default,
    _aten.contiguous.default, _aten.to.dtype,  # so before torch 2.12, below autograd
}  # fmt: skip
_ZEROED = {_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default}

# Their numbers in torch's stable interface.
_DTYPES = {
    torch.uint8: 0, torch.int8: 1, torch.int16: 2, torch.int32: 3, torch.int64: 4,
    torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bool: 11, torch.bfloat16: 15,
}  # fmt: skip
_DEVICES = {"cpu": 0, "cuda": 1, "meta": 14}
# How struct writes a number of a kernel's argument.
_FORMATS = {
    "i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H",
    "u32": "I", "u64": "Q", "fp16": "e", "fp32": "f", "f32": "f", "fp64": "d",
}  # fmt: skip
_TRITONS_OWN = 2  # parameters behind a kernel's: memory that it asks Triton for, none of ours does


class _Refused(Exception):
    """The native library cannot do that step."""


def give(function: Any, arguments: tuple[Any, ...], plan: Plan, limit: int) -> bool:
    """Let a direct function repeat `plan` for calls with such arguments.

    Args:
        function: of nnarch/direct.py.
        arguments: those that the plan was recorded with.
        plan: what is to be repeated. It is kept.
        limit: plans of the operation that are kept at most; then all of them are dropped.

    Returns:
        Whether it will: False where there is no direct function or no CUDA driver, and where the
        plan has a step that only Python can do.
    """
    if function is library._declined or not is_available():
        return False
    try:
        words = _words(plan, [a for a in arguments if isinstance(a, torch.Tensor)])
    except _Refused:
        return False
    return _library().nnarch_replay_give(
        function, arguments, (ctypes.c_int64 * len(words))(*words), plan, limit
    )


def forget() -> None:
    """Drop all plans that were given."""
    if library.native is not None:
        _library().nnarch_replay_forget()


# ------------------------------------------------------------------------------------- set up


@functools.cache
def _library() -> Any:
    assert library.native is not None
    native = ctypes.PyDLL(library.native._name)
    native.nnarch_replay_setup.restype = native.nnarch_replay_forget.restype = None
    native.nnarch_replay_setup.argtypes = [
        *5 * [ctypes.c_void_p], *2 * [ctypes.c_uint64], ctypes.py_object
    ]  # fmt: skip
    native.nnarch_replay_give.restype = ctypes.c_bool
    native.nnarch_replay_give.argtypes = [
        ctypes.py_object, ctypes.py_object, ctypes.POINTER(ctypes.c_int64), ctypes.py_object,
        ctypes.c_int64,
    ]  # fmt: skip
    return native


@functools.cache
def is_available() -> bool:
    """Whether the native library can launch kernels here. It is told how, the first time."""
    if library.native is None or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        torch_cuda = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
        functions = (
            driver.cuLaunchKernel,
            driver.cuLaunchCooperativeKernel,
            driver.cuCtxGetDevice,
            torch_cuda.aoti_torch_get_current_cuda_stream,
            driver.cuTensorMapEncodeTiled,
        )
    except (OSError, AttributeError):
        return False
    set_up([ctypes.cast(f, ctypes.c_void_p).value or 0 for f in functions], torch.device("cuda"))
    return True


def set_up(functions: Sequence[int], device: torch.device) -> None:
    """Tell the native library how kernels are launched.

    Args:
        functions: addresses of the driver's ``cuLaunchKernel``, ``cuLaunchCooperativeKernel`` and
            ``cuCtxGetDevice``, of torch's ``aoti_torch_get_current_cuda_stream``, and of the
            driver's ``cuTensorMapEncodeTiled``. Zeros: not at all.
        device: whose tensors they work on.
    """
    keys = direct._keys(torch.empty(0, device=device))
    with torch.inference_mode():
        inference = direct._keys(torch.empty(0, device=device))
    _library().nnarch_replay_setup(*functions, keys, inference, _float32_settings())


def _float32_settings() -> tuple[Callable[[], str], ...]:
    """What decides how float32 is multiplied, beside :func:`nnarch.get_precision`."""
    setting = torch._C._get_fp32_precision_getter
    return tuple(functools.partial(setting, "cuda", what) for what in ("conv", "matmul"))


# ---------------------------------------------------------------------------- a plan in numbers

_Geometry = tuple[Sequence[int], Sequence[int], torch.dtype]


def _words(plan: Plan, inputs: list[torch.Tensor]) -> list[int]:
    """The numbers that replay.cpp reads, in its order."""
    slots: list[_Geometry] = [(tuple(t.shape), t.stride(), t.dtype) for t in inputs]
    words = [len(plan.steps)]
    for step in plan.steps:
        words += _step(step, slots)
    results = plan.results if isinstance(plan.results, tuple) else (plan.results,)
    words.append(len(results))
    for result in results:
        words += [0] if result is None else [1, *_view(result, slots)]
    return words


def _step(step: Step, slots: list[_Geometry]) -> list[int]:
    if isinstance(step, KernelLaunch):
        return [1, *_launch(step)]
    if isinstance(step, Allocate):
        new, words = step, [0, *_new(_NOTHING, step)]
    elif isinstance(step, TorchCall) and len(step.makes) == 1:
        new, words = step.makes[0], [0, *_torch_call(step, slots)]
    else:
        raise _Refused
    slots.append((new.size, new.stride, new.dtype))
    return words


def _new(content: int, new: Allocate) -> list[int]:
    index = -1 if new.device.index is None else new.device.index
    kind = [_known(_DTYPES, new.dtype), _known(_DEVICES, new.device.type), index]
    return [content, *kind, *_list(new.size), *_list(new.stride)]


def _torch_call(step: TorchCall, slots: list[_Geometry]) -> list[int]:
    """A copy to another layout or dtype, or zeros: all that the native library does of torch's."""
    (new,) = step.makes
    if step.function in _ZEROED:
        return _new(_ZEROS, new)
    if step.function in _COPIED:
        ((_, source),) = step.places
        if isinstance(source, Place):
            return [*_new(_COPY, new), *_view(source, slots)]
    raise _Refused


def _view(place: Place, slots: list[_Geometry]) -> list[int]:
    size, stride, dtype = slots[place.slot]
    elements, rest = divmod(place.offset, dtype.itemsize)
    if rest or place.dtype != dtype:
        raise _Refused
    whole = place.offset == 0 and (place.size, place.stride) == (size, stride)
    return [*_at(place), whole, elements, *_list(place.size), *_list(place.stride)]


def _at(place: Place) -> list[int]:
    return [place.slot, place.offset]


def _launch(step: KernelLaunch) -> list[int]:
    compiled = step.compiled
    if compiled is None or not _is_ordinary(compiled.metadata):
        raise _Refused
    metadata, signature = compiled.metadata, compiled.src.signature
    pointers = dict(step.places)
    described = {position: (place, descriptor) for position, place, descriptor in step.described}
    layouts = iter(getattr(metadata, "tensordesc_meta", None) or ())
    numbers: list[int] = []
    places: list[int] = []
    descriptions: list[int] = []
    for position, (name, value) in enumerate(zip(step.names, step.values, strict=True)):
        kind = signature.get(name)
        if kind == "constexpr":
            continue
        if position in described:
            place, descriptor = described[position]
            layout = next(layouts, None)
            descriptions += [len(numbers), *_at(place), *_description(descriptor, place, layout)]
            numbers += [0, *descriptor.shape, *descriptor.strides]
        elif position in pointers and str(kind).startswith("*"):
            places += [len(numbers), *_at(pointers[position])]
            numbers.append(0)
        else:
            numbers.append(_number(kind, value))
    numbers += _TRITONS_OWN * [0]
    grid = (*step.grid, 1, 1)[:3]
    threads = metadata.num_warps * metadata.target.warp_size
    cooperative = int(metadata.launch_cooperative_grid)
    launch = [compiled.function, *grid, threads, metadata.shared, cooperative]
    launch += [*_list(numbers), len(places) // 3, *places]
    return [*launch, len(described), *descriptions]


def _description(descriptor: TensorDescriptor, place: Place, layout: Any) -> list[int]:
    """What ``cuTensorMapEncodeTiled`` is told: dtype, order in shared memory, and what lies outside
    the tensor; then sizes, strides in bytes and the box that is read, innermost first.

    `layout` is what Triton says of an argument that it passes as one.
    """
    unusual = ("fp4_padded", "is_im2col")
    if (
        layout is None
        or any(map(layout.get, unusual))
        or getattr(descriptor, "round_f32_to_tf32", False)
    ):
        raise _Refused
    kind = TMA_DTYPE_DEVICE_TO_HOST[layout["elem_type"]]
    strides = [stride * place.dtype.itemsize for stride in descriptor.strides[:-1]]
    words = [kind, layout["swizzle"], int(descriptor.padding == "nan")]
    for numbers in (descriptor.shape, strides, layout["block_size"]):
        words += _list(numbers[::-1])
    return words


def _is_ordinary(metadata: Any) -> bool:
    """Whether nothing but the grid and the shared memory has to be said of a kernel."""
    return (
        metadata.num_ctas == 1
        and not metadata.launch_pdl
        and metadata.global_scratch_size == 0
        and metadata.profile_scratch_size == 0
        and not _hooks()
    )


def _hooks() -> bool:
    """Whether somebody watches Triton's launches."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook) for hook in hooks)


def _number(kind: Any, value: Any) -> int:
    """A number as the first bytes of a word."""
    form = _FORMATS.get(kind) if isinstance(kind, str) else None
    if form is None or not isinstance(value, (int, float)):
        raise _Refused
    return int.from_bytes(struct.pack("<" + form, value).ljust(8, b"\0"), "little", signed=True)


def _known(numbers: dict[Any, int], of: Any) -> int:
    if of not in numbers:
        raise _Refused
    return numbers[of]


def _list(numbers: Sequence[int]) -> list[int]:
    return [len(numbers), *numbers]
