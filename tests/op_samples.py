"""Arguments for every operation of `library.OPS`: what tests of the dispatch itself run on.

A new operation brings them in its own test file, tests/kernels/test_<family>.py:

    SAMPLES = {"channel_shuffle": lambda: [(torch.randn(2, 6, 3, 5), 3)]}
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnarch import library
from nnarch.kernels.activation import kinds

GEOMETRY = ([2, 1], [1, 0, 2, 1], [1, 2])  # stride, padding, dilation: nothing symmetric
_NCHW = (2, 12, 9, 11)


def tensor(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, channels_last where 4-D."""
    t = torch.randn(size, dtype=dtype)
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def _epilogue(size: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = size[1]
    return tensor(k), torch.rand(k) + 0.5, tensor(k), tensor(*size)


def _conv2d(c: int, k: int) -> list[tuple[Any, ...]]:
    """Channels that pick implicit GEMM, or (up to 8 channels) the stem."""
    x, weight = tensor(2, c, 9, 11), tensor(k, c // 2 if c > 8 else c, 3, 4)
    groups = c // weight.shape[1]
    size = run("conv2d", x, weight, *[None] * 5, *GEOMETRY, groups, 0, 0.0).shape
    epilogue = _epilogue(size)
    return [
        (x, weight, *epilogue, None, *GEOMETRY, groups, kinds.RELU, 0.0),
        (x, weight, None, None, None, None, None, *GEOMETRY, groups, kinds.SILU, 0.0),
        (x, weight, epilogue[0], None, None, None, None, [1, 1], [0] * 4, [1, 1], groups, 0, 0.0),
    ]


def _conv2d_grad(name: str) -> list[tuple[Any, ...]]:
    samples = []
    for c, groups in ((12, 2), (3, 1)):
        x, weight = tensor(2, c, 9, 11), tensor(10, c // groups, 3, 4)
        geometry = (*GEOMETRY, groups)
        grad = run("conv2d", x, weight, *[None] * 5, *geometry, 0, 0.0)
        by_x = (grad, weight, list(x.shape), *geometry)
        by_weight = (grad, x, list(weight.shape), *geometry)
        in_formats = [(*by_weight, channels_last) for channels_last in (False, True)]
        samples += [by_x] if name == "conv2d_input_grad" else in_formats
    return samples


def _depthwise(name: str) -> list[tuple[Any, ...]]:
    x, weight = tensor(*_NCHW), tensor(24, 1, 3, 4)
    y = run("depthwise_conv2d", x, weight, *[None] * 5, *GEOMETRY, 0, 0.0)
    return {
        "depthwise_conv2d": [
            (x, weight, *_epilogue(y.shape), None, *GEOMETRY, kinds.RELU6, 0.0),
            (x, weight[:12], *[None] * 5, [1, 1], [1] * 4, [1, 1], kinds.HARDSWISH, 0.0),
        ],
        "depthwise_conv2d_input_grad": [(y, weight, list(x.shape), *GEOMETRY)],
        "depthwise_conv2d_weight_grad": [(y, x, list(weight.shape), *GEOMETRY)],
        "depthwise_conv2d_backward": [(y, x, weight, *GEOMETRY, some) for some in (3, 5, 7)],
        "depthwise_conv2d_pack": [(weight,)],
    }[name]


def _linear() -> list[tuple[Any, ...]]:
    samples = []
    for rows, kind in ((3, kinds.GELU), (70, kinds.TANH), (600, kinds.RELU)):
        x, weight = tensor(rows, 21), tensor(35, 21)
        vectors = _epilogue(torch.Size((rows, 35)))
        samples.append((x, weight, *vectors, None, kind, 0.0))
    return samples


def _activation(extra: int) -> list[tuple[Any, ...]]:
    return [
        (
            *(tensor(*_NCHW) for _ in range(extra + 1)),
            code,
            0.1 if code == kinds.LEAKY_RELU else 0.0,
        )
        for code in kinds.NAMES
        if code != kinds.NONE
    ]


def _batch_norm(name: str) -> list[tuple[Any, ...]]:
    x, grad = tensor(*_NCHW), tensor(*_NCHW)
    weight, bias = torch.rand(12) + 0.5, tensor(12)
    y, mean, invstd = run("batch_norm_train", x, weight, bias, None, 1e-5, kinds.RELU, 0.0)
    return {
        "batch_norm_eval": [
            (x, bias, weight, weight, bias, grad, 1e-5, kinds.RELU, 0.0),
            (x, bias, weight, None, None, None, 1e-3, 0, 0.0),
        ],
        "batch_norm_train": [
            (x, weight, bias, grad, 1e-5, kinds.RELU, 0.0),
            (x, None, None, None, 1e-3, 0, 0.0),
        ],
        "batch_norm_backward": [
            (grad, x, weight, mean, invstd, None, 0, 0.0),
            (grad, x, weight, mean, invstd, y, kinds.RELU, 0.0),
        ],
        "batch_norm_backward_backward": [
            (tensor(*_NCHW), tensor(12), tensor(12), grad, x, weight, mean, invstd)
        ],
    }[name]


_WINDOW = ([3, 2], [2, 1], [1, 0])  # kernel, stride, padding


def _tap_gradient(x: Tensor, dilation: list[int]) -> tuple[Any, ...]:
    y, taps = run("max_pool2d_taps", x, *_WINDOW, dilation, True)
    return torch.randn_like(y), taps, list(x.shape), *_WINDOW, dilation, True


def _max_pool(name: str) -> list[tuple[Any, ...]]:
    x = tensor(*_NCHW)
    y, indices = run("max_pool2d", x, *_WINDOW, [1, 2], True, True)
    return {
        "max_pool2d": [(x, *_WINDOW, [1, 2], True, True), (x, *_WINDOW, [1, 1], False, False)],
        "adaptive_max_pool2d": [(x, [4, 5], True), (x, [1, 1], False)],
        "max_pool2d_input_grad": [(torch.randn_like(y), indices, list(x.shape))],
        "max_pool2d_gather": [(x, indices)],
        "max_pool2d_taps": [(x, *_WINDOW, [1, 2], True), (x, *_WINDOW, [1, 1], False)],
        "max_pool2d_taps_grad": [_tap_gradient(x, [1, 2]), _tap_gradient(x, [1, 1])],
    }[name]


def _avg_pool(name: str) -> list[tuple[Any, ...]]:
    x = tensor(*_NCHW)
    options = (*_WINDOW, True, False, None)
    y = run("avg_pool2d", x, *options)
    small = run("adaptive_avg_pool2d", x, [4, 5])
    return {
        "avg_pool2d": [(x, *options), (x, *_WINDOW, False, True, 5)],
        "avg_pool2d_input_grad": [(y, list(x.shape), *options)],
        "adaptive_avg_pool2d": [(x, [4, 5]), (x, [1, 1])],
        "adaptive_avg_pool2d_input_grad": [(small, list(x.shape))],
    }[name]


def _affine() -> list[tuple[Any, ...]]:
    x = tensor(*_NCHW)
    return [
        (x, torch.rand(12), tensor(12), tensor(*_NCHW), kinds.RELU, 0.0),
        (x, None, tensor(12), None, kinds.SILU, 0.0),
    ]


_SAMPLES: dict[str, Callable[[], list[tuple[Any, ...]]]] = {
    "activation": lambda: _activation(0),
    "activation_grad": lambda: _activation(1),
    "activation_grad_grad": lambda: _activation(2),
    "affine": _affine,
    "channel_sum": lambda: [(tensor(*_NCHW),), (tensor(300, 7),)],
    "channel_dot": lambda: [(tensor(*_NCHW), tensor(*_NCHW))],
    "conv2d": lambda: [
        *_conv2d(12, 10),
        *_conv2d(3, 9),
        # A signal.
        (
            tensor(2, 5, 1, 300),
            tensor(20, 5, 1, 4),
            tensor(20),
            None,
            None,
            tensor(2, 20, 1, 150),
            None,
            [1, 2],
            [0, 1, 0, 2],
            [1, 1],
            1,
            kinds.RELU,
            0.0,
        ),
    ],
    "conv2d_pack": lambda: [
        (tensor(10, 6, 3, 4), 2, 0),
        (tensor(9, 3, 3, 3), 1, 0),
        (tensor(20, 7, 3, 3), 2, 4),
        (tensor(20, 7, 5, 5), 2, 2),
    ],
    "linear": _linear,
    "linear_pack": lambda: [(tensor(35, 21),)],
}
for _name in ("conv2d_input_grad", "conv2d_weight_grad"):
    _SAMPLES[_name] = lambda name=_name: _conv2d_grad(name)
for _name in ("", "_input_grad", "_weight_grad", "_backward", "_pack"):
    _SAMPLES["depthwise_conv2d" + _name] = lambda name="depthwise_conv2d" + _name: _depthwise(name)
for _name in ("eval", "train", "backward", "backward_backward"):
    _name = "batch_norm_" + _name
    _SAMPLES[_name] = lambda name=_name: _batch_norm(name)
for _name in (
    "max_pool2d", "adaptive_max_pool2d", "max_pool2d_input_grad", "max_pool2d_gather",
    "max_pool2d_taps", "max_pool2d_taps_grad",
):  # fmt: skip
    _SAMPLES[_name] = lambda name=_name: _max_pool(name)
for _name in (
    "avg_pool2d", "avg_pool2d_input_grad", "adaptive_avg_pool2d", "adaptive_avg_pool2d_input_grad"
):  # fmt: skip
    _SAMPLES[_name] = lambda name=_name: _avg_pool(name)


def all_ops() -> list[str]:
    """The names of all declared operations."""
    import nnarch.functional  # noqa: F401 (declares them)

    return sorted(library.OPS)


def samples(name: str) -> list[tuple[Any, ...]]:
    """Positional arguments for several calls of an operation."""
    make = _SAMPLES.get(name) or _samples_of_test_files().get(name)
    if make is None:
        raise KeyError(
            f"nnarch::{name} has no sample arguments: tests/kernels/test_<family>.py needs "
            f'SAMPLES = {{"{name}": lambda: [(argument, ...), ...]}}'
        )
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # torch rounds its own products differently with more
    try:
        return make()
    finally:
        torch.set_num_threads(threads)


@functools.cache
def _samples_of_test_files() -> dict[str, Callable[[], list[tuple[Any, ...]]]]:
    found: dict[str, Callable[[], list[tuple[Any, ...]]]] = {}
    for path in sorted((Path(__file__).parent / "kernels").glob("test_*.py")):
        if "SAMPLES" in path.read_text("utf-8"):
            found |= importlib.import_module(path.stem).SAMPLES
    return found


def run(name: str, *args: Any) -> Any:
    """Call the operation through the dispatcher."""
    return getattr(torch.ops.nnarch, name).default(*args)


# Arguments whose gradient is the public functions' business (kernels/epilogue.py: must_split).
_CONSTANT = dict.fromkeys(("conv2d", "conv_transpose2d", "depthwise_conv2d", "linear"), "scale")


# How many results of an operation have a gradient, where that is not all of them.
_DIFFERENTIABLE = {"batch_norm_train": 1, "layer_norm_train": 2}


def gradients(name: str, args: tuple[Any, ...], function: Callable[..., Any] | None = None):
    """Gradients of all floating-point tensors in `args`, of the operation or another `function`.

    None stands for a tensor without a gradient; the list is empty where there are none at all.
    """
    names = [argument.name for argument in library.OPS[name].overload._schema.arguments]
    leaves = [
        a.detach().clone().requires_grad_()
        if isinstance(a, Tensor) and a.is_floating_point() and n != _CONSTANT.get(name)
        else a
        for n, a in zip(names, args, strict=True)
    ]
    wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad]
    # Statistics are results without a gradient, though torch could give one.
    results = outputs(function(*leaves) if function else run(name, *leaves))
    results = [r for r in results[: _DIFFERENTIABLE.get(name)] if r.requires_grad]
    torch.manual_seed(2)
    weights = [torch.randn(r.shape, dtype=r.dtype) for r in results]
    return torch.autograd.grad(results, wanted, weights, allow_unused=True) if results else []


def outputs(result: Any) -> tuple[Tensor, ...]:
    """The tensors that an operation returned."""
    return result if isinstance(result, tuple) else (result,)
