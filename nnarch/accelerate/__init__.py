"""`accelerate(model)`: a trained model of torch.nn layers, made faster in one line.

The model is copied, traced with torch.fx, and rewritten by one pass per file, in this order:

==================  ==============================================================================
trace.py            the forward pass as a graph whose leaves are layers
clean.py            what does nothing in inference (dropout, identity) goes
fold.py             BatchNorm goes into the weights of the convolution or linear layer before it
fuse.py             activations and residual adds go into the epilogue of the layer before them
separable.py        depthwise convolutions are joined with the 1×1 convolutions around them
swap.py             layers that have kernels of ours become nnarch.nn layers, weights are packed
memory_format.py    4-D activations stay channels_last inside, whatever comes in and goes out
==================  ==============================================================================

Models of the transformers package take nnarch's attention (transformers_attention.py). The result
(accelerated.py) runs its operations as one native call (program.py).
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from nnarch.accelerate.accelerated import Accelerated
from nnarch.accelerate.clean import drop_inference_no_ops
from nnarch.accelerate.fold import fold_batch_norms
from nnarch.accelerate.fuse import fuse_epilogues
from nnarch.accelerate.memory_format import keep_channels_last
from nnarch.accelerate.separable import join_separable_convolutions
from nnarch.accelerate.swap import pack_weights, swap_functions, swap_layers
from nnarch.accelerate.trace import TracedModel, frozen_copy, trace_model
from nnarch.accelerate.transformers_attention import (
    choose_attention,
    register_transformers_attention,
)

__all__ = ["Accelerated", "accelerate", "register_transformers_attention"]

# Largest relative L2 difference that rewriting may cause, by dtype: reordered sums, nothing else.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2


def accelerate(model: nn.Module, example_input: Any = None) -> Accelerated:
    """Compile `model` for inference on nnarch's kernels; the model itself is left untouched.

    BatchNorm is folded into weights, activations and residual adds run in the epilogue of the layer
    before them, activations are channels_last inside, weights are packed. The result has its own
    parameters, in eval mode and frozen (``requires_grad=False``): gradients flow to the inputs, not
    to the parameters. It cannot return to training; train the original and accelerate it again.
    What is copied is the inference version, also of a model in training mode.

    Layers without a kernel of ours, parametrized layers, and modules with hooks stay as they are.
    A module whose forward pass cannot be traced (its control flow depends on data) keeps its own
    forward pass: its layers are replaced one by one, nothing is fused across them, and a warning
    says so. That holds for a module that keeps something from one call to the next (an attribute
    or buffer that it sets), too. ``torch.no_grad`` inside a forward pass is not kept: gradients for
    the inputs flow past it. Optional arguments of ``forward`` that are None, a bool or a str are
    fixed at their defaults.

    Args:
        model: any module of torch.nn or nnarch.nn layers, such as a torchvision model.
        example_input: optional tensor, or tuple of positional arguments of `model`. With it, the
            result is run once and compared with the model.

    Returns:
        A module that takes the arguments of `model` and returns the same within rounding.

    Raises:
        TypeError: `model` is not a module, is scripted, is wrapped for data parallelism, or cannot
            be copied.
        RuntimeError: the outputs for `example_input` differ, which says that tracing missed
            something. The result raises it on ``train()``, and AssertionError for an optional
            argument that is fixed at another value.
    """
    _check_model(model)
    # An inference tensor counts no versions, so a weight made here under inference_mode could not
    # be packed.
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(model, Accelerated):
            return copy.deepcopy(model)
        traced = trace_model(model)
        accelerated = _rewrite(traced)
        _warn_untraced(model, traced)
        if example_input is not None:
            _verify(model, accelerated, example_input)
        return accelerated


def _rewrite(traced: TracedModel) -> Accelerated:
    """Run the passes."""
    body, converts_layout = traced.module, False
    if traced.graph_module is not None:
        body = graph_module = traced.graph_module
        drop_inference_no_ops(graph_module)
        fold_batch_norms(graph_module)
        fuse_epilogues(graph_module)
        join_separable_convolutions(graph_module)
        swap_functions(graph_module)
        converts_layout = keep_channels_last(graph_module)
        graph_module.delete_all_unused_submodules()
        graph_module.graph.lint()
        graph_module.recompile()
    choose_attention(body)
    swap_layers(body)
    pack_weights(body)
    return Accelerated(body, converts_layout)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("accelerate: model must not be scripted; pass the original torch.nn.Module")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"accelerate: model must not be wrapped in {type(model).__name__}; pass model.module"
        )


def _warn_untraced(model: nn.Module, traced: TracedModel) -> None:
    for name, reason in traced.untraced.items():
        what = f"submodule {name!r}" if name else "the model"
        warnings.warn(
            f"accelerate({type(model).__name__}): {what} keeps its own forward pass ({reason}); "
            "its layers are replaced one by one and nothing is fused across them",
            UserWarning,
            stacklevel=4,
        )


def _verify(model: nn.Module, accelerated: Accelerated, example_input: Any) -> None:
    """Compare the outputs for `example_input` with those of `model` in eval mode."""
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    expected = _tensors(frozen_copy(model)(*args))
    got = _tensors(accelerated(*args))
    if len(expected) != len(got):
        raise RuntimeError(
            f"accelerate: the model returns {len(expected)} tensors for example_input, the "
            f"accelerated model {len(got)}"
        )
    for index, (want, have) in enumerate(zip(expected, got, strict=True)):
        if want.shape != have.shape or want.dtype != have.dtype:
            raise RuntimeError(
                f"accelerate: output {index} for example_input is {have.dtype} "
                f"{tuple(have.shape)}, the model's is {want.dtype} {tuple(want.shape)}"
            )
        error = _relative_error(have, want)
        tolerance = _TOLERANCE.get(want.dtype, _HALF_TOLERANCE)
        if not error <= tolerance:
            raise RuntimeError(
                f"accelerate: output {index} for example_input differs from the model's by "
                f"{error:.2e} relative (tolerance {tolerance:.0e})"
            )


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _relative_error(have: Tensor, want: Tensor) -> float:
    """Relative L2 difference; values that are not finite must be equal."""
    have, want = have.double(), want.double()
    same = (have == want) | (have.isnan() & want.isnan())
    difference = torch.where(same, 0.0, have - want).norm()
    return float(difference / torch.where(want.isfinite(), want, 0.0).norm().clamp_min(1e-30))
