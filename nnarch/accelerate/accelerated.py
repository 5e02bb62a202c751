"""The module that `accelerate` returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from nnarch.library import pooled_memory


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
        self.train(False)

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
            output = self.body(channels_last(x))
            return _contiguous(output) if _is_planar(x) else output
        planar = any(_is_planar(leaf) for leaf in _pytree.tree_leaves((args, kwargs)))
        args, kwargs = _pytree.tree_map(channels_last, (args, kwargs))
        output = self.body(*args, **kwargs)
        return _contiguous(output) if planar else output

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


def channels_last(x: Any) -> Any:
    """A floating-point 4-D tensor in channels_last, everything else as it is."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        return x
    return x.contiguous(memory_format=torch.channels_last)


def _is_planar(x: Any) -> bool:
    """Whether `x` is an activation that came in another format than channels_last."""
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        return False
    return x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)


def _contiguous(output: Any) -> Any:
    """The 4-D tensors of `output` as a model returns them whose input was not channels_last."""
    if isinstance(output, Tensor):
        return output.contiguous() if output.dim() == 4 else output
    return _pytree.tree_map_only(Tensor, _contiguous, output)
