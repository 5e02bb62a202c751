"""Every operation's public function, with the signatures of `torch.nn.functional` first."""

from nnarch.kernels.activation.gated import gated_activation
from nnarch.kernels.activation.op import activation
from nnarch.kernels.attention.op import scaled_dot_product_attention
from nnarch.kernels.attention.weights import attention_weights
from nnarch.kernels.capsule_routing.op import capsule_routing, pack_capsule_weight, squash
from nnarch.kernels.capsule_routing.windows import conv_capsule_routing2d
from nnarch.kernels.conv1d.op import conv1d, conv_transpose1d
from nnarch.kernels.conv2d.op import conv2d, conv2d_tile, pack_conv2d_weight
from nnarch.kernels.conv_transpose2d.op import (
    conv_transpose2d,
    conv_transpose2d_layout,
    pack_conv_transpose2d_weight,
)
from nnarch.kernels.cross_entropy.linear import linear_cross_entropy
from nnarch.kernels.cross_entropy.op import cross_entropy
from nnarch.kernels.depthwise_separable.op import depthwise_separable_conv2d
from nnarch.kernels.dropout.op import dropout
from nnarch.kernels.embedding.fused import embedding_layer_norm
from nnarch.kernels.embedding.op import embedding
from nnarch.kernels.layer_norm.op import layer_norm, rms_norm
from nnarch.kernels.linear.gated import gated_linear, pack_gated_linear_weights
from nnarch.kernels.linear.op import linear, pack_linear_weight
from nnarch.kernels.local_response_norm.op import local_response_norm
from nnarch.kernels.normalization.op import batch_norm
from nnarch.kernels.pooling.op import (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    max_pool2d,
)
from nnarch.kernels.pooling.unpool import max_unpool2d
from nnarch.kernels.recurrent.cells import gru_cell, lstm_cell, rnn_cell
from nnarch.kernels.recurrent.op import (
    gru_layer,
    lstm_layer,
    pack_recurrent_weights,
    recurrent_pairs,
    rnn_layer,
)
from nnarch.kernels.reservoir.op import pack_reservoir, reservoir_generate, reservoir_scan
from nnarch.kernels.upsample.op import interpolate, upsample

attention = scaled_dot_product_attention

__all__ = [
    "activation",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "attention",
    "attention_weights",
    "avg_pool2d",
    "batch_norm",
    "capsule_routing",
    "conv1d",
    "conv2d",
    "conv2d_tile",
    "conv_capsule_routing2d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose2d_layout",
    "cross_entropy",
    "depthwise_separable_conv2d",
    "dropout",
    "embedding",
    "embedding_layer_norm",
    "gated_activation",
    "gated_linear",
    "gru_cell",
    "gru_layer",
    "interpolate",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "local_response_norm",
    "lstm_cell",
    "lstm_layer",
    "max_pool2d",
    "max_unpool2d",
    "pack_capsule_weight",
    "pack_conv2d_weight",
    "pack_conv_transpose2d_weight",
    "pack_gated_linear_weights",
    "pack_linear_weight",
    "pack_recurrent_weights",
    "pack_reservoir",
    "recurrent_pairs",
    "reservoir_generate",
    "reservoir_scan",
    "rms_norm",
    "rnn_cell",
    "rnn_layer",
    "scaled_dot_product_attention",
    "squash",
    "upsample",
]
