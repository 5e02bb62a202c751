"""How a declared operation is called at the least cost that its arguments allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from nnarch.direct import DECLINED, NO_DUAL_LEVEL, WANTS_GRADIENT, dual_level, is_watched

if TYPE_CHECKING:
    from nnarch.library import Op

_GpuCall = Callable[[tuple[Any, ...]], Any]

_SIZE_OVERFLOW = "size overflows int64"  # kernels/cpu/tensor.h
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


def cheap_call(
    op: Op, run_on_a_gpu: _GpuCall, backward: Any, setup_context: Any
) -> Callable[..., Any]:
    """The callable that runs an operation, by what the call needs (ADR 2, 8, 10 and 12).

    Plain tensors, no gradient wanted: straight to the kernel; not so plain: below autograd. A
    gradient wanted: the kernel and a node in C++, where the operation has one; else an
    autograd.Function of the same formula, at a fraction of what the registered one costs a call;
    under functorch, the form of it that functorch asks for. Under torch.compile and
    torch.jit.trace: the registered operation.
    """
    overload = op.overload
    run = overload._op  # what its __call__ calls
    direct, on_a_gpu = op.direct, _gpu_call(op, run_on_a_gpu)
    is_grad_enabled = torch.is_grad_enabled
    is_inference_mode = torch.is_inference_mode_enabled
    is_compiling, in_dynamo = torch.compiler.is_compiling, torch.compiler.is_dynamo_compiling
    tracing_state = torch._C._get_tracing_state
    in_functorch = torch._C._are_functorch_transforms_active
    Tensor = torch.Tensor
    # isinstance(1, Tensor) costs 0.1 µs: Tensor's metaclass answers. Schemas begin with tensors.
    kinds = [str(argument.type) for argument in overload._schema.arguments]
    tensors = 1 + max((i for i, kind in enumerate(kinds) if "Tensor" in kind), default=-1)
    family = f"{op.name}: "
    apply = overload
    if setup_context:
        function = _autograd_function(op, on_a_gpu, backward, setup_context)
        apply = _cheap_apply(function, len(overload._schema.returns))
    transformed = _functorch_function(op, backward, setup_context or _keep_nothing).apply

    def call(*args: Any) -> Any:
        try:
            if in_dynamo():  # answers sooner than is_compiling
                return overload(*args)
            result = direct(*args)  # other tracers' tensors are not plain
            if result is not DECLINED and result is not WANTS_GRADIENT:
                return result
            if is_compiling():
                return overload(*args)
            if tracing_state() is not None:
                return overload(*args)
            if dual_level() != NO_DUAL_LEVEL:
                _refuse_tangents(op.name, args[:tensors])
            if result is WANTS_GRADIENT:
                return transformed(*args) if in_functorch() else apply(*args)
            if is_inference_mode():  # is below autograd already
                result = on_a_gpu(args)
                return run(*args) if result is DECLINED else result
            if is_grad_enabled():
                for a in args[:tensors]:
                    if a is not None and isinstance(a, Tensor) and a.requires_grad:
                        return transformed(*args) if in_functorch() else apply(*args)
            result = on_a_gpu(args)
            if result is not DECLINED:
                return result
            with _BelowAutograd():
                return run(*args)
        except RuntimeError as error:
            if op.check is not None:
                op.check(*args)  # says precisely what the native code refused
            refusal = str(error).partition("\n")[0]
            if refusal.startswith(family):  # only the native code can tell
                raise ValueError(refusal) from None
            if refusal == _SIZE_OVERFLOW:
                raise ValueError(family + refusal) from None
            raise

    call.__name__ = op.name
    call.overload = overload  # type: ignore[attr-defined]
    return call


_is_grad_enabled = torch.is_grad_enabled
_tracing_state = torch._C._get_tracing_state


def wants_gradient(*tensors: Any) -> bool:
    """Whether the gradient of one of these may be asked for."""
    if _is_grad_enabled():
        for t in tensors:
            if t is not None and getattr(t, "requires_grad", False):
                return True
    return _tracing_state() is not None and _may_be_recorded_with_gradient(tensors)


def _may_be_recorded_with_gradient(tensors: tuple[Any, ...]) -> bool:
    """The same under torch.jit.trace, whatever the mode.

    It compares its graph with that of a second run, without gradients, in which parameters alone
    say that they want one. Operations without parameters are recorded as if they did.
    """
    parameters = [t for t in tensors if isinstance(t, torch.nn.Parameter)]
    return not parameters or any(p.requires_grad for p in parameters)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """The `setup_context` of a backward that raises."""


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Below autograd, derivatives in forward mode would be lost without a word."""
    for a in args:
        if isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None:
            raise NotImplementedError(
                f"nnarch::{name} has no derivatives in forward mode (jvp, jacfwd, dual tensors); "
                "vjp, jacrev and backward work"
            )


