"""Benchmark cases of layer and RMS normalization, with and without a residual added before."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from nnarch.benchmarking.case import Case, Target

LAYER_NORM_TARGETS: dict[str, Target] = {
    "LN + residual": Target(1.3, 2.0),
    "LN + residual fwd+bwd": Target(1.0, 1.5),
    "layer norm": Target(1.0, 1.3),
    "layer norm fwd+bwd": Target(1.0, 1.3),
}


class _AddAndNorm(nn.Module):
    """The end of a post-LN block. The residual is a parameter: it has a gradient too."""

    def __init__(self, norm: nn.Module, rows: int, columns: int) -> None:
        super().__init__()
        self.norm = norm
        self.residual = nn.Parameter(torch.randn(rows, columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.residual)


def _fused(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    from nnarch import functional as F

    norm: Any = module.get_submodule("norm")
    residual: Any = module.residual

    def run(x: torch.Tensor) -> torch.Tensor:
        size, weight, eps = norm.normalized_shape, norm.weight, norm.eps
        if isinstance(norm, nn.RMSNorm):
            return F.rms_norm(x, size, weight, eps, residual=residual)  # type: ignore[return-value]
        return F.layer_norm(x, size, weight, norm.bias, eps, residual=residual)  # type: ignore[return-value]

    return run


def layer_norms() -> Iterable[Case]:
    """Activations of a BERT-base block, and one token of it: what a call costs at all."""
    columns = 768
    for backward in (False, True):
        for rows in (4096, 128, 1):
            suffix = f"_{rows}x{columns}" + "_fb" * backward
            size = f" {rows}×{columns}" + " fwd+bwd" * backward
            options: dict[str, Any] = {"backward": backward, "flops": 8 * rows * columns}
            for short, name, norm in (
                ("ln", "LN", lambda nn: nn.LayerNorm(columns)),
                ("rms", "RMSNorm", lambda nn: nn.RMSNorm(columns, 1e-5)),
            ):
                yield Case(
                    f"{short}_residual{suffix}",
                    "LN + residual" + " fwd+bwd" * backward,
                    lambda nn, norm=norm, rows=rows: _AddAndNorm(norm(nn), rows, columns),
                    (rows, columns),
                    label=f"{name} + residual{size}",
                    ours=_fused,
                    target=None if rows == 4096 else Target(1.0, 1.3),
                    quick=short == "ln" and rows == 4096,
                    **options,
                )
                yield Case(
                    f"{short}{suffix}",
                    "layer norm" + " fwd+bwd" * backward,
                    norm,
                    (rows, columns),
                    label=name + size,
                    **options,
                )
