"""The running statistics of batch normalization in Triton: one launch, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nnarch.kernels.gpu.launch import cdiv, device_guard, flat_grid, launch
from nnarch.kernels.gpu.tiles import tile


@triton.jit
def _update_kernel(
    running_mean_ptr,  # [channels] by its stride, or None
    running_var_ptr,  # likewise
    mean_ptr,  # [channels] of the batch, in float32
    invstd_ptr,  # likewise, 1/√(var + eps)
    momentum,
    unbiased,  # momentum·count/(count - 1)
    eps,
    channels,
    stride_m,
    stride_v,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    if running_mean_ptr is not None:
        old = tl.load(running_mean_ptr + c * stride_m, mask=inside).to(tl.float64)
        mean = tl.load(mean_ptr + c, mask=inside).to(tl.float64)
        new = old + (mean - old) * momentum
        store = running_mean_ptr + c * stride_m
        tl.store(store, new.to(running_mean_ptr.dtype.element_ty), mask=inside)
    if running_var_ptr is not None:
        old = tl.load(running_var_ptr + c * stride_v, mask=inside).to(tl.float64)
        invstd = tl.load(invstd_ptr + c, mask=inside, other=1.0).to(tl.float64)
        biased = tl.maximum(1.0 / (invstd * invstd) - eps, 0.0)
        new = old - old * momentum + biased * unbiased
        store = running_var_ptr + c * stride_v
        tl.store(store, new.to(running_var_ptr.dtype.element_ty), mask=inside)


def update(
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    momentum: float,
    eps: float,
    count: int,
) -> tuple[()]:
    """``nnarch::batch_norm_update``."""
    channels = mean.shape[0]
    arguments = {
        **{"running_mean_ptr": running_mean, "running_var_ptr": running_var},
        **{"mean_ptr": mean, "invstd_ptr": invstd, "channels": channels},
        **{"momentum": momentum, "unbiased": momentum * count / (count - 1), "eps": eps},
        "stride_m": 0 if running_mean is None else running_mean.stride(0),
        "stride_v": 0 if running_var is None else running_var.stride(0),
    }
    with device_guard(mean):
        chosen = tile(BLOCK=128, num_warps=1)
        launch(_update_kernel, flat_grid(cdiv(channels, 128)), arguments, chosen)
    return ()