def first_output(call: Callable[..., Any], direct: Callable[..., Any]) -> Callable[..., Any]:
    """`call` for the first of its outputs; a plain call makes no tensors of the others."""
    in_dynamo = torch.compiler.is_dynamo_compiling

    def first(*args: Any) -> Any:
        if not in_dynamo():
            result = direct(*args)
            if result is not DECLINED and result is not WANTS_GRADIENT:
                return result
        return call(*args)[0]

    return first


def _gpu_call(op: Op, run_on_a_gpu: _GpuCall) -> _GpuCall:
    """A function that runs `op` on a GPU past the dispatcher, a third of a small call there.

    It declines where the dispatcher would do more than call the launcher: other devices, modes,
    transforms, profilers, subclasses. No tensor may want a gradient.
    """
    if op.gpu is None:
        return lambda _: DECLINED
    Tensor, Parameter = torch.Tensor, torch.nn.Parameter
    kinds = [str(argument.type) for argument in op.overload._schema.arguments]
    places = [i for i, kind in enumerate(kinds) if "Tensor" in kind]

    def run(args: tuple[Any, ...]) -> Any:
        first = args[0]
        if not (isinstance(first, Tensor) and first.is_cuda and len(args) == len(kinds)):
            return DECLINED
        if is_watched():
            return DECLINED
        for i in places:
            kind = type(args[i])
            if kind is not Tensor and kind is not Parameter and args[i] is not None:
                return DECLINED
        return run_on_a_gpu(args)

    return run


def _cheap_apply(function: Any, outputs: int) -> Callable[..., Any]:
    """`function.apply` past the part of it in Python: that looks at every argument for what
    functorch left behind, 2.9 µs of conv2d's 6.8. Outputs that autograd does not see are None."""
    apply = super(torch.autograd.Function, function).apply  # type: ignore[attr-defined]
    if outputs == 1:
        return apply
    missing = (None,) * outputs

    def complete(*args: Any) -> tuple[Any, ...]:
        seen = apply(*args)
        if type(seen) is not tuple:
            return seen, *missing[1:]
        return seen if len(seen) == outputs else seen + missing[len(seen) :]

    return complete


def _autograd_function(
    op: Op, on_a_gpu: _GpuCall, backward_formula: Any, setup_context: Any
) -> Any:
    run, direct = op.overload._op, op.direct

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = direct(*args)
            if output is DECLINED:
                output = on_a_gpu(args)
            if output is DECLINED:
                with _BelowAutograd():
                    output = run(*args)
            seen = setup_context(ctx, args, output)
            return output if seen is None else output[0] if seen == 1 else output[:seen]

        backward = staticmethod(backward_formula)

    Function.__name__ = Function.__qualname__ = f"nnarch_{op.name}"
    # What autograd calls; torch's own asks every time whether that is `backward` or `vjp`.
    Function._backward_cls.apply = backward_formula  # type: ignore[attr-defined]
    return Function


def _functorch_function(op: Op, backward_formula: Any, setup: Any) -> Any:
    """The same with a `setup_context` of its own, which costs every call a few µs more."""

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return op.overload(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward_formula(ctx, *grads)

    return Function
