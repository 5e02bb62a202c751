"""A model's operations, recorded once for a kind of input and run in one native call.

Between two kernels Python, modules and the dispatcher take about 20 µs, which is more than many a
kernel of a small network at batch 1. An accelerated model has no control flow left, so its
operations can be written down while it runs and repeated by kernels/cpu/program.cpp.

A program stands for the graph as long as nothing is changed or watched: with hooks, modes, a
gradient or another dtype at hand, and after a weight was written, the graph itself runs.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from nnarch import library
from nnarch.accelerate.graph import layer_of
from nnarch.accelerate.guard import Guard
from nnarch.accelerate.trace import is_layer
from nnarch.backends import positional

# The integers that kernels/cpu/program.cpp reads.
_END, _VIEW, _TORCH, _ADD, _CHANNELS_LAST, _FROM_ANY_FORMAT = -1, -2, -3, -4, -5, -6
_NOTHING, _SOME, _VALUE, _CONSTANT, _TENSORS, _INT, _DOUBLE, _INTS, _MEMORY_FORMAT = range(9)
_MEMORY_FORMATS = [torch.contiguous_format, torch.channels_last, torch.preserve_format]

_aten = torch.ops.aten
# The last two only in inference mode, which does not split them into views and copies.
_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
}
_ADDS = {_aten.add.Tensor, _aten.add_.Tensor}
# The second only in inference mode.
_COPIES = {_aten.clone.default, _aten.contiguous.default}
# Sizes or numbers that follow from values may differ in the next call.
_DATA_DEPENDENT = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_len_torch_dispatch_stack = torch._C._len_torch_dispatch_stack
_len_torch_function_stack = torch._C._len_torch_function_stack
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_are_functorch_transforms_active = torch._C._are_functorch_transforms_active

_make_program = library.define_native(
    "make_program(Tensor[] constants, Tensor code, Tensor probes) -> int"
)
_run_program = library.define_native("run_program(Tensor[] inputs, int program) -> Tensor[]")


class Program:
    """What a recording became.

    Args:
        constants: the tensors that operations read besides the inputs.
        code: the instructions.
        guard: what must not have changed since.
        structure: of the model's output, for :func:`torch.utils._pytree.tree_unflatten`.
    """

    def __init__(
        self, constants: list[Tensor], code: Tensor, guard: Guard, structure: _pytree.TreeSpec
    ) -> None:
        with _BelowAutograd():
            probes = torch.tensor(guard.probes, dtype=torch.int64)
            self._number = _make_program(constants, code, probes)
        weakref.finalize(self, _native.nnarch_drop_program, self._number).atexit = False
        self._structure, self._guard = structure, guard
        self._is_tensor = structure.is_leaf()

    def is_current(self) -> bool:
        """Whether the model is still what was recorded."""
        return self._guard.holds() and _native.nnarch_program_is_current(self._number)

    def __call__(self, inputs: list[Tensor]) -> Any:
        """Run on inputs of the recorded shapes."""
        with _BelowAutograd():
            results = _run_program(inputs, self._number)
        if self._is_tensor:
            return results[0]
        return _pytree.tree_unflatten(results, self._structure)


def can_run(inputs: list[Any]) -> bool:
    """Whether a program may stand for the graph in this call: nobody watches, nothing is wanted
    but the outputs for plain CPU tensors."""
    if (
        library.native is None
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _is_any_autocast_enabled()
        or _are_functorch_transforms_active()
        or _has_any_global_hook()
        or forward_ad._current_level >= 0
    ):
        return False
    grad = torch.is_grad_enabled()
    return all(type(x) is Tensor and x.is_cpu and not (grad and x.requires_grad) for x in inputs)


def signature(inputs: list[Tensor]) -> tuple[Any, ...]:
    """What a program is made for."""
    return tuple((x.shape, x.stride(), x.dtype) for x in inputs)


def record(
    body: GraphModule, convert: Callable[[Tensor], Tensor], inputs: list[Tensor]
) -> tuple[Any, Program | None]:
    """Run `body` on what `convert` makes of its inputs; return its output, and the program of both
    where one can stand for them."""
    if not all(is_layer(layer_of(body, node)) for node in body.graph.find_nodes(op="call_module")):
        return body(
            *map(convert, inputs)
        ), None  # a module of the user's keeps its own control flow
    recorder = _Recorder(inputs)
    with recorder:
        output = body(*map(convert, inputs))
    return output, recorder.program(output, Guard(body))


_native: Any = library.native  # there is a program only where it is there


class _Recorder(TorchDispatchMode):
    """Writes down every operation that runs under it."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self._values: Any = WeakIdKeyDictionary()  # of inputs and outputs of operations: the number
        self._made = 0
        self._constants: list[Tensor] = []
        self._numbers: set[int] = set()  # id of the constants that are numbers of the graph's code
        self._steps: list[_Step] | None = []  # None: an operation that programs do not know
        self._inputs = len(inputs)
        for x in inputs:
            self._number(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with _BelowAutograd():
            result = func(*args, **kwargs)
        if self._steps is not None:
            try:
                self._steps.append(self._step(func, args, kwargs, result))
            except _Unknown:
                self._steps = None
        return result

    def _step(self, func: Any, args: Any, kwargs: Any, result: Any) -> _Step:
        values = positional(func, args, kwargs)
        step = _Step(values, func._schema.is_mutable)
        outputs: list[Any] = list(result) if isinstance(result, (tuple, list)) else [result]
        if not all(isinstance(tensor, Tensor) for tensor in outputs):
            raise _Unknown
        if func.namespace == library.NAMESPACE:
            op = library.OPS.get(func._opname)
            if op is None or not op.has_native or func is not op.overload:
                raise _Unknown
            step.code = [library.native_op_names().index(op.name)]
            self._add_arguments(step, func, values)
        elif func in _VIEWS and outputs[0].data_ptr() == args[0].data_ptr():
            step.code = [_VIEW, self._read(step, values[0]), *_ints(outputs[0].shape)]
            step.counts_outputs = False
        elif func in _COPIES and _is_image_to_channels_last(*values):
            step.code = [_CHANNELS_LAST, self._read(step, values[0])]
            step.counts_outputs = False
        elif func in _ADDS and outputs[0].is_floating_point():
            if step.writes and not self._may_replace(*values[:2]):
                raise _Unknown
            step.code, step.writes = [_ADD], False
            for operand in values[:2]:
                self._add_tensor(step, operand)
            step.code += _double(values[2])
            step.counts_outputs = False
        elif func.namespace == "aten" and not _DATA_DEPENDENT.intersection(func.tags):
            step.code = [_TORCH, *_text(func._schema.name), *_text(func._schema.overload_name)]
            self._add_arguments(step, func, values)
            step.code.append(isinstance(result, list))
        else:
            raise _Unknown
        step.outputs = [self._number(tensor) for tensor in outputs]
        return step

    def _may_replace(self, x: Tensor, other: Any) -> bool:
        """Whether ``x + other`` may stand for ``x += other``: it is like `x`, of which nobody holds
        a view, the caller included."""
        like = isinstance(other, Tensor) and (other.shape, other.dtype) == (x.shape, x.dtype)
        storage = x.untyped_storage().data_ptr()
        sharing = [t for t in self._values if t.untyped_storage().data_ptr() == storage]
        return like and all(t is x for t in sharing) and self._values.get(x, 0) >= self._inputs

    def _add_arguments(self, step: _Step, func: Any, values: Sequence[Any]) -> None:
        step.code.append(len(values))
        for argument, value in zip(func._schema.arguments, values, strict=True):
            self._add_argument(step, argument.type, value)

    def _add_argument(self, step: _Step, kind: Any, value: Any) -> None:
        if kind.kind() == "OptionalType":
            if value is None:
                step.code.append(_NOTHING)
                return
            step.code.append(_SOME)
            kind = kind.getElementType()
        name = kind.kind()
        if name == "TensorType":
            self._add_tensor(step, value)
        elif name in ("IntType", "BoolType") and isinstance(value, int):
            step.code += [_INT, int(value)]
        elif name == "FloatType":
            step.code += [_DOUBLE, *_double(value)]
        elif name == "ListType" and kind.getElementType().kind() == "OptionalType":
            raise _Unknown  # Tensor?[]: indices
        elif name == "ListType" and all(type(v) is int for v in value):
            step.code += [_INTS, *_ints(value)]
        elif name == "ListType" and all(isinstance(v, Tensor) for v in value):
            step.code += [_TENSORS, len(value)]
            for tensor in value:
                self._add_tensor(step, tensor)
        elif value in _MEMORY_FORMATS:
            step.code += [_MEMORY_FORMAT, _MEMORY_FORMATS.index(value)]
        else:
            raise _Unknown

    def _add_tensor(self, step: _Step, value: Any) -> None:
        if isinstance(value, Tensor) and value in self._values:
            step.code += [_VALUE, self._read(step, value)]
            return
        if isinstance(value, (int, float)):  # x * 2: torch takes the number as a tensor
            if not step.weighs_more_than_numbers:
                raise _Unknown
            value = torch.tensor(value, dtype=torch.float64)
            self._numbers.add(id(value))
        step.code += [_CONSTANT, len(self._constants)]
        self._constants.append(value)

    def _read(self, step: _Step, tensor: Tensor) -> int:
        number = self._values.get(tensor)
        if number is None:
            raise _Unknown
        step.read.append(number)
        return number

    def _number(self, tensor: Tensor) -> int:
        number = self._values[tensor] = self._made
        self._made += 1
        return number

    def program(self, output: Any, guard: Guard) -> Program | None:
        """The program of what was recorded, or None where it holds more than programs can do."""
        leaves, structure = _pytree.tree_flatten(output)
        results = [self._values.get(x) if isinstance(x, Tensor) else None for x in leaves]
        if not self._steps or None in results:
            return None
        if not guard.owned.union(self._numbers).issuperset(map(id, self._constants)):
            return None
        _spare_conversions(self._steps, results)
        code = [self._made, *_instructions(self._steps, results)]
        return Program(self._constants, torch.tensor(code), guard, structure)


class _Unknown(Exception):
    """Something that a program cannot hold."""


class _Step:
    """One operation.

    Attributes:
        code: the operation and its arguments, as the native code reads them.
        read: the values it reads.
        outputs: the values it makes.
        writes: whether it writes into one of these.
        counts_outputs: whether their number is written; it is one for some operations.
        weighs_more_than_numbers: whether an argument decides the dtype of the result, so that a
            number may stand there as a tensor of float64.
    """

    def __init__(self, values: Sequence[Any], writes: bool) -> None:
        self.writes = writes
        self.code: list[int] = []
        self.read: list[int] = []
        self.outputs: list[int] = []
        self.counts_outputs = True
        self.weighs_more_than_numbers = any(
            isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 0 for v in values
        )


def _is_image_to_channels_last(x: Tensor, memory_format: Any) -> bool:
    kinds = (torch.float32, torch.float64)
    return x.dim() == 4 and x.dtype in kinds and memory_format is torch.channels_last


def _ints(values: Sequence[int]) -> list[int]:
    return [len(values), *values]


def _text(text: str) -> list[int]:
    return _ints(list(text.encode()))


def _double(value: float) -> tuple[int, ...]:
    return struct.unpack("q", struct.pack("d", value))


def _spare_conversions(steps: list[_Step], results: list[Any]) -> None:
    """Let a convolution read what is converted to channels_last for it alone.

    It copies its input into scratch memory anyway: at 3×224×224 the conversion takes 120 µs.
    """
    convolution = library.native_op_names().index("conv2d")
    for i, step in reversed(list(enumerate(steps))):
        if step.code[0] != _CHANNELS_LAST:
            continue
        (source,), (made,) = step.read, step.outputs
        readers = [s for s in steps if made in s.read]
        if made in results or len(readers) != 1 or readers[0].read.count(made) != 1:
            continue
        reader = readers[0]
        if any(between.writes for between in steps[i + 1 : steps.index(reader)]):
            continue
        if reader.code[0] == convolution and reader.code[2:4] == [_VALUE, made]:
            reader.code[:4] = [_FROM_ANY_FORMAT, *reader.code[:3], source]
            reader.read[reader.read.index(made)] = source
            del steps[i]


def _instructions(steps: list[_Step], results: list[Any]) -> Iterator[int]:
    """The code of all steps; a value that nothing reads any more is let go at once."""
    last_step: dict[int, int] = {}
    for i, step in enumerate(steps):
        last_step |= dict.fromkeys((*step.read, *step.outputs), i)
    for i, step in enumerate(steps):
        done = [v for v, last in last_step.items() if last == i and v not in results]
        outputs = _ints(step.outputs) if step.counts_outputs else step.outputs
        yield from (*step.code, *outputs, *_ints(done))
    yield from (_END, *_ints(results))
