"""Layer and RMS normalization as functions of named tensors, for the tests of their family."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as TF

from nnarch import functional as F
from nnarch.kernels.dropout.reference import factors

EPS = 1e-5


def stats_of(x: Tensor, rms: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    rstd = torch.rsqrt(rows.square().mean(1) + EPS)
    return rstd[None].clone() if rms else torch.stack([rows.mean(1), rstd])


def ours(rms: bool, size: tuple[int, ...], both: bool = False, eps: float = EPS):
    """The public function of tensors by name; with `both`, y and the sum in one tensor."""

    def run(x, weight=None, bias=None, residual=None):
        options = {"residual": residual, "return_sum": both}
        if rms:
            y = F.rms_norm(x, size, weight, eps, **options)
        else:
            y = F.layer_norm(x, size, weight, bias, eps, **options)
        return torch.cat(y) if both else y

    return run


def theirs(rms: bool, size: tuple[int, ...], both: bool = False, eps: float = EPS):
    def run(x, weight=None, bias=None, residual=None):
        s = x if residual is None else x + residual
        norm = TF.rms_norm if rms else TF.layer_norm
        y = norm(s, size, *([weight] if rms else [weight, bias]), eps)
        return torch.cat([y, s]) if both else y

    return run


def operands(rms: bool, shape, columns: tuple[int, ...], dtype, residual=True, mean=0.0):
    x = (torch.randn(shape) + mean).to(dtype)
    return {
        "x": x,
        "weight": (torch.rand(columns) + 0.5).to(dtype),
        "bias": None if rms else torch.randn(columns).to(dtype),
        "residual": torch.randn(shape).to(dtype) if residual else None,
    }


def dropped(x: Tensor, seed: int, p: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return (rows * factors(torch.tensor([seed]), 1, *rows.shape, p, rows)[0]).view(x.shape)
