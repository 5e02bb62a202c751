"""Layers and functions that have kernels of ours, put in the place of torch's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional as F

from nnarch import functional
from nnarch import nn as layers
from nnarch.accelerate.layers import ImageUpsample, interpolate, max_pool2d_with_indices
from nnarch.nn.inspection import is_customized
from nnarch.nn.packing import PackedWeightMixin

_SWAPPED = (
    "Conv1d",
    "Conv2d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "Linear",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "MaxPool2d",
    "AvgPool2d",
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "MaxUnpool2d",
    "LocalResponseNorm",
    "LayerNorm",
    "RMSNorm",
    "ReLU",
    "ReLU6",
    "LeakyReLU",
    "Hardswish",
    "Hardsigmoid",
    "SiLU",
    "GELU",
    "Tanh",
    "Sigmoid",
    "RNN",
    "LSTM",
    "GRU",
    "RNNCell",
    "LSTMCell",
    "GRUCell",
    "Embedding",
    "CrossEntropyLoss",
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
)
_TWINS: dict[type, type] = {getattr(nn, name): getattr(layers, name) for name in _SWAPPED}
# Their modes, and the ranks that they meet, are not all ours.
_TWINS |= dict.fromkeys(
    (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), ImageUpsample
)
_TWIN_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.conv1d: functional.conv1d,
    F.conv2d: functional.conv2d,
    F.conv_transpose1d: functional.conv_transpose1d,
    F.conv_transpose2d: functional.conv_transpose2d,
    F.linear: functional.linear,
    F.embedding: functional.embedding,
    F.max_pool2d: functional.max_pool2d,
    F.max_pool2d_with_indices: max_pool2d_with_indices,
    F.avg_pool2d: functional.avg_pool2d,
    F.adaptive_avg_pool2d: functional.adaptive_avg_pool2d,
    F.batch_norm: functional.batch_norm,
    F.layer_norm: functional.layer_norm,
    F.rms_norm: functional.rms_norm,
    F.local_response_norm: functional.local_response_norm,
    F.max_unpool2d: functional.max_unpool2d,
    F.cross_entropy: functional.cross_entropy,
    F.interpolate: interpolate,
    F.scaled_dot_product_attention: functional.scaled_dot_product_attention,
    torch.conv1d: functional.conv1d,
    torch.conv2d: functional.conv2d,
    torch.conv_transpose1d: functional.conv_transpose1d,
    torch.conv_transpose2d: functional.conv_transpose2d,
    torch.max_pool2d: functional.max_pool2d,
    torch.rms_norm: functional.rms_norm,
    torch.lstm_cell: functional.lstm_cell,
    torch.gru_cell: functional.gru_cell,
}
_KERNEL_DTYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16}


def swap_layers(body: nn.Module) -> None:
    """Turn every torch.nn layer in `body` that has a twin in nnarch.nn into that twin, in place.

    The twins are subclasses without state of their own, so exchanging the class is enough; a layer
    that several modules share stays shared.
    """
    for module in body.modules():
        twin = _TWINS.get(type(module))
        if twin is not None and has_kernel_dtype(module) and not is_customized(module):
            module.__class__ = twin


def swap_functions(graph_module: GraphModule) -> None:
    """Let the graph call nnarch.functional where the model called torch.nn.functional."""
    for node in graph_module.graph.nodes:
        twin = _TWIN_FUNCTIONS.get(node.target) if node.op == "call_function" else None
        # Ours name some arguments differently.
        if twin is not None and inspect.signature(twin).parameters.keys() >= node.kwargs.keys():
            node.target = twin
            node.meta["is_wrapped"] = True  # unpickling traces the code again, not into `twin`


def has_kernel_dtype(module: nn.Module) -> bool:
    """Whether the kernels take the parameters of `module`."""
    return all(parameter.dtype in _KERNEL_DTYPES for parameter in module.parameters(recurse=False))


def pack_weights(body: nn.Module) -> None:
    """Pack now, instead of in the first call, what does not depend on the input's size."""
    for module in body.modules():
        if isinstance(module, PackedWeightMixin):
            module._pack_now()
