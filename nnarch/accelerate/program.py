"""A model's operations, recorded once for a kind of input and run in one native call.

Between two kernels Python, modules and the dispatcher take about 20 µs, which is more than many a
kernel of a small network at batch 1. An accelerated model has no control flow left, so its
operations can be written down while it runs and repeated by kernels/cpu/program.cpp.

A program stands for the graph as long as nothing is changed or watched: with hooks, modes, a
gradient or another dtype at hand, and after a weight was written, the graph itself runs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from nnarch import library
from nnarch.accelerate.graph import layer_of
from nnarch.accelerate.trace import is_layer
from nnarch.backends import positional
from nnarch.nn.packing import PackedWeightMixin
from nnarch.precision import get_precision

# The integers that kernels/cpu/program.cpp reads.
_END, _VIEW = -1, -2
_NOTHING, _VALUE, _OPTIONAL_VALUE, _CONSTANT, _OPTIONAL_CONSTANT, _INT, _DOUBLE, _INTS = range(8)

_aten = torch.ops.aten
# The last two only in inference mode, which does not split them into views and copies.
_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
}
_BelowAutograd = torch._C._AutoDispatchBelowAutograd

_run_program = library.define_native(
    "run_program(Tensor[] inputs, Tensor[] constants, Tensor code) -> Tensor[]"
)


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
        self._constants, self._code, self._structure = constants, code, structure
        self._guard = guard

    def is_current(self) -> bool:
        """Whether the model is still what was recorded."""
        return self._guard.holds()

    def __call__(self, inputs: list[Tensor]) -> Any:
        """Run on inputs of the recorded shapes."""
        with _BelowAutograd():
            results = _run_program(inputs, self._constants, self._code)
        return _pytree.tree_unflatten(results, self._structure)


def can_run(inputs: list[Any]) -> bool:
    """Whether a program may stand for the graph in this call: nobody watches, nothing is wanted
    but the outputs for plain CPU tensors."""
    if (
        library.native is None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
    ):
        return False
    grad = torch.is_grad_enabled()
    return all(
        type(x) is Tensor and x.device.type == "cpu" and not (grad and x.requires_grad)
        for x in inputs
    )


def signature(inputs: list[Tensor]) -> tuple[Any, ...]:
    """What a program is made for."""
    return tuple((x.shape, x.stride(), x.dtype) for x in inputs)


def record(body: GraphModule, inputs: list[Tensor]) -> tuple[Any, Program | None]:
    """Run `body`; return its output, and its program where one can stand for it."""
    if not all(is_layer(layer_of(body, node)) for node in body.graph.find_nodes(op="call_module")):
        return body(*inputs), None  # a module of the user's keeps its own control flow
    recorder = _Recorder(inputs)
    with recorder:
        output = body(*inputs)
    return output, recorder.program(output, Guard(body))


class Guard:
    """The state of a model that a program depends on.

    Attributes:
        owned: id of every parameter, buffer and packed weight. Other constants (a mask made by the
            graph's own code, say) may differ in the next call, so no program is made of them.
    """

    def __init__(self, body: nn.Module) -> None:
        modules = list(body.modules())
        self._states = [vars(module) for module in modules]
        self._hooks = [
            hooks
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]
        self._packed = [
            (module, module._packed)
            for module in modules
            if isinstance(module, PackedWeightMixin) and module._packed is not None
        ]
        self._tensors = [
            (tensors, name, tensor)
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
        ]
        self.owned = {id(tensor) for *_, tensor in self._tensors}
        self.owned |= {id(packed) for _, cache in self._packed for packed in cache.packed.values()}
        self._precision = get_precision()  # packed weights follow it

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        if any(self._hooks) or get_precision() != self._precision:
            return False
        for state in self._states:
            if state["training"] or "forward" in state:
                return False
        for tensors, name, tensor in self._tensors:
            if tensors.get(name) is not tensor:
                return False
        for module, cache in self._packed:
            weight = module._parameters["weight"]
            if module._packed is not cache or weight is None or not cache.is_current(weight):
                return False
        return True


class _Recorder(TorchDispatchMode):
    """Writes down every operation that runs under it."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self._values: Any = WeakIdKeyDictionary()  # of inputs and outputs of operations: the number
        self._made = 0
        self._constants: list[Tensor] = []
        self._steps: list[_Step] | None = []  # None: an operation that programs do not know
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
        if func in _VIEWS:
            step = _Step(_VIEW, [self._values.get(args[0])])
            if step.read == [None] or result.data_ptr() != args[0].data_ptr():  # or is a copy
                raise _Unknown
            step.code = [*step.read, *_ints(result.shape)]
        else:
            op = library.OPS.get(func._opname) if func.namespace == library.NAMESPACE else None
            if op is None or not op.has_native or func is not op.overload:
                raise _Unknown
            step = _Step(library.native_op_names().index(op.name), [])
            values = positional(func, args, kwargs)
            step.code = [len(values)]
            for argument, value in zip(func._schema.arguments, values, strict=True):
                self._add_argument(step, argument.type, value)
        outputs = result if isinstance(result, tuple) else (result,)
        step.outputs = [self._number(tensor) for tensor in outputs]
        return step

    def _add_argument(self, step: _Step, kind: Any, value: Any) -> None:
        optional = kind.kind() == "OptionalType"
        if optional and value is None:
            step.code.append(_NOTHING)
        elif isinstance(value, Tensor):
            number = self._values.get(value)
            if number is None:
                step.code += [_OPTIONAL_CONSTANT if optional else _CONSTANT, len(self._constants)]
                self._constants.append(value)
            else:
                step.code += [_OPTIONAL_VALUE if optional else _VALUE, number]
                step.read.append(number)
        elif kind.kind() in ("IntType", "BoolType"):
            step.code += [_INT, int(value)]
        elif kind.kind() == "FloatType":
            step.code += [_DOUBLE, *struct.unpack("q", struct.pack("d", value))]
        elif kind.kind() == "ListType" and all(type(v) is int for v in value):
            step.code += [_INTS, *_ints(value)]
        else:
            raise _Unknown

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
        if not all(id(constant) in guard.owned for constant in self._constants):
            return None
        code = [self._made, *_instructions(self._steps, results)]
        return Program(self._constants, torch.tensor(code), guard, structure)


class _Unknown(Exception):
    """Something that a program cannot hold."""


class _Step:
    """One operation.

    Args:
        op: its number.
        read: the values it reads.

    Attributes:
        code: its arguments as the native code reads them.
        outputs: the values it makes.
    """

    def __init__(self, op: int, read: list[Any]) -> None:
        self.op, self.read = op, read
        self.code: list[int] = []
        self.outputs: list[int] = []


def _ints(values: Sequence[int]) -> list[int]:
    return [len(values), *values]


def _instructions(steps: list[_Step], results: list[Any]) -> Iterator[int]:
    """The code of all steps; a value that nothing reads any more is let go at once."""
    last_step: dict[int, int] = {}
    for i, step in enumerate(steps):
        last_step |= dict.fromkeys((*step.read, *step.outputs), i)
    for i, step in enumerate(steps):
        done = [v for v, last in last_step.items() if last == i and v not in results]
        outputs = step.outputs if step.op == _VIEW else _ints(step.outputs)
        yield from (step.op, *step.code, *outputs, *_ints(done))
    yield from (_END, *_ints(results))
