"""The Triton launchers of the transposed convolution, one for each operation of op.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nnarch import library
from nnarch.kernels.conv_transpose2d.op import output_size
from nnarch.kernels.conv_transpose2d.triton_phases import by_phases
from nnarch.kernels.gpu.launch import check_dtype, vector
from nnarch.kernels.gpu.static import StaticCase, meta

__all__ = ["STATIC_CASES", "conv_transpose2d", "conv_transpose2d_pack"]


def conv_transpose2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    packed: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    alpha: float,
) -> torch.Tensor:
    """nnarch::conv_transpose2d on a GPU; `packed` is a CPU matter and not read."""
    check_dtype("conv_transpose2d", x, weight, residual)
    geometry = (stride, padding, output_padding, dilation, groups)
    y = library.new_output(x, output_size(x.shape, weight.shape, *geometry), weight)
    if y.numel() == 0:
        return y
    epilogue = {
        "bias_ptr": vector(bias),
        "scale_ptr": vector(scale),
        "shift_ptr": vector(shift),
        "residual_ptr": residual,
        "alpha": float(alpha),
        "ACTIVATION": activation,
    }
    by_phases(x, weight, y, stride, padding, dilation, groups, epilogue)
    return y


def conv_transpose2d_pack(
    weight: torch.Tensor, stride: Sequence[int], dilation: Sequence[int], groups: int, layout: int
) -> torch.Tensor:
    """An empty tensor: the GPU kernels read the weight as it is."""
    return weight.new_empty(0)


def _case(n: int, c: int, h: int, k: int, r: int, stride: int, padding: int) -> StaticCase:
    out = (h - 1) * stride - 2 * padding + r

    def run(dtype: torch.dtype) -> torch.Tensor:
        x, y = meta(n, c, h, h, dtype=dtype), meta(n, k, out, out, dtype=dtype)
        weight, b = meta(c, k, r, r, dtype=dtype), meta(k, dtype=dtype)
        steps = ([stride] * 2, [padding] * 2, [0, 0], [1, 1], 1)
        return conv_transpose2d(x, weight, b, b, b, y, None, *steps, 1, 0.0)

    return StaticCase(
        f"conv_transpose2d {r}×{r} C{c} H{h} K{k} N{n} s{stride}",
        run,
        flops=2.0 * n * h * h * c * k * r * r,
        elements=n * c * h * h + c * k * r * r + 2 * n * k * out * out,
        matrix=True,
    )


STATIC_CASES = [
    _case(64, 512, 4, 256, 4, 2, 1),  # DCGAN's generator, layer by layer
    _case(64, 256, 8, 128, 4, 2, 1),
    _case(64, 128, 16, 64, 4, 2, 1),
    _case(32, 128, 56, 64, 2, 2, 0),
]
"""What bench/static_gpu.py compiles."""
