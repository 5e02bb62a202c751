"""The module that `accelerate` returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree

from nnarch.accelerate import program
from nnarch.accelerate.program import Program
from nnarch.library import pooled_memory

_NEW = object()  # an input of a kind that was not seen yet
_MOST_PROGRAMS = 16  # one for every kind of input; the oldest goes


class Accelerated(nn.Module):
    """A model compiled for inference: channels_last inside, outputs as the original lays them out.

    Args:
        body: the rewritten model.
        converts_layout: whether 4-D inputs become channels_last on the way in.
    """

    def __init__(self, body: nn.Module, converts_layout: bool) -> None:
        super().__init__()
        self.body = body
        self.converts_layout = converts_layout
        self._programs: dict[Any, Program | None] = {}
        self.train(False)
        weights_to_channels_last(body)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model on its own arguments."""
        if torch.compiler.is_compiling():
            return self._run(args, kwargs)
        with pooled_memory():
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.converts_layout:
            return self.body(*args, **kwargs)
        if len(args) == 1 and isinstance(args[0], Tensor) and not kwargs:
            x = args[0]
            output = self._run_body(x)
            return _contiguous(output) if _are_planar([x]) else output
        planar = _are_planar(_pytree.tree_leaves((args, kwargs)))
        args, kwargs = _pytree.tree_map(channels_last, (args, kwargs))
        output = self.body(*args, **kwargs)
        return _contiguous(output) if planar else output

    def _run_body(self, x: Tensor) -> Any:
        """The graph on one input in channels_last, by its program where there is one."""
        body, inputs = self.body, [x]
        recorded = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if recorded or not isinstance(body, GraphModule):
            return body(channels_last(x))
        if not program.can_run(inputs):
            return body(channels_last(x))
        key = program.signature(inputs)
        known = self._programs.get(key, _NEW)
        if isinstance(known, Program) and known.is_current():
            try:
                return known(inputs)
            except RuntimeError:
                return body(channels_last(x))  # says which layer refuses, and why
        if known is None:
            return body(channels_last(x))
        output, self._programs[key] = program.record(body, channels_last, inputs)
        if len(self._programs) > _MOST_PROGRAMS:
            oldest, *_ = list(self._programs)  # in one step: other threads may be here
            self._programs.pop(oldest, None)
        return output

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Accelerated:
        self._programs.clear()  # they hold the weights that `fn` replaces
        super()._apply(fn, recurse)
        weights_to_channels_last(self.body)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_programs": {}}

    def train(self, mode: bool = True) -> Accelerated:
        """Accept eval mode only.

        Raises:
            RuntimeError: `mode` is true.
        """
        if mode:
            raise RuntimeError(
                "train(): an accelerated model is compiled for inference (BatchNorm is folded into "
                "weights); train the original model and accelerate it again"
            )
        return super().train(False)


def weights_to_channels_last(body: nn.Module, device: str = "cuda") -> None:
    """Lay out weights of convolutions on a GPU as its kernels read them: one copy, not one a call.

    Here the weights are the model's own. The CPU's kernels read packed copies of them; a copy on
    the GPU could not tell that ``weight.data`` was written, for want of looking at it.
    """
    with torch.inference_mode(False):
        for module in body.modules():
            weight = module.weight if isinstance(module, nn.Conv2d) else None
            if type(weight) is not nn.Parameter or weight.is_inference():
                continue
            if weight.device.type == device:
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def channels_last(x: Any) -> Any:
    """A floating-point 4-D tensor in channels_last, everything else as it is."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _are_planar(inputs: list[Any]) -> bool:
    """Whether torch's layers would give tensors in the default format for these inputs: one that
    is an activation in another format than channels_last, or none that is an activation."""
    images = [x for x in inputs if isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()]
    return not images or any(
        x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last) for x in images
    )


def _contiguous(output: Any) -> Any:
    """The images of `output`, and what was made of them, as a model returns them whose input was
    not channels_last."""
    if isinstance(output, Tensor):
        return output.contiguous() if output.dim() >= 3 else output
    return _pytree.tree_map_only(Tensor, _contiguous, output)
