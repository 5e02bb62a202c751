"""torch.nn.functional, with nnarch's own functions in place of those that it has kernels for."""

# ruff: noqa: F401 (a namespace: names are here to be imported)

from torch.nn.functional import *  # noqa: F403

from nnarch.functional import (
    activation,
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    batch_norm,
    conv1d,
    conv2d,
    conv_transpose1d,
    conv_transpose2d,
    interpolate,
    layer_norm,
    linear,
    local_response_norm,
    max_pool2d,
    max_unpool2d,
    rms_norm,
    scaled_dot_product_attention,
    upsample,
)
