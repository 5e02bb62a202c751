"""Operations with nodes in C++, on small tensors."""

from __future__ import annotations

import torch

from nnarch import functional as F


def _cross_entropy(x):
    return F.cross_entropy(x, torch.arange(x.shape[0]) % x.shape[1])


def _attention(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, return_lse=True)


def _norm_of_sum(x, w, b, r):
    return F.layer_norm(x, (5,), w, b, residual=r, return_sum=True)


def _norm(x, w, b):
    return F.layer_norm(x, (5,), w, b)


def _batch_norm(x, w, b):
    return F.batch_norm(x, None, None, w, b, training=True)


def _batch_norm_relu(x, w, b):
    return F.batch_norm(x, None, None, w, b, training=True, activation="relu")


def _conv(x, w, b):
    return F.conv2d(x, w, b, stride=(1, 2), padding=(1, 0), groups=2)


def _depthwise(x, w, b):
    return F.conv2d(x, w, b, padding=1, groups=3)


def _max_pool(x):
    return F.max_pool2d(x, 2, (2, 1))


def _max_pool_indices(x):
    return F.max_pool2d(x, 2, 1, return_indices=True)[0]


def _adaptive_max_pool(x):
    return F.adaptive_max_pool2d(x, (2, 3), return_indices=True)[0]


def _avg_pool(x):
    return F.avg_pool2d(x, (2, 3), 1, (1, 1), count_include_pad=False)


def _upsample(x):
    return F.interpolate(x, (7, 3), mode="bilinear")


def _activation(kind, alpha=None):
    return lambda x: F.activation(x, kind, alpha=alpha)


def _dropout(x):
    torch.manual_seed(5)
    return F.dropout(x, 0.3)


def _local_response_norm(x):
    return F.local_response_norm(x, 3)


# name: (function, shapes of its tensors, whether it has a second derivative)
CASES = {
    "linear": (F.linear, [(3, 5), (4, 5), (4,)], True),
    "linear 3-D": (F.linear, [(2, 3, 5), (4, 5), (4,)], True),
    "linear 1-D": (F.linear, [(5,), (4, 5), (4,)], True),
    "linear empty": (F.linear, [(0, 5), (4, 5), (4,)], False),
    "linear no depth": (F.linear, [(3, 0), (4, 0), (4,)], False),
    "conv2d": (_conv, [(2, 4, 5, 6), (6, 2, 3, 2), (6,)], True),
    "conv2d of nothing": (_conv, [(0, 4, 5, 6), (6, 2, 3, 2), (6,)], False),
    "depthwise": (_depthwise, [(2, 3, 4, 5), (6, 1, 3, 3), (6,)], True),
    "max_pool2d": (_max_pool, [(2, 3, 5, 4)], True),
    "max_pool2d with indices": (_max_pool_indices, [(2, 3, 5, 4)], True),
    "adaptive_max_pool2d": (_adaptive_max_pool, [(2, 3, 5, 4)], True),
    "avg_pool2d": (_avg_pool, [(2, 3, 5, 4)], True),
    "upsample": (_upsample, [(2, 3, 5, 4)], True),
    "layer_norm": (_norm, [(3, 5), (5,), (5,)], True),
    "layer_norm of a sum": (_norm_of_sum, [(3, 5), (5,), (5,), (3, 5)], True),
    "batch_norm": (_batch_norm, [(2, 3, 4, 2), (3,), (3,)], True),
    "batch_norm with relu": (_batch_norm_relu, [(2, 3, 4, 2), (3,), (3,)], True),
    "attention": (_attention, [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4), (1, 1, 3, 5)], False),
    "cross_entropy": (_cross_entropy, [(3, 5)], False),
    "relu": (_activation("relu"), [(3, 5)], True),
    "tanh": (_activation("tanh"), [(3, 5)], True),
    "gelu": (_activation("gelu"), [(3, 5)], True),
    "leaky_relu": (_activation("leaky_relu", 0.2), [(3, 5)], True),
    "leaky_relu, negative": (_activation("leaky_relu", -0.2), [(3, 5)], True),
    "gated_activation": (F.gated_activation, [(3, 5), (3, 5)], True),
    "dropout": (_dropout, [(3, 5)], True),
    "local_response_norm": (_local_response_norm, [(2, 3, 5, 4)], False),
    "squash": (F.squash, [(3, 5)], False),
}
NAMES = list(CASES)
KEEPING = [name for name in NAMES if name not in ("avg_pool2d", "upsample")]  # tensors, that is


def make(name, dtype=torch.float32, seed=0):
    function, shapes, _ = CASES[name]
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
    return function, tensors


def outputs_of(result):
    return list(result) if isinstance(result, tuple) else [result]


def is_node(output):
    return type(output.grad_fn).__name__ == "CppFunction" and "nnarch" in output.grad_fn.name()


def upstream_for(outputs, expanded=False):
    generator = torch.Generator().manual_seed(7)
    if expanded:
        return [torch.tensor(1.5, dtype=o.dtype).expand(o.shape) for o in outputs]
    return [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs]
