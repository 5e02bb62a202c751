"""Drop-in layers: ``import nnarch.nn as nn`` is enough to write a network.

Layers with kernels of ours are subclasses of their torch.nn twins: same constructor, same
parameters, same state_dict. Sequential is one, too: it runs a BatchNorm and most activations behind
it as one operation. Every other name (other containers, losses, shapes, whatever has no kernel
here) is torch.nn's own class, so any file written for torch.nn works unchanged.
"""

# ruff: noqa: F401 (a namespace: names are here to be imported)

from torch.nn import *  # noqa: F403  (ours, below, replace their twins)
from torch.nn import Module, Parameter, init, parallel, utils

import nnarch.nn.functional as functional  # the star import has bound torch's: replace it
from nnarch.nn.activation import (
    GELU,
    Hardsigmoid,
    Hardswish,
    LeakyReLU,
    LeCunTanh,
    Maxout,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Step,
    Tanh,
)
from nnarch.nn.attention import MultiheadAttention
from nnarch.nn.cache import DecoderCache, GrowingCache, LayerCache, MemoryCache, StaticCache
from nnarch.nn.capsule import (
    CapsuleDecoder,
    CapsuleLengths,
    ConvCapsules2d,
    DenseCapsules,
    PrimaryCapsules,
)
from nnarch.nn.conv import Conv2d, LazyConv2d
from nnarch.nn.conv1d import Conv1d, ConvTranspose1d, LazyConv1d, LazyConvTranspose1d
from nnarch.nn.conv_transpose import ConvTranspose2d, LazyConvTranspose2d
from nnarch.nn.dropout import Dropout
from nnarch.nn.echo_state import EchoStateNetwork
from nnarch.nn.embedding import Embedding
from nnarch.nn.fused import (
    FusedConv1d,
    FusedConv2d,
    FusedConvTranspose1d,
    FusedConvTranspose2d,
    FusedLinear,
)
from nnarch.nn.gated import GatedFeedForward, GatedLinear
from nnarch.nn.joined import Sequential
from nnarch.nn.layer_norm import LayerNorm, RMSNorm
from nnarch.nn.linear import LazyLinear, Linear
from nnarch.nn.local_response_norm import LocalResponseNorm
from nnarch.nn.loss import CrossEntropyLoss, LinearCrossEntropyLoss
from nnarch.nn.normalization import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    LazyBatchNorm1d,
    LazyBatchNorm2d,
    LazyBatchNorm3d,
)
from nnarch.nn.packing import drop_packed_weights
from nnarch.nn.pooling import (
    AdaptiveAvgPool2d,
    AdaptiveMaxPool2d,
    AvgPool2d,
    MaxPool2d,
    MaxUnpool2d,
)
from nnarch.nn.positions import SinusoidalPositionalEncoding
from nnarch.nn.recurrent import GRU, LSTM, RNN, LayerNormLSTM
from nnarch.nn.recurrent_cells import GRUCell, LSTMCell, RNNCell
from nnarch.nn.reservoir import Reservoir
from nnarch.nn.separable import DepthwiseSeparableConv2d
from nnarch.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from nnarch.nn.upsample import Upsample, UpsamplingBilinear2d, UpsamplingNearest2d
