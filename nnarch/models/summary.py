"""A table of a model's layers: output shapes, parameters and multiply-adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Module, MultiheadAttention
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.rnn import RNNBase, RNNCellBase
from torch.nn.utils.rnn import PackedSequence

from nnarch.nn.capsule import DenseCapsules


@dataclass(frozen=True)
class LayerRow:
    """One call of one layer."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int


@dataclass
class ModelSummary:
    """What :func:`summary` returns; print() shows the table.

    Attributes:
        model: class name of the model.
        rows: the layers in the order of their calls.
        parameters: distinct values in all parameters of the model.
        macs: multiply-adds of convolutions, linear, recurrent, attention and capsule layers.
    """

    model: str
    rows: list[LayerRow] = field(default_factory=list)
    parameters: int = 0
    macs: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations: a multiply-add is two."""
        return 2 * self.macs

    def __rich__(self) -> Table:
        table = Table(title=self.model, show_footer=True)
        table.add_column("layer", "total")
        table.add_column("type")
        table.add_column("output shape")
        table.add_column("parameters", f"{self.parameters:,}", justify="right")
        table.add_column("MFLOPs", f"{self.flops / 1e6:,.1f}", justify="right")
        for row in self.rows:
            shape = "×".join(map(str, row.output_shape))
            mflops = f"{2 * row.macs / 1e6:,.1f}" if row.macs else ""
            table.add_row(row.name, row.kind, shape, f"{row.parameters:,}", mflops)
        return table

    def __str__(self) -> str:
        buffer = StringIO()
        Console(file=buffer, width=110, color_system=None).print(self)
        return buffer.getvalue()


def summary(model: Module, input: Tensor | Sequence[Tensor] | Sequence[int]) -> ModelSummary:
    """Layers of `model` with output shapes, parameters and FLOPs, for one input.

    Convolutions, linear, recurrent, attention and capsule layers are counted; matrix products that
    a forward method writes out itself are not. Neither the model nor its BatchNorm statistics
    change.

    Args:
        model: any torch module.
        input: the shape of one floating-point input, such as ``(1, 3, 224, 224)``; then nothing is
            computed, only shapes travel. Or the input tensor, or a sequence of input tensors.

    Returns:
        A :class:`ModelSummary`; ``print()`` it for the table.

    Raises:
        TypeError: `input` is neither of these.
    """
    inputs = _inputs(model, input)
    by_shape = inputs[0].device.type == "meta"
    # Stand-ins for parameters (meta tensors) and buffers (copies): the model's own stay untouched.
    state = {
        name: torch.empty_like(p, device="meta") if by_shape else p
        for name, p in model.named_parameters()
    }
    for name, buffer in model.named_buffers():
        state[name] = torch.empty_like(buffer, device="meta") if by_shape else buffer.clone()

    parameters = sum(p.numel() for p in model.parameters())
    result = ModelSummary(type(model).__name__, parameters=parameters)
    with torch.no_grad(), _eval_mode(model), _recording(model, result.rows), _kept_state(model):
        torch.func.functional_call(model, state, inputs)
    result.macs = sum(row.macs for row in result.rows)
    return result


def _inputs(model: Module, input: Any) -> tuple[Tensor, ...]:
    if isinstance(input, Tensor):
        return (input,)
    if isinstance(input, Sequence) and not isinstance(input, str) and len(input):
        if all(isinstance(size, int) for size in input):
            floats = (p.dtype for p in model.parameters() if p.is_floating_point())
            return (torch.empty(tuple(input), dtype=next(floats, None), device="meta"),)
        if all(isinstance(x, Tensor) for x in input):
            return tuple(input)
    raise TypeError(
        "summary: input must be a shape such as (1, 3, 224, 224), a tensor or a sequence of "
        f"tensors, got {input!r}"
    )


@contextmanager
def _eval_mode(model: Module) -> Iterator[None]:
    """Set eval mode; give every module back the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _kept_state(model: Module) -> Iterator[None]:
    """Give modules back what they held: functional_call leaves its stand-ins in a module that a
    model has under two names."""
    places: list[Any] = [p for m in model.modules() for p in (m._parameters, m._buffers)]
    held = [(place, dict(place)) for place in places]
    try:
        yield
    finally:
        for place, values in held:
            place.update(values)


@contextmanager
def _recording(model: Module, rows: list[LayerRow]) -> Iterator[None]:
    """Append a row for every call of a module without children, and of attention."""
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if next(module.children(), None) is None or isinstance(module, MultiheadAttention):
                hook = module.register_forward_hook(_recorder(name, rows))
                hooks.callback(hook.remove)
        yield


def _recorder(name: str, rows: list[LayerRow]) -> Any:
    def record(module: Module, inputs: tuple[Any, ...], output: Any) -> None:
        first = output
        while not isinstance(first, Tensor):  # a recurrent layer's output and state, say
            first = first[0]
        own = sum(p.numel() for p in module.parameters())
        macs = _multiply_adds(module, inputs, first)
        rows.append(LayerRow(name, type(module).__name__, tuple(first.shape), own, macs))

    return record


def _multiply_adds(module: Module, inputs: tuple[Any, ...], output: Tensor) -> int:
    if isinstance(module, _ConvTransposeNd):  # every input value meets one row of the weight
        return inputs[0].numel() * module.weight[0].numel()
    if isinstance(module, _ConvNd):  # every output value is a product with one row
        return output.numel() * module.weight[0].numel()
    if isinstance(module, torch.nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, (RNNBase, RNNCellBase)):  # every step is a product with every weight
        steps = inputs[0][0] if isinstance(inputs[0], PackedSequence) else inputs[0]
        weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
        return steps.numel() // module.input_size * weights
    if isinstance(module, MultiheadAttention):
        query, key, value = inputs[:3]
        width = module.embed_dim
        projected = 2 * query.numel() + key.numel() + value.numel()  # of query and output as well
        keys = key.shape[0 if key.dim() == 2 or not module.batch_first else 1]
        return width * projected + 2 * query.numel() * keys  # scores, and sums by their weights
    if isinstance(module, DenseCapsules):  # votes; sums of them, and agreement between two sums
        size = module.out_capsules * module.out_dim
        votes = output.numel() // size * (module.weight.numel() // module.in_dim)
        return votes * (module.in_dim + 2 * module.iterations - 1)
    return 0
